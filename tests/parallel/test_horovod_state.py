"""Horovod's ways to resume work on ours: rank 0 loads, and all broadcast the wrapped optimizer's state."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from hvdvae.errors import ConfigError
from hvdvae.strategies import DistributedOptimizer, Strategy
from hvdvae.world import World

pytest.importorskip("horovod.torch")

KINDS: dict[str, Callable[..., Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, 0.05),
    "asgd": lambda p: torch.optim.ASGD(p, 0.05, t0=2.0),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.05),
}
WAYS: dict[str, dict[str, Any]] = {
    "horovod": {"strategy": "allreduce", "engine": "horovod"},
    "mpi": {"strategy": "allreduce", "engine": "mpi"},
    "local-sgd": {"strategy": "local-sgd", "sync_every": 2},
}


@pytest.fixture(autouse=True)
def hvd(world: World) -> Any:
    if world.launcher in ("none", "horovodrun-gloo"):
        pytest.skip("Horovod and MPI are not started without a launcher")
    return world.horovod()


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5))


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """The same data on all ranks, so that one process is the reference."""
    for number in steps:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def wrap(world: World, way: str, kind: str, model: nn.Module) -> Strategy:
    return DistributedOptimizer(KINDS[kind](model.parameters()), model, world=world, **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_rank_0_loaded_is_broadcast(world: World, hvd: Any, way: str, kind: str) -> None:
    plain = network(1)
    reference = KINDS[kind](plain.parameters())
    train(plain, reference, range(3))
    model = network(40 + world.rank)
    optimizer = wrap(world, way, kind, model)
    if world.is_first:
        model.load_state_dict(plain.state_dict())
        optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    train(plain, reference, range(3, 6))
    train(model, optimizer, range(3, 6))
    assert_same(model, plain)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["adam", "nadam", "asgd", "momentum", "sgd"])
def test_new_ones_begin_as_if_nothing_had_been_broadcast(world: World, hvd: Any, way: str, kind: str) -> None:
    """Horovod steps its own wrapper for real then: weights decay, and Adam counts one step."""
    plain, model = network(1), network(1)
    reference, optimizer = KINDS[kind](plain.parameters()), wrap(world, way, kind, model)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert_same(model, plain)
    train(plain, reference, range(4))
    train(model, optimizer, range(4))
    assert_same(model, plain)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["adam", "momentum"])
def test_elastic_state_saves_restores_and_syncs(world: World, hvd: Any, way: str, kind: str) -> None:
    model = network(1)
    optimizer = wrap(world, way, kind, model)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, batch=0)
    state.sync()
    train(model, optimizer, range(2))
    state.batch = 2
    state.save()
    train(model, optimizer, range(2, 4))
    expected = copy.deepcopy(model)
    state.restore()
    assert state.batch == 2
    train(model, optimizer, range(2, 4))
    assert_same(model, expected)
    state.sync()
    plain = network(1)
    reference = KINDS[kind](plain.parameters())
    train(plain, reference, range(4))
    assert_same(model, plain)


def test_a_state_that_is_split_over_ranks_is_refused_by_name(world: World, hvd: Any) -> None:
    model = network(1)
    plain = KINDS["adam"](model.parameters())
    optimizer = DistributedOptimizer(plain, model, world=world, strategy="sharded", engine="mpi")
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)  # Nobody has any yet.
    train(model, optimizer, range(1))
    if world.size > 1:
        with pytest.raises(ConfigError, match=r"keeps a slice .* optimizer\.checkpoint\(\)"):
            hvd.broadcast_optimizer_state(optimizer, root_rank=0)
