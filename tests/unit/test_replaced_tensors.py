"""Tensors of a model that others put in the place of ours: followed where they fit, else named at the next step."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from hvdvae.ema import MovingAverage
from hvdvae.errors import ConfigError
from hvdvae.strategies import DistributedOptimizer, Strategy
from hvdvae.world import World


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())  # type: ignore[no-any-return]


def wrap(model: nn.Module, **options: object) -> Strategy:
    plain = torch.optim.Adam(model.parameters(), 0.05)
    return DistributedOptimizer(plain, model, world=World.alone(device="cpu"), **options)  # type: ignore[arg-type]


def x() -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, clear: str = "optimizer") -> None:
    for _ in range(steps):
        (optimizer if clear == "optimizer" else model).zero_grad()
        model(x()).square().mean().backward()
        optimizer.step()


def other_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}


STRATEGIES = [{"strategy": "local"}, {"strategy": "sharded"}, {"strategy": "sharded", "zero_stage": 2}]


@pytest.mark.parametrize("options", STRATEGIES)
@pytest.mark.parametrize("after_steps", [0, 2])
@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_an_assigned_state_dict_is_trained_on(options: dict[str, object], after_steps: int, clear: str) -> None:
    if options.get("zero_stage") == 2 and clear == "model":
        pytest.skip("the model's gradients are not the optimizer's there")
    model, copied = Net(), Net()
    optimizer, reference = wrap(model, **options), wrap(copied, **options)
    ours = dict(model.named_parameters())
    for one, its, assign in ((model, optimizer, True), (copied, reference, False)):
        train(one, its, after_steps, clear)
        one.load_state_dict(other_values(one), assign=assign)
        train(one, its, 3, clear)
    assert dict(model.named_parameters()).keys() == ours.keys()
    assert all(parameter is ours[name] for name, parameter in model.named_parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, copied.state_dict()[name]), name
    assert not torch.equal(model.first.weight, torch.full((4, 4), 0.25))


def test_what_is_assigned_between_zero_grad_and_backward_keeps_its_gradient() -> None:
    model, copied = Net(), Net()
    optimizer, reference = wrap(model), wrap(copied)
    for one, its, assign in ((model, optimizer, True), (copied, reference, False)):
        its.zero_grad()
        one.load_state_dict(other_values(one), assign=assign)
        one(x()).square().mean().backward()
        its.step()
    assert torch.equal(model.first.weight, copied.first.weight)
    model = Net()
    optimizer = wrap(model, strategy="sharded", zero_stage=2)
    optimizer.zero_grad()
    model.load_state_dict(other_values(model), assign=True)
    model(x()).square().mean().backward()
    with pytest.raises(ConfigError, match=r"'first\.weight' was replaced .* after zero_grad"):
        optimizer.step()


def tie(model: Net) -> None:
    model.second.weight = model.first.weight


def take_out(model: Net) -> None:
    model.second = nn.Identity()  # type: ignore[assignment]


def of_another_shape(model: Net) -> None:
    model.first.weight = nn.Parameter(torch.zeros(3, 4))


def directly(model: Net) -> None:
    model.first._parameters["weight"] = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))


def grown(model: Net) -> None:
    model.third = nn.Linear(4, 4)


def aliased(model: Net) -> None:
    model.second.weight.data = model.first.weight.data


def narrowed(model: Net) -> None:
    model.first.weight.data = model.first.weight.data[:3]


def halved(model: Net) -> None:
    model.half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: parametrizations.weight_norm(model.first), r"'first\.weight' was in the model .* not any more"),
        (tie, r"'second\.weight' was in the model .* not any more"),
        (take_out, r"'second\.weight' was in the model .* not any more"),
        (of_another_shape, r"'first\.weight' was torch\.float32 \(4, 4\) on cpu .* torch\.float32 \(3, 4\) on cpu"),
        (directly, r"'first\.weight' was torch\.float32 \(4, 4\) on cpu .* another now, torch\.float64"),
        (grown, r"'third\.weight' came into the model after"),
        (aliased, r"'second\.weight' was given the memory of another"),
        (narrowed, r"'first\.weight' was torch\.float32 \(4, 4\) on cpu .* \(3, 4\) on cpu now"),
        (halved, r"'first\.weight' was torch\.float32 .* is torch\.float16"),
    ],
)
def test_what_cannot_be_followed_is_named_at_the_next_step(change: Callable[[Net], object], message: str) -> None:
    model = Net()
    optimizer = wrap(model)
    train(model, optimizer)
    change(model)
    with pytest.raises(ConfigError, match=message):
        optimizer.step()


def test_tied_weights_stay_tied_where_both_are_assigned_alike_and_are_named_where_not() -> None:
    def tied() -> Net:
        model = Net()
        tie(model)
        return model

    model = tied()
    optimizer = wrap(model)
    model.load_state_dict(other_values(model), assign=True)
    train(model, optimizer)
    assert model.second.weight is model.first.weight
    model = tied()
    optimizer = wrap(model)
    values = other_values(model) | {"second.weight": torch.zeros(4, 4)}
    model.load_state_dict(values, assign=True)
    with pytest.raises(ConfigError, match=r"'first\.weight' is used in 2 places \(first\.weight, second\.weight\)"):
        optimizer.step()
    model = tied()
    optimizer = wrap(model)
    model.second.weight = nn.Parameter(model.first.weight.detach().clone())
    with pytest.raises(ConfigError, match=r"'second\.weight' came into the model"):
        optimizer.step()


@pytest.mark.parametrize("when", ["before", "after"])
def test_pruned_and_parametrized_weights_train_as_in_plain_torch(when: str) -> None:
    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.triu() + weight.triu(1).mT

    def change(model: Net) -> None:
        prune.l1_unstructured(model.first, "weight", 0.5)
        parametrize.register_parametrization(model.second, "weight", Symmetric())

    models = [Net(), Net()]
    for model, is_ours in zip(models, (True, False), strict=True):
        if when == "before":
            change(model)
        optimizer = wrap(model) if is_ours else torch.optim.Adam(model.parameters(), 0.05)
        if when == "after":
            change(model)
        train(model, optimizer, 5)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other)


def test_new_parameters_of_another_optimizer_or_of_nobody_are_left_alone() -> None:
    model = Net()
    optimizer = wrap(model)
    model.probe = nn.Linear(4, 2)
    probing = DistributedOptimizer(
        torch.optim.SGD(model.probe.parameters(), 0.1), model, world=World.alone(device="cpu")
    )
    model.fixed = nn.Parameter(torch.ones(2), requires_grad=False)
    train(model, optimizer)
    model.probe(x()).sum().backward()
    probing.step()


def test_a_transposed_or_swapped_weight_is_followed() -> None:
    models = [Net(), Net()]
    for model, is_ours in zip(models, (True, False), strict=True):
        optimizer = wrap(model) if is_ours else torch.optim.Adam(model.parameters(), 0.05)
        train(model, optimizer)
        model.first.weight.data = model.first.weight.data.t()
        torch.utils.swap_tensors(model.second.bias, nn.Parameter(torch.full((4,), 0.5)))
        train(model, optimizer)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other)


def test_a_buffer_is_assigned_what_it_can_hold_or_is_named() -> None:
    model = Net()
    model.register_buffer("mean", torch.zeros(2))
    optimizer = wrap(model)
    model.mean = torch.tensor([1, 2])
    model.count = torch.tensor(3, dtype=torch.int32)
    train(model, optimizer, 1)
    assert model.mean.tolist() == [1, 2]
    assert model.mean.dtype == torch.float32
    assert model.count.dtype == torch.int64
    model.count = torch.tensor(0.5)
    with pytest.raises(ConfigError, match=r"buffer 'count' of Net was torch\.int64 .* assigned torch\.float32"):
        optimizer.step()
    model.count = torch.tensor(1)
    model.mean = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"buffer 'mean' of Net was torch\.float32 .* assigned torch\.float64"):
        optimizer.zero_grad()


class Repacked(nn.Module):
    """As recurrent layers do on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data.clone()
        return x @ self.weight


def test_an_average_is_applied_to_weights_that_forward_moves() -> None:
    model = Repacked()
    optimizer = wrap(model)
    average = MovingAverage(optimizer.flat.parameters, 0.5, holder=optimizer.flat)
    train(model, optimizer)
    average.update()
    model(x())
    own = model.weight.detach().clone()
    with average.applied(), torch.no_grad():
        assert torch.equal(model.weight.flatten(), average.average)
        model(x())
    assert torch.equal(model.weight, own)
    model(x())
    with optimizer.fetched():
        model(x())
    assert torch.equal(model.weight, own)
    assert torch.equal(optimizer.flat.parameters.view(4, 4), own)
