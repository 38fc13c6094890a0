"""What holds of every optimizer of torch.optim holds when it is wrapped, for every way of training in step.

The reference is always the plain torch optimizer on the mean of all ranks' losses. The model has what optimizers trip
over: a number, a tensor without elements, channels that come last, and two groups.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import SWALR, AveragedModel

from hvdvae.strategies import DistributedOptimizer
from hvdvae.world import World

Options = dict[str, Any]
STEPS = 4

ELEMENTWISE: dict[type[Optimizer], list[Options]] = {
    torch.optim.SGD: [
        {"lr": 0.05},
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.5},
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"lr": 0.05, "maximize": True, "weight_decay": 0.1},
        {"lr": torch.tensor(0.05)},
        {"lr": 0.05, "momentum": 0.9, "foreach": True},
        {"lr": 0.05, "fused": True},
    ],
    torch.optim.Adam: [
        {},
        {"lr": 0.01, "amsgrad": True},
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": torch.tensor(0.01)},
        {"lr": 0.01, "foreach": True},
        {"lr": 0.01, "betas": (0.5, 0.6), "eps": 1e-3},
    ],
    torch.optim.AdamW: [{}, {"lr": 0.01, "amsgrad": True}, {"lr": 0.01, "fused": True, "maximize": True}],
    torch.optim.RMSprop: [{}, {"centered": True, "momentum": 0.5, "weight_decay": 0.1}, {"maximize": True}],
    torch.optim.Adagrad: [
        {},
        {"initial_accumulator_value": 0.1, "lr_decay": 0.5},
        {"weight_decay": 0.1, "maximize": True},
        {"fused": True},
    ],
    torch.optim.Adadelta: [{}, {"weight_decay": 0.1, "maximize": True}, {"foreach": True}],
    torch.optim.Adamax: [{}, {"weight_decay": 0.1, "maximize": True}, {"foreach": True}],
    torch.optim.NAdam: [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True, "momentum_decay": 6e-3}],
    torch.optim.RAdam: [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}],
    torch.optim.ASGD: [{}, {"t0": 3, "lambd": 0.1}, {"weight_decay": 0.1, "maximize": True}],
    torch.optim.Rprop: [{}, {"etas": (0.6, 1.2), "step_sizes": (1e-3, 1.0)}, {"maximize": True}],
}
WHOLE: dict[type[Optimizer], list[Options]] = {
    torch.optim.Adafactor: [{}, {"weight_decay": 0.1, "beta2_decay": -0.5}, {"maximize": True}],
    torch.optim.Muon: [{}, {"lr": 0.01, "weight_decay": 0.1, "nesterov": False}],
}
"""Optimizers that look at whole tensors; `sharded` refuses them by name."""

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "constant": lr_scheduler.ConstantLR,
    "linear": lr_scheduler.LinearLR,
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "polynomial": lr_scheduler.PolynomialLR,
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "cyclic, of momentum too": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "one cycle, of momentum too": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "swa": lambda o: SWALR(o, 0.05),
}

WAYS: dict[str, Options] = {
    "local": {"strategy": "local"},
    "allreduce": {"strategy": "allreduce"},
    "sharded": {"strategy": "sharded"},
    "sharded-2": {"strategy": "sharded", "zero_stage": 2},
}


class Net(nn.Module):
    """Outputs (N, 2) of inputs (N, 4)."""

    def __init__(self, kind: type[Optimizer]) -> None:
        super().__init__()
        matrices_alone = kind is torch.optim.Muon
        self.first, self.second = (nn.Linear(4, 3, bias=not matrices_alone), nn.Linear(3, 2, bias=not matrices_alone))
        self.scale: Tensor = torch.ones(())
        self.nothing: Tensor = torch.zeros(0, 3)
        self.image: Tensor = torch.zeros(2, 3, 2, 2)
        if not matrices_alone:
            self.scale = nn.Parameter(torch.tensor(1.0))
            self.image = nn.Parameter(torch.randn(2, 3, 2, 2).contiguous(memory_format=torch.channels_last))
            if kind is not torch.optim.Adafactor:  # Its own step divides by the number of elements.
                self.nothing = nn.Parameter(self.nothing)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return (
            self.second(hidden.tanh()) * self.scale
            + self.nothing.sum()
            + torch.einsum("nc,dcij->nd", hidden, self.image)
        )


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    """Bounded, so that optimizers that maximize it do not run away; each rank has its own data."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1000 * rank + step))
    return (model(x) - 1).tanh().square().mean()


