"""An optimizer that is wrapped again carries on: with its state, and its gradients divided once."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from hvdvae.errors import ConfigError
from hvdvae.strategies import DistributedOptimizer, Strategy
from hvdvae.world import World
from tests.parallel.test_own_loop_checkpoint import CASES, assert_same, network, train

ANEW = [name for name in CASES if name != "bf16"]


@pytest.fixture(params=ANEW)
def case(request: pytest.FixtureRequest, world: World) -> dict[str, Any]:
    chosen = CASES[request.param]
    if chosen["strategy"] == "local" and world.size > 1:
        pytest.skip("local is of one process")
    if chosen.get("engine") == "horovod" and world.launcher != "none":
        pytest.importorskip("horovod.torch")
    if world.launcher == "horovodrun-gloo" and (chosen.get("engine") == "mpi" or "reduce_op" in chosen):
        pytest.skip("horovodrun --gloo has no MPI, and Gloo no Adasum")
    return chosen


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), 0.02)


@pytest.mark.parametrize("given", ["the plain one", "the wrapper"])
def test_wrapped_again_it_goes_on(world: World, case: dict[str, Any], given: str) -> None:
    """As a notebook's cell does that runs twice. The reference saves there, as both make what ranks have one."""
    model, straight = network(40 + world.rank, statistics=True), network(40 + world.rank, statistics=True)
    plain, reference = adam(model), DistributedOptimizer(adam(straight), straight, world=world, **case)
    schedule = torch.optim.lr_scheduler.StepLR(plain, 1, 0.9)
    first = DistributedOptimizer(plain, model, world=world, **case)
    train(world, model, first, range(3))
    train(world, straight, reference, range(3))
    schedule.step()
    with reference.saving():
        pass
    reference.param_groups[0]["lr"] *= 0.9
    found = DistributedOptimizer(plain if given == "the plain one" else first, model, **{**case, "world": world})
    assert found.wrapped is plain
    train(world, model, found, range(3, 7))
    train(world, straight, reference, range(3, 7))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, straight.state_dict()[name]), name
    assert_same(found.checkpoint(), _without_schedule(reference, found))
    with pytest.raises(ConfigError, match="wrapped anew since"):
        first.step()
    with pytest.raises(ConfigError, match="step what DistributedOptimizer returned"):
        plain.step()


def _without_schedule(reference: Strategy, found: Strategy) -> dict[str, Any] | None:
    """A scheduler writes `initial_lr` into the groups."""
    state = reference.checkpoint()
    if state is not None:
        state["optimizer"]["param_groups"][0]["initial_lr"] = found.param_groups[0]["initial_lr"]
    return state


def test_what_was_unfrozen_is_trained_and_the_rest_goes_on(world: World) -> None:
    case = {"strategy": "local"} if world.size == 1 else CASES["horovod"]
    model = network(40)
    model[0].requires_grad_(False)  # type: ignore[operator, index]
    plain = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer = DistributedOptimizer(plain, model, world=world, **case)
    train(world, model, optimizer, range(3))
    kept = {name: value.clone() for name, value in optimizer.state[model[3].weight].items()}  # type: ignore[index]
    frozen = model[0].weight.clone()  # type: ignore[index, union-attr]
    model[0].requires_grad_(True)  # type: ignore[operator, index]
    with pytest.raises(ConfigError, match="wrap anew"):
        train(world, model, optimizer, range(3, 4))
    found = DistributedOptimizer(plain, model, world=world, **case)
    for name, value in found.state[model[3].weight].items():  # type: ignore[index]
        assert torch.equal(value, kept[name])
    train(world, model, found, range(3, 5))
    assert not torch.equal(model[0].weight, frozen)  # type: ignore[index, union-attr]


def test_what_cannot_be_wrapped_again_is_named(world: World) -> None:
    if world.launcher == "horovodrun-gloo":
        pytest.skip("horovodrun --gloo has no MPI")
    model = network(40, statistics=False)
    optimizer = DistributedOptimizer(adam(model), model, world=world, **CASES["bf16"])
    with pytest.raises(ConfigError, match="wrapped already, and its model's weights are bf16 now"):
        DistributedOptimizer(optimizer, model, world=world, **CASES["bf16"])
    train(world, model, optimizer, range(1))


@pytest.mark.parametrize("kind", [torch.optim.Muon, torch.optim.Adafactor, torch.optim.SGD])
def test_a_wrap_that_fails_leaves_the_former_as_it_was(world: World, kind: type[Optimizer]) -> None:
    case = {"strategy": "local"} if world.size == 1 else CASES["horovod"]
    torch.manual_seed(1)
    model, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
    plain = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    schedule = torch.optim.lr_scheduler.StepLR(plain, 1, 0.5)
    optimizer = DistributedOptimizer(plain, model, world=world, **case)
    later = torch.optim.lr_scheduler.StepLR(plain, 1, 0.5)
    for _ in range(2):
        with pytest.raises(ConfigError, match="not in the model"):
            DistributedOptimizer(plain, other, world=world, **case)
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        schedule.step()
        later.step()
    with pytest.raises(ConfigError, match="it would train this rank alone"):
        plain.step()
