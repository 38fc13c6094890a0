"""Parameters that need no gradient are nobody's to change, and keep their number in the optimizer's state."""

import pytest
import torch
from torch import Tensor, nn

from hvdvae.errors import ConfigError
from hvdvae.strategies import DistributedOptimizer, Strategy
from hvdvae.world import World


def half_frozen() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2))
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.3)


def wrapped(model: nn.Module) -> Strategy:
    return DistributedOptimizer(adamw(model), model, world=World.alone(device="cpu"), strategy="local")


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name])


def test_weight_decay_leaves_them_alone() -> None:
    ours, plain = half_frozen(), half_frozen()
    before = ours[1].weight.clone()
    train(ours, wrapped(ours))
    train(plain, adamw(plain))
    assert torch.equal(ours[1].weight, before)
    assert_close(ours.state_dict(), plain.state_dict())


@pytest.mark.parametrize("ours_first", [True, False])
def test_state_passes_to_plain_torch_and_back(ours_first: bool) -> None:
    one, reference = half_frozen(), half_frozen()
    first, straight = wrapped(one) if ours_first else adamw(one), adamw(reference)
    train(one, first)
    train(reference, straight, 4)
    second = adamw(one) if ours_first else wrapped(one)
    second.load_state_dict(first.state_dict())
    train(one, second)
    train(reference, straight, 4)
    assert_close(one.state_dict(), reference.state_dict())


def test_what_is_unfrozen_after_wrapping_is_refused_and_not_left_behind() -> None:
    model = half_frozen()
    optimizer = wrapped(model)
    train(model, optimizer, 1)
    model[1].requires_grad_(True)
    with pytest.raises(ConfigError, match="frozen when the optimizer was wrapped"):
        train(model, optimizer, 1)
