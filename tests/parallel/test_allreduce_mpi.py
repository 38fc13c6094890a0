"""Engine mpi in its three ways: each rank its slice in shared memory, all of the vector there, and by messages."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from hvdvae.strategies import DistributedOptimizer, Strategy
from hvdvae.strategies.allreduce_mpi import MpiAllreduce
from hvdvae.strategies.allreduce_shared import SharedAllreduce
from hvdvae.world import World
from tests.parallel.regression import OPTIMIZERS, examples, loss_of, network, share, weights
from tests.parallel.test_allreduce import EVERY, parallel, plain


@pytest.fixture(params=["slices", "whole", "messages"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, world: World) -> str:
    """What a host with shared memory does, one whose ranks may die, and several hosts."""
    if world.launcher == "horovodrun-gloo":
        pytest.skip("horovodrun --gloo has no MPI")
    if request.param == "whole":
        monkeypatch.setattr("hvdvae.strategies.allreduce_shared.can_share", lambda *_: False)
    if request.param == "messages":
        monkeypatch.setattr(World, "shares_memory", lambda *_: False)
    return str(request.param)


def wrapped(world: World, optimizer: Optimizer, model: nn.Module) -> Strategy:
    return DistributedOptimizer(optimizer, model, world=world, engine="mpi")


def steps(world: World, model: nn.Module, optimizer: Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model, *(tensor[share(world)] for tensor in examples())).backward()
        optimizer.step()


def test_each_way_is_taken(world: World, way: str) -> None:
    model = network(seed=100)
    kind = type(wrapped(world, OPTIMIZERS["adam"](model.parameters()), model))
    slices = way == "slices" and world.size > 1 and not world.survives_deaths
    assert kind is (SharedAllreduce if slices else MpiAllreduce)


@pytest.mark.parametrize("name", EVERY)
def test_equals_one_process_with_the_whole_batch(world: World, way: str, name: str) -> None:
    found = parallel(world, "mpi", EVERY[name])
    torch.testing.assert_close(found, plain(EVERY[name]), atol=2e-6, rtol=2e-5)
    assert len(set(world.gather_bytes(found.numpy().tobytes()))) == 1, "the same bits on all ranks"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_rank_has_the_whole_state(world: World, way: str, name: str) -> None:
    """Whoever asks has it, without the others; and it is a copy that a later step leaves alone, once copied."""
    model, reference = network(seed=100), network(seed=100)
    optimizer = wrapped(world, OPTIMIZERS[name](model.parameters()), model)
    steps(world, model, optimizer, 3)
    expected = OPTIMIZERS[name](reference.parameters())
    for _ in range(3):
        expected.zero_grad()
        loss_of(reference, *examples()).backward()
        expected.step()
    if world.rank == world.size - 1:  # Alone.
        state = copy.deepcopy(optimizer.state_dict()["state"])
        for number, entries in expected.state_dict()["state"].items():
            for key, value in entries.items():
                torch.testing.assert_close(
                    torch.as_tensor(state[number][key]), torch.as_tensor(value), check_dtype=False
                )
    world.barrier()


def test_a_state_that_is_loaded_amid_a_run_counts(world: World, way: str) -> None:
    model = network(seed=100)
    optimizer = wrapped(world, OPTIMIZERS["adam"](model.parameters()), model)
    steps(world, model, optimizer, 2)
    kept, state = weights(model), copy.deepcopy(optimizer.state_dict())
    steps(world, model, optimizer, 3)
    expected = weights(model)
    with torch.no_grad():
        optimizer.flat.layout.runs.spread(kept, optimizer.flat.parameters)
    optimizer.load_state_dict(state)
    steps(world, model, optimizer, 3)
    assert torch.equal(weights(model), expected)
    reread = optimizer.state_dict()["state"][0]
    assert int(reread["step"]) == 5
    assert not torch.equal(reread["exp_avg"], state["state"][0]["exp_avg"])


def test_entries_that_come_later(world: World, way: str) -> None:
    """Momentum that is switched on amid a run makes a vector that was not there at the first step."""
    model, reference = network(seed=100), network(seed=100)
    optimizer = wrapped(world, torch.optim.SGD(model.parameters(), 0.1), model)
    expected = torch.optim.SGD(reference.parameters(), 0.1)
    for momentum in (0.0, 0.9):
        optimizer.param_groups[0]["momentum"] = expected.param_groups[0]["momentum"] = momentum
        steps(world, model, optimizer, 3)
        for _ in range(3):
            expected.zero_grad()
            loss_of(reference, *examples()).backward()
            expected.step()
    torch.testing.assert_close(weights(model), weights(reference), atol=2e-6, rtol=2e-5)
    found = optimizer.state_dict()["state"][0]["momentum_buffer"]
    torch.testing.assert_close(found, expected.state_dict()["state"][0]["momentum_buffer"], atol=2e-6, rtol=2e-5)