class Pair:
    """The same model twice: trained by a wrapped optimizer on all ranks, and by the plain one alone."""

    def __init__(self, world: World, way: Options, kind: type[Optimizer], options: Options) -> None:
        torch.manual_seed(0)
        self.world = world
        self.model = Net(kind)
        self.reference = copy.deepcopy(self.model)
        self.inner = self._build(kind, self.model, options)
        self.wrapped = DistributedOptimizer(self.inner, self.model, world=world, **way)
        self.plain = self._build(kind, self.reference, options)

    @staticmethod
    def _build(kind: type[Optimizer], model: nn.Module, options: Options) -> Optimizer:
        parameters = [*model.parameters()]
        half = len(parameters) // 2
        groups = [{"params": parameters[:half]}, {"params": parameters[half:], "weight_decay": 0.01}]
        return kind(groups, **copy.deepcopy(options))  # type: ignore[call-arg, arg-type]

    def step(self, number: int) -> None:
        """Both take one on the mean of all ranks' losses."""
        self.wrapped.zero_grad()
        loss_of(self.model, number, self.world.rank).backward()
        self.wrapped.step()
        self.plain.zero_grad()
        losses = [loss_of(self.reference, number, rank) for rank in range(self.world.size)]
        torch.stack(losses).mean().backward()
        self.plain.step()

    def assert_equal(self) -> None:
        for (name, mine), reference in zip(self.model.named_parameters(), self.reference.parameters(), strict=True):
            torch.testing.assert_close(mine, reference, atol=2e-5, rtol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, world: World, engine: str) -> Options:
    """Every way of training in step, with every engine."""
    if request.param == "local":
        if world.size > 1 or engine == "horovod":
            pytest.skip("one process has no engine")
        return WAYS["local"]
    return {**WAYS[request.param], "engine": engine}


def kinds(way: Options) -> dict[type[Optimizer], list[Options]]:
    return ELEMENTWISE if way["strategy"] == "sharded" else ELEMENTWISE | WHOLE


def test_steps_are_those_of_the_plain_optimizer(world: World, way: Options) -> None:
    """All optimizers, with each option that changes what a step is, and a rate that changes on the way."""
    for kind, several in kinds(way).items():
        for options in several:
            pair = Pair(world, way, kind, options)
            for number in range(STEPS):
                pair.step(number)
                if number == 2:
                    for optimizer in (pair.wrapped, pair.plain):
                        optimizer.param_groups[0]["lr"] *= 0.5
            pair.assert_equal()


