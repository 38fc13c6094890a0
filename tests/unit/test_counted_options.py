"""Optimizers that keep count in their groups count on where they are loaded or resumed; users' options stay theirs."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.checkpoint import Checkpoint, Folder, load
from hvdvae.errors import ConfigError
from hvdvae.strategies import DistributedOptimizer, Strategy
from hvdvae.strategies.group_options import set_anew
from hvdvae.trainer import Trainer
from hvdvae.world import World
from tests.rows import Rows

WORLD = World.alone(device="cpu")


class ScheduleFree(Optimizer):
    """Its count `k` and its mode stand in the groups, and no argument sets them."""

    def __init__(self, params: Any, lr: float = 0.1, warmup: int = 4) -> None:
        super().__init__(params, {"lr": lr, "warmup": warmup, "k": 0, "weight_sum": 0.0, "train_mode": False})

    def train(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["train_mode"], "not in train mode"
            rate = group["lr"] * min(1.0, (group["k"] + 1) / group["warmup"])
            group["weight_sum"] += rate**2
            weight = rate**2 / group["weight_sum"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                z.sub_(p.grad, alpha=rate)
                p.data.lerp_(z, weight)
            group["k"] += 1


class Learning(Optimizer):
    """Prodigy's kind: what is learned of the data, `d`, is first set by an argument, and a number of tensors' kind."""

    def __init__(self, params: Any, lr: float = 1.0, d: float = 1e-3, growth: float = 2.0, decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "d": d, "growth": growth, "decay": decay})

    def train(self) -> None:
        """Nothing to change."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["d"] = group["d"] * group["growth"]
            group["moved"] = group.get("moved", torch.zeros(())) + group["d"]
            for p in group["params"]:
                p.data.mul_(1 - group["decay"]).sub_(p.grad, alpha=group["lr"] * group["d"])


class Bounded(Optimizer):
    """LAMB's kind: `step` comes into the groups with the first step; an elementwise optimizer's subclass."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"lr": 0.1, **options})

    def train(self) -> None:
        """Nothing to change."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=group["lr"] / group["step"])


class Loose(Optimizer):
    """MADGRAD's and EmoNavi's kind: something in the state that belongs to no parameter, and lists of tensors in it."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def train(self) -> None:
        """Nothing to change."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        shared: dict[str, Any] = self.state.setdefault("ema", {"k": 0, "mean": torch.zeros(1)})  # type: ignore[call-overload]
        shared["k"] += 1
        shared["mean"] = shared["mean"] * 0.5 + 1
        for group in self.param_groups:
            for p in group["params"]:
                pair = self.state[p].setdefault("pair", [torch.zeros_like(p), torch.zeros_like(p)])
                pair[shared["k"] % 2].add_(p.grad)
                p.data.sub_(pair[0] + 0.5 * pair[1], alpha=group["lr"] / float(shared["mean"]))


KINDS: tuple[Callable[..., Any], ...] = (ScheduleFree, Learning, Bounded, Loose)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5))


def loss(model: nn.Module, batch: Tensor, epoch: float) -> Tensor:
    return (model(batch) - batch).square().mean()


def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    loss(model, x, 0.0).backward()
    optimizer.step()


def options(optimizer: Optimizer) -> dict[str, Any]:
    (group,) = optimizer.param_groups
    return {key: float(value) for key, value in group.items() if key != "params" and value is not None}


def wrap(optimizer: Optimizer, model: nn.Module) -> Strategy:
    return DistributedOptimizer(optimizer, model, world=WORLD, strategy="local")


def newest(folder: Path) -> Checkpoint:
    path = Folder(folder, 9).newest_good()
    assert path is not None
    return load(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["load_state_dict", "restore"])
