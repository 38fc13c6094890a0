"""One fused step on vectors is the user's own optimizer's step on tensors, for every elementwise optimizer of torch."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.errors import CheckpointError, ConfigError
from hvdvae.strategies import DistributedOptimizer, Strategy
from hvdvae.strategies.flat_optimizer import ELEMENTWISE
from hvdvae.world import World

LR = {torch.optim.SGD: 0.05, torch.optim.Adadelta: 1.0, torch.optim.Rprop: 0.01}
OPTIONS: dict[type[Optimizer], dict[str, Any]] = {
    torch.optim.SGD: {"momentum": 0.9, "nesterov": True},
    torch.optim.RMSprop: {"momentum": 0.5, "centered": True},
    torch.optim.Adam: {"amsgrad": True},
    torch.optim.ASGD: {"t0": 2},
}


class Scaled(nn.Module):
    """Two layers and 0-dimensional parameters, one of them first."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.first = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.second = nn.Parameter(torch.randn(3, generator=generator))
        self.shift = nn.Parameter(torch.tensor(-0.2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.first) @ self.second * self.scale + self.shift


def optimizer_of(kind: type[Optimizer], model: Scaled, groups: str) -> Optimizer:
    lr = LR.get(kind, 0.02)
    options = {"lr": lr, **OPTIONS.get(kind, {})}
    if groups == "one group":
        return kind(model.parameters(), **options)
    decay = {} if kind is torch.optim.Rprop else {"weight_decay": 0.1}
    return kind(
        [
            {"params": [model.scale, model.shift], "lr": lr / 2},
            {"params": [model.second], **decay},
            {"params": [model.first]},
        ],
        **options,
    )


def train(model: nn.Module, optimizer: Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x.sum(1)).square().mean().backward()
        optimizer.step()


def wrapped(optimizer: Optimizer, model: nn.Module) -> Strategy:
    return DistributedOptimizer(optimizer, model, world=World.alone(), strategy="local")


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("groups", ["one group", "three groups"])
@pytest.mark.parametrize("kind", ELEMENTWISE, ids=lambda kind: kind.__name__)
def test_equals_torch_per_tensor(kind: type[Optimizer], groups: str) -> None:
    plain, flat = Scaled(), Scaled()
    strategy = wrapped(optimizer_of(kind, flat, groups), flat)
    assert len(strategy.inner.param_groups) == (1 if groups == "one group" else 3)
    assert all(len(group["params"]) == 1 for group in strategy.inner.param_groups), "not one vector a group"
    train(plain, optimizer_of(kind, plain, groups), 6)
    start = copy.deepcopy(flat)
    train(flat, strategy, 6)
    assert_same(flat, plain)
    moved = [bool((a != b).all()) for a, b in zip(flat.parameters(), start.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("groups", ["one group", "three groups"])
@pytest.mark.parametrize("kind", ELEMENTWISE, ids=lambda kind: kind.__name__)
def test_state_passes_through_torch_and_back(kind: type[Optimizer], groups: str) -> None:
    """flat -> state_dict -> plain torch -> flat again: each goes on as if nothing had been saved."""
    straight, model = Scaled(), Scaled()
    train(straight, optimizer_of(kind, straight, groups), 9)
    strategy = wrapped(optimizer_of(kind, model, groups), model)
    train(model, strategy, 3)
    state = copy.deepcopy(strategy.state_dict())
    plain = copy.deepcopy(model)
    optimizer = optimizer_of(kind, plain, groups)
    reference = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    assert [g["params"] for g in state["param_groups"]] == [g["params"] for g in reference["param_groups"]]
    train(plain, optimizer, 3, first=3)
    again = copy.deepcopy(plain)
    fresh = wrapped(optimizer_of(kind, again, groups), again)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(again, fresh, 3, first=6)
    assert_same(again, straight)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.NAdam, torch.optim.ASGD])
def test_state_entries_have_the_parameters_shapes(kind: type[Optimizer]) -> None:
    plain, model = Scaled(), Scaled()
    optimizer = optimizer_of(kind, plain, "one group")
    train(plain, optimizer, 2)
    strategy = wrapped(optimizer_of(kind, model, "one group"), model)
    train(model, strategy, 2)
    expected, found = optimizer.state_dict()["state"], strategy.state_dict()["state"]
    assert found.keys() == expected.keys()
    for number, entries in expected.items():
        assert found[number].keys() == entries.keys()
        for key, value in entries.items():
            assert torch.as_tensor(found[number][key]).shape == torch.as_tensor(value).shape, (number, key)
            torch.testing.assert_close(torch.as_tensor(found[number][key]), torch.as_tensor(value))


def test_parameters_that_never_had_a_gradient_count_as_zeros() -> None:
    """State of a plain optimizer, in which an unused parameter has none, goes on in the flat one."""
    plain = Scaled()
    plain.register_parameter("unused", nn.Parameter(torch.ones(2, 2)))
    optimizer = torch.optim.Adam(plain.parameters(), 0.02)
    train(plain, optimizer, 3)
    model = copy.deepcopy(plain)
    fresh = torch.optim.Adam(model.parameters(), 0.02)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.warns(UserWarning, match="'unused' has taken no step"):
        strategy = wrapped(fresh, model)
    train(plain, optimizer, 3, first=3)
    train(model, strategy, 3, first=3)
    assert_same(model, plain)


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.NAdam, torch.optim.Rprop], ids=lambda kind: kind.__name__
)
def test_parameters_with_other_numbers_of_steps_are_refused(kind: type[torch.optim.Optimizer]) -> None:
    """One vector has one count; groups of their own are exact."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))

    def step(optimizer: torch.optim.Optimizer, *used: nn.Module) -> None:
        optimizer.zero_grad()
        sum(parameter.square().sum() for module in used for parameter in module.parameters()).backward()
        optimizer.step()

    mixed = kind(model.parameters(), lr=0.01)  # type: ignore[call-arg]
    step(mixed, model[0])
    step(mixed, model[0], model[1])
    with pytest.raises(CheckpointError, match=r"'1.weight' has taken other steps than '0.weight'.*a group of its own"):
        wrapped(mixed, model)
    apart = kind([{"params": part.parameters()} for part in model], lr=0.01)  # type: ignore[call-arg]
    step(apart, model[0])
    step(apart, model[0], model[1])
    plain = copy.deepcopy(model)
    other = kind([{"params": part.parameters()} for part in plain], lr=0.01)  # type: ignore[call-arg]
    other.load_state_dict(copy.deepcopy(apart.state_dict()))
    strategy = wrapped(apart, model)
    for _ in range(3):
        step(other, plain[0], plain[1])
        step(strategy, model[0], model[1])
    assert_same(model, plain)


def test_state_of_another_model_is_refused() -> None:
    model, other = Scaled(), nn.Linear(2, 2)
    strategy = wrapped(torch.optim.Adam(model.parameters()), model)
    foreign = torch.optim.Adam(other.parameters()).state_dict()
    with pytest.raises(CheckpointError, match=r"groups of \[2\].*\[4\]"):
        strategy.load_state_dict(foreign)


def test_state_of_other_shapes_is_refused() -> None:
    """It would be written past its end by the fused kernel."""
    model = nn.Linear(3, 2)
    strategy = wrapped(torch.optim.Adam(model.parameters()), model)
    for other in (nn.Linear(2, 3), nn.Linear(30, 20)):
        foreign = torch.optim.Adam(other.parameters())
        other(torch.ones(1, other.in_features)).sum().backward()
        foreign.step()
        with pytest.raises(CheckpointError, match=r"shape .*for a parameter of shape \(2, 3\)"):
            strategy.load_state_dict(foreign.state_dict())


def test_groups_cannot_be_added_once_wrapped() -> None:
    model = Scaled()
    strategy = wrapped(torch.optim.Adam([model.first]), model)
    with pytest.raises(ConfigError, match="add all groups first"):
        strategy.add_param_group({"params": [model.second]})


@pytest.mark.parametrize("choice", [{"foreach": True}, {"fused": False}])
def test_a_chosen_implementation_is_kept(choice: dict[str, bool]) -> None:
    model = Scaled()
    strategy = wrapped(torch.optim.Adam(model.parameters(), **choice), model)  # type: ignore[arg-type]
    for key, value in choice.items():
        assert strategy.inner.param_groups[0][key] == value
    assert not strategy.inner.param_groups[0].get("fused")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"backward_passes_per_step": 0}, "backward_passes_per_step is 0"), ({"clip_norm": 0.0}, "--clip-norm")],
)
def test_impossible_options_are_refused(options: dict[str, Any], words: str) -> None:
    model = Scaled()
    with pytest.raises(ConfigError, match=words):
        DistributedOptimizer(
            torch.optim.Adam(model.parameters()), model, world=World.alone(), strategy="local", **options
        )


def test_a_step_that_is_to_be_differentiated_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="Adam has differentiable=True"):
        wrapped(torch.optim.Adam(model.parameters(), differentiable=True), model)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_optimizers_that_need_more_than_a_mean_gradient_are_refused(kind: type[Optimizer]) -> None:
    model = Scaled()
    with pytest.raises(ConfigError, match=kind.__name__):
        DistributedOptimizer(kind(model.parameters()), model, world=World.alone(), strategy="local")  # type: ignore[arg-type]


def test_a_sparse_gradient_counts_as_a_dense_one() -> None:
    results = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Embedding(6, 3, sparse=sparse)
        optimizer = wrapped(torch.optim.SGD(model.parameters(), 0.5), model)
        model(torch.tensor([1, 4, 1])).square().sum().backward()
        optimizer.step()
        results.append(model.weight.detach().clone())
    assert torch.equal(*results)


def test_what_an_optimizer_has_at_its_start_is_not_kept_twice() -> None:
    model = Scaled()
    plain = torch.optim.Adagrad(model.parameters(), 0.1, initial_accumulator_value=0.5)
    assert plain.state, "Adagrad's is there before the first step"
    optimizer = DistributedOptimizer(plain, model, world=World.alone(), strategy="local")
    (kept,) = (entries["sum"] for entries in optimizer.inner.state.values())
    for entries in plain.state.values():
        assert 0 <= entries["sum"].data_ptr() - kept.data_ptr() < kept.nbytes
    state = optimizer.state_dict()["state"]
    assert all(bool((state[number]["sum"] == 0.5).all()) for number in range(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_stepped_whole(dtype: torch.dtype) -> None:
    model = nn.Linear(20, 20).to(dtype)
    before = model.weight.detach().clone()
    optimizer = wrapped(torch.optim.SGD(model.parameters(), lr=1.0), model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert bool((model.weight != before).all())


@pytest.mark.parametrize("strategy", ["local", "sharded", "allreduce"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.NAdam, torch.optim.ASGD, torch.optim.RAdam])
def test_counts_that_are_plain_numbers_load(kind: type[Optimizer], strategy: str) -> None:
    """As torch saved them before 1.12, or as somebody makes them by hand."""
    plain, model = Scaled(), Scaled()
    optimizer = kind(plain.parameters(), lr=0.01)  # type: ignore[call-arg]
    train(plain, optimizer, 2)
    old = copy.deepcopy(optimizer.state_dict())
    for entries in old["state"].values():
        for key in ("step", "mu_product", "eta", "mu"):
            if key in entries:
                entries[key] = entries[key].item()
    model.load_state_dict(plain.state_dict())
    own = kind(model.parameters(), lr=0.01)  # type: ignore[call-arg]
    ours = DistributedOptimizer(own, model, world=World.alone(), strategy=strategy)
    ours.load_state_dict(old)
    train(plain, optimizer, 2, first=2)
    train(model, ours, 2, first=2)
    assert_same(model, plain)
