"""What a user's loop sees of a wrapped model: stale graphs, replaced tensors, storages, under every strategy."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvdvae.strategies import DistributedOptimizer, Strategy
from hvdvae.world import World
from tests.parallel.regression import examples, loss_of, network, share, weights

WAYS: dict[str, dict[str, Any]] = {
    "local": {"strategy": "local"},
    "horovod": {"engine": "horovod"},
    "adasum": {"engine": "horovod", "reduce_op": "adasum"},
    "mpi": {"engine": "mpi"},
    "codec": {"engine": "mpi", "compression": "sign"},
    "sharded": {"strategy": "sharded", "engine": "mpi"},
    "zero 2": {"strategy": "sharded", "engine": "mpi", "zero_stage": 2},
    "local-sgd": {"strategy": "local-sgd", "sync_every": 3},
    "diloco": {"strategy": "diloco", "sync_every": 3},
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, world: World) -> dict[str, Any]:
    found = WAYS[request.param]
    if world.launcher == "horovodrun-gloo" and (found.get("engine") == "mpi" or "sync_every" in found):
        pytest.skip("horovodrun --gloo has no MPI")
    if request.param == "local" and world.size > 1:
        pytest.skip("one rank")
    if request.param == "adasum" and world.size & (world.size - 1):
        pytest.skip("a power of two")
    return found


def wrapped(world: World, model: nn.Module, way: dict[str, Any]) -> Strategy:
    return DistributedOptimizer(torch.optim.Adam(model.parameters(), 0.05), model, world=world, **way)


def loss(world: World, model: nn.Module) -> Tensor:
    return loss_of(model, *(tensor[share(world)] for tensor in examples()))


def train(world: World, model: nn.Module, optimizer: Strategy, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(world, model).backward()
        optimizer.step()


def test_a_graph_from_before_a_step_raises(world: World, way: dict[str, Any]) -> None:
    model = network(seed=100)
    before = loss(world, model)
    optimizer = wrapped(world, model, way)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()
    for _ in range(4):  # Over an average of weights.
        optimizer.zero_grad()
        stale = loss(world, model)
        loss(world, model).backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stale.backward()
    train(world, model, optimizer, 1)


def test_a_graph_from_before_weights_are_looked_at_raises_where_those_are_others(
    world: World, way: dict[str, Any]
) -> None:
    model = network(seed=100)
    optimizer = wrapped(world, model, way)
    train(world, model, optimizer, 1)
    optimizer.zero_grad()
    stale = loss(world, model)
    with optimizer.fetched(state=True):
        pass
    if way.get("sync_every"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stale.backward()
    else:
        stale.backward()
        optimizer.zero_grad()  # What is under way of it ends.


def test_what_is_assigned_is_trained_on_and_alike_on_all_ranks(world: World, way: dict[str, Any]) -> None:
    """A state_dict that is assigned trains as one that is copied; and forward may move weights meanwhile."""
    found = []
    for assign in (False, True):
        model = network(seed=100)
        optimizer = wrapped(world, model, way)
        train(world, model, optimizer, 2)
        if assign:
            model.register_forward_pre_hook(moved)
        values = {name: torch.full_like(value, 0.125) for name, value in model.state_dict().items()}
        model.load_state_dict(values, assign=assign)
        train(world, model, optimizer, 4)
        optimizer.finish()
        with optimizer.fetched():
            found.append(weights(model))
        assert len(set(world.gather_bytes(weights(model).numpy().tobytes()))) == 1
    assert torch.equal(found[0], found[1])


def moved(model: nn.Module, _: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def test_a_parameter_is_saved_alone_and_aligned(world: World, way: dict[str, Any]) -> None:
    model = network(seed=100)
    optimizer = wrapped(world, model, way)
    train(world, model, optimizer, 1)
    for parameter in model.parameters():
        assert parameter.data_ptr() % 64 == 0
        file = io.BytesIO()
        torch.save(parameter.detach(), file)
        assert len(file.getvalue()) < 2500
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