def test_counts_go_on_after_loading(kind: Callable[..., Any], way: str) -> None:
    plain, model = network(), network()
    reference, own = kind(plain.parameters()), kind(model.parameters())
    reference.train()
    own.train()
    optimizer = wrap(own, model)
    for number in range(5):
        step(plain, reference, number)
        step(model, optimizer, number)
    state = copy.deepcopy(optimizer.state_dict())
    taken = optimizer.checkpoint()
    again = copy.deepcopy(model)
    built = kind(again.parameters())
    resumed = wrap(built, again)
    if way == "restore":
        resumed.restore(taken)
    else:
        resumed.load_state_dict(state)
    for number in range(5, 8):
        step(plain, reference, number)
        step(again, resumed, number)
        assert options(resumed) == options(reference) == options(built), number
    for a, b in zip(again.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_resumes_counts_and_takes_this_runs_options(kind: Callable[..., Any], tmp_path: Path) -> None:
    data = torch.randn(26, 5, generator=torch.Generator().manual_seed(8))

    def trainer(**changed: Any) -> Trainer:
        model = network()
        built = kind(model.parameters(), **changed)
        built.train()
        folder = Folder(tmp_path, 9)
        return Trainer(model, wrap(built, model), loss, Rows(data, 4, WORLD), checkpoints=folder)

    straight = trainer()
    straight.fit(1)
    resumed = trainer()
    resumed.resume(newest(tmp_path))
    assert options(resumed.optimizer) == options(straight.optimizer)
    straight.fit(2)
    resumed.fit(2)
    assert options(resumed.optimizer) == options(straight.optimizer)
    for a, b in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)
    other = trainer(lr=0.03)
    other.resume(newest(tmp_path))
    assert options(other.optimizer) == {**options(straight.optimizer), "lr": 0.03}, (
        "whoever resumes with a rate wants it"
    )


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.Muon])
def test_a_scheduler_built_before_the_wrap_rules_after_loading(kind: type[Optimizer]) -> None:
    def build() -> tuple[nn.Module, Optimizer, Any]:
        model = nn.Linear(5, 5, bias=False)
        nn.init.eye_(model.weight)
        plain = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
        return model, plain, torch.optim.lr_scheduler.StepLR(plain, 1, 0.5)

    def go(model: nn.Module, optimizer: Optimizer, schedule: Any, steps: range) -> list[float]:
        rates = []
        for number in steps:
            step(model, optimizer, number)
            schedule.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
        return rates

    model, plain, schedule = build()
    go(model, plain, schedule, range(2))
    saved, weights, rates = plain.state_dict(), copy.deepcopy(model.state_dict()), schedule.state_dict()
    saved = copy.deepcopy(saved)
    expected = go(model, plain, schedule, range(2, 5))
    other, inner, later = build()
    optimizer = wrap(inner, other)
    other.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    later.load_state_dict(rates)
    assert go(other, optimizer, later, range(2, 5)) == expected
    torch.testing.assert_close(other.weight, model.weight)


def test_what_rules_when_resumed_is_what_a_user_sets() -> None:
    optimizer = Learning([nn.Parameter(torch.ones(1))])
    mine = {"params": [], "lr": 1.0, "d": 1e-3, "growth": 3.0, "decay": 0.0, "scale of mine": 2.0, "mode": True}
    saved = {"lr": 0.5, "d": 0.1, "growth": 2.0, "decay": 0.1, "scale of mine": 1.0, "moved": 7.0}
    found = set_anew(optimizer, mine, saved, ["d"])
    assert found == {"params": [], "lr": 1.0, "growth": 3.0, "decay": 0.0, "scale of mine": 2.0}
    free = ScheduleFree([nn.Parameter(torch.ones(1))])
    assert set_anew(free, free.param_groups[0], free.param_groups[0], []).keys() == {"params", "lr", "warmup"}


def test_options_that_text_cannot_hold_are_named(tmp_path: Path) -> None:
    model = network()
    plain = torch.optim.SGD([{"params": model.parameters(), "note": {1, 2}}], 0.1)
    trainer = Trainer(
        model, wrap(plain, model), loss, Rows(torch.randn(8, 5), 4, WORLD), checkpoints=Folder(tmp_path, 9)
    )
    with pytest.raises(ConfigError, match="option 'note' of the optimizer is a set, expected numbers"):
        trainer.fit(1)


def test_a_rate_that_is_a_tensor_and_betas_stay_what_they_are(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        model = network()
        plain = torch.optim.Adam(model.parameters(), torch.tensor(0.01), betas=(0.8, 0.9))
        return Trainer(
            model, wrap(plain, model), loss, Rows(torch.ones(8, 5), 4, WORLD), checkpoints=Folder(tmp_path, 9)
        )

    trainer().fit(1)
    resumed = trainer()
    resumed.resume(newest(tmp_path))
    (group,) = resumed.optimizer.param_groups
    assert isinstance(group["lr"], Tensor)
    assert group["betas"] == (0.8, 0.9)
    resumed.fit(2)
