"""Every rank starts from all that rank 0's model holds: frozen parameters, counters and buffers of any dtype too."""

import copy

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
        self.register_buffer("order", torch.randperm(5), persistent=False)
        self.register_buffer("mask", torch.tensor(rank % 2 == 0).expand(2, 2), persistent=False)


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
    for (name, value), found in zip(first.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(found, value), name


def test_the_first_difference_of_models_is_named(world: World, engine: str) -> None:
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4 if world.rank == 1 else 3))
    with pytest.raises(WorldError, match=r"ranks \[1\] hold another model.*1.weight \[4, 2\].*1.weight \[3, 2\]"):
        DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world, engine=engine)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_groups_of_nothing_and_of_one_number_train(world: World, engine: str, momentum: float) -> None:
    """A frozen group, and one that most ranks have no slice of."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"frozen": nn.Linear(3, 3).requires_grad_(False), "head": nn.Linear(3, 1)})
    scale = nn.Parameter(torch.tensor(0.5))
    model.register_parameter("scale", scale)
    plain = copy.deepcopy(model)
    for net, wrap in ((plain, False), (model, True)):
        groups = [{"params": [*net["frozen"].parameters()]}, {"params": [*net["head"].parameters()]}]
        optimizer: torch.optim.Optimizer = torch.optim.SGD([*groups, {"params": [net.scale]}], 0.1, momentum=momentum)
        if wrap:
            optimizer = DistributedOptimizer(optimizer, net, world=world, engine=engine)
        for _ in range(3):
            optimizer.zero_grad()
            (net["head"](net["frozen"](torch.ones(4, 3))) * net.scale).square().mean().backward()
            optimizer.step()
    for expected, found in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


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
