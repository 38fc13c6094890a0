"""A small model and data that the laws are tested on. Every rank holds all examples, and trains on its own share."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.world import World

EXAMPLES, INPUTS, OUTPUTS = 24, 6, 3

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.05),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
}
"""Elementwise ones, each with options that matter."""


def examples() -> tuple[Tensor, Tensor]:
    """Inputs (24, 6) and targets (24, 3)."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(EXAMPLES, INPUTS, generator=generator), torch.randn(EXAMPLES, OUTPUTS, generator=generator)


def share(world: World) -> slice:
    """This rank's examples; the shares of all ranks are the whole."""
    part = EXAMPLES // world.size
    return slice(world.rank * part, (world.rank + 1) * part)


def network(seed: int) -> nn.Module:
    """Two layers; another seed gives other weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, OUTPUTS))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error: the mean over ranks with equal shares is the mean over all."""
    return (model(x) - y).square().mean()


def weights(model: nn.Module) -> Tensor:
    """All parameters as one copy, (P,)."""
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
