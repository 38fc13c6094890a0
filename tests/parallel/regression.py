"""A small model and data that the laws are tested on. Every rank holds all examples, and trains on its own share."""

import torch
from torch import Tensor, nn

from hvdvae.world import World

EXAMPLES, INPUTS, OUTPUTS = 16, 6, 3


def examples() -> tuple[Tensor, Tensor]:
    """Inputs (16, 6) and targets (16, 3)."""
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
