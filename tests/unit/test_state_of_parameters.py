"""State, copies and hooks of a wrapped optimizer are those of a plain one, or refused by name."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.errors import CheckpointError, ConfigError, CopyError
from hvdvae.strategies import DistributedOptimizer, Strategy
from hvdvae.world import World

WORLD = World.alone(device="cpu")
KINDS: dict[str, Callable[..., Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "nadam": lambda p: torch.optim.NAdam(p, 0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.1),
}


def network() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
    model[0].bias.requires_grad_(False)
    return model


def wrap(optimizer: Optimizer, model: nn.Module, strategy: str = "local") -> Strategy:
    return DistributedOptimizer(optimizer, model, world=WORLD, strategy=strategy)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for number in steps:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()


def pair(kind: str, steps: int, strategy: str = "local") -> tuple[nn.Module, Optimizer, nn.Module, Strategy, Optimizer]:
    plain, model = network(), network()
    reference, own = KINDS[kind](plain.parameters()), KINDS[kind](model.parameters())
    optimizer = wrap(own, model, strategy)
    train(plain, reference, range(steps))
    train(model, optimizer, range(steps))
    return plain, reference, model, optimizer, own


def assert_same_state(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for key, entries in expected.items():
        assert list(found[key]) == list(entries)
        for name, value in entries.items():
            torch.testing.assert_close(found[key][name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["local", "sharded"])
@pytest.mark.parametrize("kind", KINDS)
def test_state_is_read_by_parameter(kind: str, strategy: str) -> None:
    if kind == "adafactor" and strategy == "sharded":
        pytest.skip("sharded is for elementwise optimizers")
    plain, reference, model, optimizer, own = pair(kind, 3, strategy)
    names = dict(model.named_parameters())
    for seen in (optimizer, own):  # The one that was wrapped shows the same.
        assert len(seen.state) == len(reference.state)
        for name, parameter in plain.named_parameters():
            assert (names[name] in seen.state) == (parameter in reference.state), name
            for key, value in reference.state.get(parameter, {}).items():
                torch.testing.assert_close(seen.state[names[name]][key], value, atol=1e-6, rtol=1e-5)
        assert_same_state(seen.state_dict()["state"], reference.state_dict()["state"])
    before = {key: value.clone() for key, value in optimizer.state[names["2.weight"]].items()}
    train(model, optimizer, range(3, 4))
    for key, value in optimizer.state[names["2.weight"]].items():
        assert not torch.equal(value, before[key]), "and as it is now"


def test_state_is_written_in_place_and_cleared() -> None:
    plain, reference, model, optimizer, _ = pair("adam", 3)
    for parameters, stepped in ((plain, reference), (model, optimizer)):
        state = stepped.state[parameters.get_parameter("2.weight")]
        state["exp_avg"].mul_(0.5)
        state["exp_avg_sq"] = torch.full_like(state["exp_avg_sq"], 0.01)
        for entries in stepped.state.values():  # As loops do that move state to another device.
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    entries[key] = value.to("cpu")
        for parameter in stepped.state:
            stepped.state[parameter]["step"].fill_(7)
        train(parameters, stepped, range(3, 5))
    torch.testing.assert_close(model[2].weight, plain[2].weight)
    assert float(optimizer.state[model[2].weight]["step"]) == 9
    with pytest.raises(ConfigError, match="part of a vector"):
        optimizer.state[model[2].weight]["other"] = 3
    optimizer.state[model[2].weight]["step"].fill_(1)
    with pytest.raises(CheckpointError, match="different counts of steps"):
        train(model, optimizer, range(5, 6))
    optimizer.state.clear()
    assert not optimizer.state
    reference.state.clear()
    model.load_state_dict(plain.state_dict())
    train(plain, reference, range(5, 7))
    train(model, optimizer, range(5, 7))
    torch.testing.assert_close(model[2].weight, plain[2].weight)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_into_the_wrapped_one_counts(kind: str) -> None:
    plain, reference, *_ = pair(kind, 3)
    model = network()
    own = KINDS[kind](model.parameters())
    optimizer = wrap(own, model)
    train(model, optimizer, range(8, 10))
    model.load_state_dict(plain.state_dict())
    saved = copy.deepcopy(reference.state_dict())
    saved["param_groups"][0]["lr"] = reference.param_groups[0]["lr"] = 0.03
    own.load_state_dict(saved)
    train(plain, reference, range(3, 6))
    train(model, optimizer, range(3, 6))
    assert optimizer.param_groups[0]["lr"] == own.param_groups[0]["lr"] == 0.03
    torch.testing.assert_close(model[2].weight, plain[2].weight)


def test_copies_are_refused_and_those_of_the_model_and_the_wrapped_one_right() -> None:
    _, _, model, optimizer, own = pair("adam", 3)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps, lambda o: torch.save(o, io.BytesIO())):
        with pytest.raises(CopyError, match=r"save optimizer\.checkpoint\(\)"):
            attempt(optimizer)
        with pytest.raises(TypeError):
            attempt(torch.optim.lr_scheduler.StepLR(optimizer, 1) if attempt is not copy.copy else optimizer)
    twin = copy.deepcopy(model)
    assert twin[2].weight.untyped_storage().nbytes() == twin[2].weight.nbytes
    train(model, optimizer, range(3, 4))
    assert not torch.equal(twin[2].weight, model[2].weight)
    file = io.BytesIO()
    torch.save(own.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_same_state(loaded["state"], optimizer.state_dict()["state"])
    both, other = copy.deepcopy((model, own))
    assert_same_state(other.state_dict()["state"], own.state_dict()["state"])
    assert other.param_groups[0]["params"][0] is next(both.parameters())
    train(both, other, range(4, 5))
    train(model, optimizer, range(4, 5))
    torch.testing.assert_close(both[2].weight, model[2].weight)


@pytest.mark.parametrize("kind", ["adam", "adafactor"])
@pytest.mark.parametrize("registered", ["before", "after", "with the wrapper"])
def test_hooks_of_saving_and_loading_run_as_in_torch(kind: str, registered: str) -> None:
    called: list[str] = []
    model = network()
    own = KINDS[kind](model.parameters())
    optimizer = wrap(own, model) if registered != "before" else None
    to: Optimizer = optimizer if registered == "with the wrapper" and optimizer is not None else own

    def saved(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        called.append("after saving")
        return {**state, "mine": 3}

    def loads(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        called.append(f"before loading {state.pop('mine')}")
        state["param_groups"] = [{**group, "lr": 0.5} for group in state["param_groups"]]
        return state

    to.register_state_dict_pre_hook(lambda optimizer: called.append("before saving"))
    to.register_state_dict_post_hook(saved)
    to.register_load_state_dict_pre_hook(loads)
    to.register_load_state_dict_post_hook(lambda optimizer: called.append("after loading"))
    optimizer = optimizer or wrap(own, model)
    train(model, optimizer, range(2))
    called.clear()
    state = optimizer.state_dict()
    assert called == ["before saving", "after saving"]
    assert state["mine"] == 3
    optimizer.load_state_dict(state)
    assert called[2:] == ["before loading 3", "after loading"]
    assert state["mine"] == 3, "what the user has is left alone"
    assert optimizer.param_groups[0]["lr"] == 0.5
    called.clear()
    optimizer.checkpoint()
    assert not called, "a checkpoint is no state_dict"


def test_state_dict_has_what_a_strategy_remembers() -> None:
    """Each rank's own; with it a run of one rank goes on as it would have."""

    def build() -> tuple[nn.Module, Strategy]:
        model = network()
        plain = torch.optim.SGD(model.parameters(), 0.1)
        return model, DistributedOptimizer(plain, model, world=WORLD, strategy="diloco", sync_every=4)

    model, optimizer = build()
    train(model, optimizer, range(6))
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    again, resumed = build()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(model, optimizer, range(6, 10))
    train(again, resumed, range(6, 10))
    assert torch.equal(model[2].weight, again[2].weight)
    plain = network()
    torch.optim.SGD(plain.parameters(), 0.1).load_state_dict(state)
    with pytest.warns(UserWarning, match="is of another strategy"):
        wrap(torch.optim.SGD(plain.parameters(), 0.1), plain).load_state_dict(state)
