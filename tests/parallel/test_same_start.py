"""Every rank starts from all that rank 0's model holds: frozen parameters, counters and buffers of any dtype too."""

import pytest
import torch
from torch import Tensor, nn

from hvdvae.errors import WorldError
from hvdvae.strategies import DistributedOptimizer
from hvdvae.world import World


class Mixed(nn.Module):
    """One of each kind, with values that differ per rank."""

    counter: Tensor
    precise: Tensor
    flags: Tensor

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(rank)
        self.trained = nn.Linear(3, 2)
        self.frozen = nn.Linear(3, 2).requires_grad_(False)
        self.elsewhere = nn.Parameter(torch.randn(4))
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("counter", torch.tensor(10 + rank))
        self.register_buffer("precise", torch.randn(2, 2, dtype=torch.float64).t())
        self.register_buffer("brief", torch.randn(3).to(torch.bfloat16))
        self.register_buffer("flags", torch.tensor([rank % 2 == 0, True]))


def test_all_of_the_state_is_rank_0s(world: World, engine: str) -> None:
    model, first = Mixed(world.rank), Mixed(0)
    optimizer = torch.optim.SGD(
        [*model.trained.parameters(), *model.frozen.parameters(), *model.norm.parameters()], 0.1
    )
    DistributedOptimizer(optimizer, model, world=world, engine=engine)
    for name, value in first.state_dict().items():
        found = model.state_dict()[name]
        assert torch.equal(found, value), name
        assert found.dtype == value.dtype


@pytest.mark.parametrize("what", ["options", "state"])
def test_optimizers_that_are_not_alike_are_refused_on_all_ranks(world: World, engine: str, what: str) -> None:
    """A checkpoint that rank 0 alone has loaded, say: each rank would step with its own."""
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.2 if what == "options" and world.rank == 1 else 0.1, momentum=0.9)
    if what == "state" and world.rank == 1:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    with pytest.raises(WorldError, match=r"ranks \[1\] hold another optimizer than rank 0"):
        DistributedOptimizer(optimizer, model, world=world, engine=engine)