def test_schedulers_act_as_on_the_plain_optimizer(world: World, way: Options) -> None:
    """Whether they are built on the wrapped optimizer, or on the plain one before it is wrapped."""
    for number, build in enumerate(SCHEDULERS.values()):
        pair = Pair(world, way, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Schedulers in schedulers warn of each other.
            mine, reference = build(pair.inner if number % 2 else pair.wrapped), build(pair.plain)
            for step in range(4):
                pair.step(step)
                mine.step()
                reference.step()
        pair.assert_equal()
        assert mine.get_last_lr() == reference.get_last_lr()


def test_options_that_change_on_the_way_count(world: World, way: Options) -> None:
    pair = Pair(world, way, torch.optim.AdamW, {"lr": 0.1})
    for number in range(STEPS):
        if number == 2:
            for optimizer in (pair.wrapped, pair.plain):
                optimizer.param_groups[0].update(betas=(0.5, 0.9), weight_decay=0.3, eps=1e-3)
                optimizer.param_groups[1].update(maximize=True)
        pair.step(number)
    pair.assert_equal()


def test_hooks_are_called_once_each(world: World, way: Options) -> None:
    pair = Pair(world, way, torch.optim.Adam, {})
    calls: list[str] = []
    pair.inner.register_step_pre_hook(lambda *_: calls.append("pre of the plain one"))
    pair.wrapped.register_step_pre_hook(lambda optimizer, *_: calls.append(f"pre, {optimizer is pair.wrapped}"))
    pair.wrapped.register_step_post_hook(lambda *_: calls.append("post"))
    everywhere = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    loss_of(pair.model, 0, world.rank).backward()
    pair.wrapped.step()
    everywhere.remove()
    assert sorted(calls) == ["global", "post", "pre of the plain one", "pre, True"]


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned(world: World, way: Options) -> None:
    pair = Pair(world, way, torch.optim.SGD, {"lr": 0.05})

    def evaluate() -> Tensor:
        pair.wrapped.zero_grad()
        loss = loss_of(pair.model, 0, world.rank)
        loss.backward()
        return loss

    expected = loss_of(pair.reference, 0, world.rank).item()
    loss = pair.wrapped.step(evaluate)
    assert isinstance(loss, Tensor)
    assert loss.item() == pytest.approx(expected)
    assert any(not torch.equal(a, b) for a, b in zip(pair.model.parameters(), pair.reference.parameters(), strict=True))


def test_it_is_a_torch_optimizer(world: World, way: Options) -> None:
    """As schedulers, averages of weights, and people who print it, look at it."""
    pair = Pair(world, way, torch.optim.SGD, {"lr": 0.05})
    assert isinstance(pair.wrapped, Optimizer)
    assert "lr: 0.05" in repr(pair.wrapped)
    assert pair.wrapped.defaults["lr"] == 0.05
    assert [len(group["params"]) for group in pair.wrapped.param_groups] == [3, 4]
    average, reference = AveragedModel(pair.model), AveragedModel(pair.reference)
    for number in range(3):
        pair.step(number)
        average.update_parameters(pair.model)
        reference.update_parameters(pair.reference)
    for mine, other in zip(average.module.parameters(), reference.module.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)


def test_names_that_the_optimizer_was_given_stay(world: World, way: Options) -> None:
    model = Net(torch.optim.SGD)
    optimizer = DistributedOptimizer(torch.optim.SGD(model.named_parameters(), 0.1), model, world=world, **way)
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names


def test_a_generator_and_a_discriminator_take_turns(world: World, way: Options) -> None:
    """requires_grad is switched off and on again for whichever is not trained, as loops of GANs do."""
    torch.manual_seed(1)
    pairs = []
    for _ in range(2):
        torch.manual_seed(1)
        pairs.append([nn.Linear(3, 4), nn.Linear(4, 1)])
    (generator, discriminator), reference = pairs
    wrapped = [
        DistributedOptimizer(torch.optim.AdamW(part.parameters(), 0.05), part, world=world, **way)
        for part in (generator, discriminator)
    ]
    plain = [torch.optim.AdamW(part.parameters(), 0.05) for part in reference]
    for step in range(6):
        turn = step % 2
        for number in range(2):
            for part in (pairs[0][number], reference[number]):
                part.requires_grad_(number == turn)
        for optimizer in (*wrapped, *plain):
            optimizer.zero_grad()
        x = [torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * rank + step)) for rank in range(world.size)]
        discriminator(generator(x[world.rank])).square().mean().backward()
        wrapped[turn].step()
        torch.stack([reference[1](reference[0](one)).square().mean() for one in x]).mean().backward()
        plain[turn].step()
    for mine, other in zip((generator, discriminator), reference, strict=True):
        for a, b in zip(mine.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
