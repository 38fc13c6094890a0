"""Options of ranks that step together: what differs is named on all of them; what is the same is left alone."""

from typing import Any

import pytest
import torch
from torch import nn

from hvdvae import DistributedOptimizer
from hvdvae.errors import ConfigError
from hvdvae.strategies import Strategy
from hvdvae.strategies.equal_options import EVERY
from hvdvae.world import World

WAYS: list[dict[str, Any]] = [
    {"engine": "mpi"},
    {"engine": "horovod"},
    {"engine": "horovod", "reduce_op": "adasum"},
    {"compression": "topk"},
    {"strategy": "sharded", "engine": "mpi"},
    {"strategy": "sharded", "engine": "horovod"},
    {"strategy": "sharded", "engine": "mpi", "zero_stage": 2},
    {"strategy": "local-sgd", "sync_every": 4},
    {"strategy": "diloco", "sync_every": 4},
]


@pytest.fixture(params=WAYS, ids=lambda way: "-".join(map(str, way.values())))
def optimizer(request: pytest.FixtureRequest, world: World) -> Strategy:
    way: dict[str, Any] = request.param
    if world.launcher == "horovodrun-gloo" and (way.get("engine") == "mpi" or {"compression", "reduce_op"} & {*way}):
        pytest.skip("horovodrun --gloo has no MPI, which Horovod's Adasum needs, too")
    if way.get("engine") == "horovod" and world.launcher != "none":
        pytest.importorskip("horovod.torch")
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.2}]
    optimizer = DistributedOptimizer(torch.optim.Adam(groups, lr=0.1), model, world=world, **way)
    optimizer.model = model  # type: ignore[attr-defined]
    return optimizer


def steps(optimizer: Strategy, count: int) -> None:
    model = optimizer.model  # type: ignore[attr-defined]
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.full((2, 3), 1.0 + optimizer.world.rank)).square().mean().backward()
        optimizer.step()


def test_a_rate_of_one_rank_is_named(optimizer: Strategy, world: World) -> None:
    steps(optimizer, 3)
    if world.rank == world.size - 1:
        optimizer.param_groups[1]["lr"] = 0.02
    if world.size == 1:
        steps(optimizer, EVERY)
        return
    with pytest.raises(ConfigError, match=rf"lr of group 1 is 0\.2 on rank 0 and 0\.02 on rank {world.size - 1}: "):
        steps(optimizer, EVERY)


def test_so_is_any_other_option(optimizer: Strategy, world: World) -> None:
    steps(optimizer, EVERY)
    if world.rank == world.size - 1:
        optimizer.param_groups[0]["betas"] = (0.5, 0.999)
    if world.size == 1:
        steps(optimizer, EVERY)
        return
    with pytest.raises(ConfigError, match=rf"betas of group 0 is not the same on ranks 0 and {world.size - 1}: "):
        steps(optimizer, EVERY)


def test_a_schedule_of_all_ranks_is_not(optimizer: Strategy) -> None:
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4 * EVERY)
    for _ in range(2 * EVERY):
        steps(optimizer, 1)
        schedule.step()
    optimizer.finish()


def test_an_average_after_unequal_numbers_of_steps_is_nobodys(world: World) -> None:
    model = nn.Linear(3, 2)
    inner = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = DistributedOptimizer(inner, model, world=world, strategy="local-sgd", sync_every=4)
    optimizer.model = model  # type: ignore[attr-defined]
    if world.size == 1:
        steps(optimizer, 6)
        optimizer.finish()
        return

    def loop() -> None:
        steps(optimizer, 6 if world.is_first else 8)
        optimizer.finish()

    with pytest.raises(ConfigError, match=r"rank 1 comes to the average of weights after 8 steps, rank 0 after 6: "):
        loop()
