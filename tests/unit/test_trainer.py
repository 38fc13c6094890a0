"""The loop in one process: any module, a user's loss, a user's own data."""

import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from hvdvae import pulse
from hvdvae.checkpoint import Checkpoint, Folder, load
from hvdvae.errors import CheckpointError, ConfigError, HostsChanged, NonFiniteError
from hvdvae.outcome import Outcome, exit_status
from hvdvae.pulse import Beat
from hvdvae.schedule import learning_rate
from hvdvae.seeding import seed_everything
from hvdvae.stepper import Loss
from hvdvae.strategies import DistributedOptimizer
from hvdvae.trainer import Trainer
from hvdvae.world import World
from tests.rows import Rows

EXAMPLES, BATCH, STEPS = 26, 4, 6  # Two examples are left out of each epoch.
WORLD = World.alone(device="cpu")


def rows(count: int = EXAMPLES) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(8))


class Denoiser(nn.Module):
    """BatchNorm, dropout and noise of its own: everything that a run must remember or draw anew."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + 0.1 * torch.randn_like(x))  # type: ignore[no-any-return]


def squared_error(model: nn.Module, batch: Tensor, epoch: float) -> Tensor:
    return (model(batch) - batch).square().mean()


def plain_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5))


def trainer_of(
    model: nn.Module,
    loss: Loss = squared_error,
    *,
    data: Tensor | None = None,
    batch: int = BATCH,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    lr: float = 0.01,
    accumulate: int = 1,
    **options: Any,
) -> Trainer:
    wrapped = DistributedOptimizer(
        optimizer(model.parameters(), lr=lr), model, world=WORLD, strategy="local", backward_passes_per_step=accumulate
    )
    return Trainer(model, wrapped, loss, Rows(rows() if data is None else data, batch, WORLD), **options)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def assert_same_bits(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture
def beat_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks meet after each step, so that a signal ends the run at the step in which it came."""
    monkeypatch.setattr(pulse, "PERIOD_SECONDS", 0.0)


def test_trains_as_a_plain_loop_does() -> None:
    model, plain = Denoiser(), Denoiser()
    outcome = trainer_of(model, seed=5).fit(2)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    step = 0
    for epoch in range(2):
        for batch in Rows(rows(), BATCH, WORLD).epoch(epoch):
            seed_everything(WORLD.device, 5, 0, step)
            optimizer.zero_grad()
            squared_error(plain, batch, 0.0).backward()
            optimizer.step()
            step += 1
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert (outcome.epochs, outcome.step, outcome.examples) == (2, 2 * STEPS, 2 * STEPS * BATCH)
    assert (outcome.signal, outcome.skipped_steps, exit_status(outcome)) == (0, 0, 0)
    assert outcome.seconds > 0


@pytest.mark.parametrize(("batch", "passes"), [(4, 2), (7, 3), (2, 4)])
def test_accumulated_micro_batches_are_one_big_batch(batch: int, passes: int) -> None:
    """Also where the micro-batches are not of one size, or fewer than asked for."""
    big, small = plain_network(), plain_network()
    calls: list[int] = []

    def counted(model: nn.Module, micro: Tensor, epoch: float) -> Tensor:
        calls.append(len(micro))
        return squared_error(model, micro, epoch)

    trainer_of(big, batch=batch, optimizer=torch.optim.SGD, lr=0.1).fit(2)
    told = Notes()
    trainer_of(small, counted, batch=batch, optimizer=torch.optim.SGD, lr=0.1, accumulate=passes, monitors=[told]).fit(
        2
    )
    torch.testing.assert_close(weights(small), weights(big), atol=1e-6, rtol=1e-5)
    assert max(calls) == -(-batch // passes)
    assert told.epochs[0][2]["loss"] == pytest.approx(0.95, abs=0.3)


def test_the_loss_gets_the_epoch_with_its_fraction_and_may_be_a_mapping() -> None:
    epochs: list[float] = []

    def loss(model: nn.Module, batch: Tensor, epoch: float) -> dict[str, Tensor]:
        epochs.append(epoch)
        value = squared_error(model, batch, epoch)
        return {"loss": value, "rate": value.detach() * 0 + 3, "distortion": value.detach() * 0 + 70}

    told = Notes()
    trainer_of(plain_network(), loss, monitors=[told]).fit(2)
    assert epochs == pytest.approx([e + (s + 0.5) * BATCH / EXAMPLES for e in range(2) for s in range(STEPS)])
    assert told.epochs[1][2].items() >= {"rate": 3, "distortion": 70, "elbo": -73}.items()


def test_the_schedule_sets_the_rate_of_every_group() -> None:
    seen: list[tuple[float, ...]] = []

    def loss(model: nn.Module, batch: Tensor, epoch: float) -> Tensor:
        seen.append(tuple(group["lr"] for group in trainer.optimizer.param_groups))
        return squared_error(model, batch, epoch)

    def groups(parameters: Iterator[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first], "lr": 10 * lr}, {"params": rest}], lr)

    factor = learning_rate("cosine", epochs=2, warmup=1, step_epochs=1, gamma=1)
    trainer = trainer_of(plain_network(), loss, optimizer=groups, lr=0.5, schedule=factor)
    trainer.fit(2)
    expected = [factor(e + (s + 0.5) * BATCH / EXAMPLES) for e in range(2) for s in range(STEPS)]
    assert [rate for _, rate in seen] == pytest.approx([0.5 * f for f in expected])
    assert [rate for rate, _ in seen] == pytest.approx([5 * f for f in expected])


def bad_at(*steps: int) -> tuple[Loss, list[Tensor]]:
    """A loss that is NaN at some steps, with a finite gradient, and the weights before each step."""
    before: list[Tensor] = []

    def loss(model: nn.Module, batch: Tensor, epoch: float) -> Tensor:
        before.append(weights(model))
        good = squared_error(model, batch, epoch)
        return good + float("nan") if len(before) - 1 in steps else good

    return loss, before


def test_steps_that_are_not_finite_are_skipped_and_counted() -> None:
    loss, before = bad_at(1, 4)
    model, told = plain_network(), Notes()
    trainer = trainer_of(model, loss, ema_decay=0.5, monitors=[told], skip_limit=2)
    average: list[Tensor] = []
    trainer.ema.update = lambda: average.append(weights(model))  # type: ignore[union-attr, method-assign]
    outcome = trainer.fit(1)
    assert outcome.skipped_steps == 2
    assert outcome.step == STEPS
    changed = [not torch.equal(a, b) for a, b in zip(before, [*before[1:], weights(model)], strict=True)]
    assert changed == [True, False, True, True, False, True]
    assert len(average) == STEPS - 2, "a skipped step does not count for the moving average"
    assert told.epochs[0][2]["skipped_steps"] == 2
    assert told.epochs[0][2]["loss"] < 10, "the mean is over finite losses"


def test_after_the_limit_the_run_stops_and_names_it() -> None:
    loss, before = bad_at(*range(1, 100))
    told = Notes()
    with pytest.raises(NonFiniteError, match=r"skipped 3 steps .*--skip-limit 2.*step 3.*--lr.*--clip-norm"):
        trainer_of(plain_network(), loss, skip_limit=2, monitors=[told]).fit(1)
    assert len(before) == 4
    assert told.closed == 1


def test_overflows_while_fp16_finds_its_scale_do_not_count_as_failures() -> None:
    def loss(model: nn.Module, batch: Tensor, epoch: float) -> Tensor:
        return 1e4 * (model(batch) - batch).square().mean()

    model = plain_network()
    start = weights(model)
    trainer = trainer_of(model, loss, precision="fp16", skip_limit=0)
    outcome = trainer.fit(3)
    assert 0 < outcome.skipped_steps < outcome.step, "the first scale must overflow, a later one fit"
    assert trainer.stepper.scaler is not None
    assert trainer.stepper.scaler.get_scale() < 65536
    assert not torch.equal(weights(model), start)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_nearly_as_fp32(precision: str) -> None:
    exact, mixed = plain_network(), plain_network()
    start = weights(exact)
    dtypes: set[torch.dtype] = set()

    def loss(model: nn.Module, batch: Tensor, epoch: float) -> Tensor:
        out = model(batch)
        dtypes.add(out.dtype)
        return (out.float() - batch).square().mean()

    trainer_of(exact, optimizer=torch.optim.SGD, lr=0.1).fit(2)
    trainer_of(mixed, loss, optimizer=torch.optim.SGD, lr=0.1, precision=precision).fit(2)
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert weights(mixed).dtype == torch.float32
    far = (weights(exact) - start).norm()
    assert (weights(mixed) - weights(exact)).norm() < 0.05 * far


def test_validation_sees_the_moving_average_in_eval_mode_without_gradients() -> None:
    model = Denoiser()
    seen: list[Tensor] = []

    def validate() -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        assert trainer.ema is not None
        assert torch.equal(trainer.optimizer.flat.parameters, trainer.ema.average)
        seen.append(weights(model))
        return {"loss": 1.0}

    trainer = trainer_of(model, ema_decay=0.9, validate=validate)
    trainer.fit(2)
    assert len(seen) == 2
    assert model.training
    assert not torch.allclose(weights(model), seen[-1], atol=1e-4), "training goes on with its own weights"


def test_the_watchdog_knows_the_step_of_an_own_loop() -> None:
    model, world = plain_network(), World.alone(device="cpu")
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world, strategy="local")
    for _ in range(3):
        squared_error(model, rows(4), 0.0).backward()
        optimizer.step()
    assert world.watchdog.step == 3


def run_with_validation(folder: Path, losses: list[float], **options: Any) -> tuple[Trainer, Folder]:
    left = iter(losses)
    checkpoints = Folder(folder, 2)
    trainer = trainer_of(
        plain_network(), checkpoints=checkpoints, validate=lambda: {"loss": next(left), "elbo": 0.0}, **options
    )
    trainer.fit(len(losses))
    return trainer, checkpoints


def epoch_of(path: Path) -> int:
    epoch: int = load(path).record["position"]["epoch"]
    return epoch


def test_the_best_by_validation_and_the_last_are_kept(tmp_path: Path) -> None:
    trainer, checkpoints = run_with_validation(tmp_path, [3.0, 1.0, 2.0, 1.0, 5.0])
    assert epoch_of(checkpoints.best) == 2, "the first of equals"
    assert trainer.best == 1.0
    assert [epoch_of(path) for path in checkpoints.steps()] == [5, 4]


@pytest.mark.parametrize("losses", [[float("nan"), 3.0, 2.0, 4.0], [3.0, float("nan"), 2.0, float("nan")]])
def test_a_validation_that_is_not_a_number_is_never_the_best(tmp_path: Path, losses: list[float]) -> None:
    trainer, checkpoints = run_with_validation(tmp_path, losses)
    assert trainer.best == 2.0
    assert epoch_of(checkpoints.best) == 3


@pytest.mark.parametrize(
    ("options", "goes_on"),
    [
        ({"objective": "iwae", "samples": 5}, True),
        ({"objective": "iwae", "samples": 7}, False),
        ({"objective": "elbo", "samples": 5}, False),
    ],
)
def test_a_best_of_another_objective_is_not_compared_with(
    tmp_path: Path, options: dict[str, Any], *, goes_on: bool
) -> None:
    """The bound of 5 samples is less than the ELBO of the same weights."""
    before = {"objective": "iwae", "samples": 5}
    _, checkpoints = run_with_validation(tmp_path, [2.0, 1.0], config=before)
    trainer = trainer_of(
        plain_network(), checkpoints=checkpoints, validate=lambda: {"loss": 1.5, "elbo": 0.0}, config=options
    )
    trainer.resume(load(checkpoints.steps()[0]))
    trainer.fit(3)
    assert epoch_of(checkpoints.best) == (2 if goes_on else 3)


def test_a_skipped_step_costs_no_statistics_where_the_model_clears_its_gradients() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=WORLD, strategy="local")
    for step in range(5):
        model.zero_grad()
        loss = model(torch.randn(6, 3)).square().mean() * (math.nan if step == 4 else 1.0)
        loss.backward()
        before = {name: value.clone() for name, value in model.named_buffers()}
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert int(model[1].num_batches_tracked) == 4  # type: ignore[arg-type]
    assert not torch.equal(before["1.running_mean"], model[1].running_mean)  # type: ignore[arg-type]
    assert bool(model[1].running_mean.abs().max() > 0)  # type: ignore[union-attr, operator]


def test_periods_of_validation_and_checkpoints_and_the_last_epoch_always(tmp_path: Path) -> None:
    told = Notes()
    checkpoints = Folder(tmp_path, 99)
    trainer_of(
        plain_network(),
        checkpoints=checkpoints,
        checkpoint_every=3,
        validate=lambda: {"loss": 1.0},
        validate_every=2,
        monitors=[told],
    ).fit(5)
    assert [epoch for epoch, _, metrics in told.epochs if "validation_loss" in metrics] == [2, 4, 5]
    # Epoch 2 is the best of the first validation.
    assert sorted(epoch_of(path) for path in checkpoints.steps()) == [2, 3, 5]


class Notes:
    """A monitor that notes its events."""

    def __init__(self) -> None:
        self.beats: list[tuple[Beat, int, float, float]] = []
        self.epochs: list[tuple[int, int, dict[str, float]]] = []
        self.closed = 0

    def on_beat(self, beat: Beat, *, step: int, epoch: float, lr: float) -> None:
        assert not self.closed
        self.beats.append((beat, step, epoch, lr))

    def on_epoch(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        assert not self.closed
        self.epochs.append((epoch, step, metrics))

    def close(self) -> None:
        self.closed += 1


def test_monitors_are_told_and_closed() -> None:
    told, other = Notes(), Notes()
    losses: list[float] = []

    def loss(model: nn.Module, batch: Tensor, epoch: float) -> Tensor:
        value = squared_error(model, batch, epoch)
        losses.append(float(value.detach()))
        return value

    trainer_of(plain_network(), loss, monitors=[told, other], validate=lambda: {"loss": 4.0, "nll": 5.0}).fit(3)
    assert [(epoch, step) for epoch, step, _ in told.epochs] == [(e, e * STEPS) for e in (1, 2, 3)]
    assert sum(beat.examples for beat, *_ in told.beats) == 3 * STEPS * BATCH
    assert [step for _, step, _, _ in told.beats][-1] == 3 * STEPS
    assert all(len(beat.step_seconds) == 1 for beat, *_ in told.beats)
    for number, (_, _, metrics) in enumerate(told.epochs):
        of_epoch = losses[number * STEPS : (number + 1) * STEPS]
        assert metrics["loss"] == pytest.approx(sum(of_epoch) / STEPS, rel=1e-5)
        assert metrics.items() >= {"validation_loss": 4.0, "validation_nll": 5.0, "lr": 0.01}.items()
        assert metrics["gradient_norm"] > 0
        assert "elbo" not in metrics, "a loss without rate and distortion has no ELBO"
    assert told.closed == other.closed == 1
    assert other.epochs == told.epochs


def test_monitors_are_made_where_a_run_goes_on() -> None:
    at: list[int] = []

    def monitors() -> list[Notes]:
        at.append(trainer.position.step)
        return [Notes()]

    trainer = trainer_of(plain_network(), squared_error, monitors=monitors)
    assert at == []
    trainer.fit(1)
    trainer.fit(3)
    assert at == [0, STEPS]


def test_monitors_are_closed_when_training_fails() -> None:
    def loss(model: nn.Module, batch: Tensor, epoch: float) -> Tensor:
        raise KeyError("the user's own mistake")

    told = Notes()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError, match="own mistake"):
        trainer_of(plain_network(), loss, monitors=[told]).fit(1)
    assert told.closed == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_time_of_validation_is_not_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is of training: what lies between epochs does not slow the first beat of the next."""
    clock = [0.0]
    monkeypatch.setattr(pulse.time, "perf_counter", lambda: clock[0])

    def loss(model: nn.Module, batch: Tensor, epoch: float) -> Tensor:
        clock[0] += 0.125
        return squared_error(model, batch, epoch)

    def validate() -> dict[str, float]:
        clock[0] += 1000.0
        return {"loss": 1.0}

    told = Notes()
    trainer = trainer_of(plain_network(), loss, monitors=[told], validate=validate)
    clock[0] += 1000.0
    outcome = trainer.fit(3)
    assert {seconds for beat, *_ in told.beats for seconds in beat.step_seconds} == {0.125}
    assert outcome.seconds == pytest.approx(3 * STEPS * 0.125)


def stops_at(step: int, number: signal.Signals) -> Loss:
    """A signal in the backward pass of this step: statistics of an average are measured by the loss, too."""
    passes = 0

    def count(_: Tensor) -> None:
        nonlocal passes
        passes += 1
        if passes == step:
            os.kill(os.getpid(), number)

    def loss(model: nn.Module, batch: Tensor, epoch: float) -> Tensor:
        found = squared_error(model, batch, epoch)
        found.register_hook(count)  # type: ignore[no-untyped-call]
        return found

    return loss


@pytest.mark.usefixtures("beat_every_step")
@pytest.mark.parametrize(
    ("step", "number"),
    [
        (2, signal.SIGTERM),
        (STEPS, signal.SIGTERM),
        (STEPS + 3, signal.SIGTERM),
        (3 * STEPS - 1, signal.SIGTERM),
        (3 * STEPS, signal.SIGTERM),
        (2, signal.SIGINT),
        (2, signal.SIGUSR1),
    ],
)
def test_a_stopped_and_resumed_run_is_the_run_that_never_stopped(
    tmp_path: Path, step: int, number: signal.Signals
) -> None:
    """Law 8, bit for bit: weights, BatchNorm, Adam, moving average, dropout and noise, order of the data."""
    if number != signal.SIGTERM and step != 2:
        pytest.skip("once is enough")

    def build(model: nn.Module, loss: Loss = squared_error) -> Trainer:
        factor = learning_rate("cosine", epochs=3, warmup=1, step_epochs=1, gamma=1)
        trainer = trainer_of(
            model,
            loss,
            seed=3,
            ema_decay=0.9,
            schedule=factor,
            checkpoints=Folder(tmp_path, 3),
            validate=lambda: {"loss": float(trainer.position.epoch)},
            config={"lr": 0.01},
        )
        return trainer

    straight = Denoiser()
    reference = build(straight)
    reference._checkpoints = None
    reference.fit(3)

    first = build(Denoiser(), stops_at(step, number))
    outcome = first.fit(3)
    assert outcome.signal == number
    assert exit_status(outcome) == 128 + number
    stopped = step
    assert outcome.step == stopped
    assert outcome.epochs == pytest.approx(stopped // STEPS + stopped % STEPS * BATCH / EXAMPLES)

    newest = Folder(tmp_path, 3).newest_good()
    assert newest is not None
    assert load(newest).record["step"] == stopped
    assert load(newest).record["config"] == {"lr": 0.01}
    resumed_model = Denoiser(seed=99)
    resumed = build(resumed_model)
    resumed.resume(load(newest))
    assert resumed.position == first.position
    outcome = resumed.fit(3)
    assert (outcome.step, outcome.epochs) == (3 * STEPS, 3)
    assert outcome.examples == (3 * STEPS - stopped) * BATCH
    assert_same_bits(resumed_model, straight)
    assert torch.equal(resumed.ema.average, reference.ema.average)  # type: ignore[union-attr]
    assert resumed.best == reference.best == 1.0, "the first epoch was the best"
    states = [list(trainer.optimizer.inner.state.values()) for trainer in (resumed, reference)]
    for mine, theirs in zip(*states, strict=True):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(mine[key], theirs[key]), key


class Killed(BaseException):
    """What nobody catches, as SIGKILL."""


def test_a_run_that_is_killed_in_a_validation_has_saved_the_epoch_and_makes_up_for_it(tmp_path: Path) -> None:
    """Weights, the best epoch and what monitors are told are those of a run that was never stopped."""

    def build(folder: Path, dies_at: int, told: Notes) -> Trainer:
        def validate() -> dict[str, float]:
            if trainer.position.epoch == dies_at:
                raise Killed
            return {"loss": [5.0, 2.0, 3.0][trainer.position.epoch - 1]}

        trainer = trainer_of(Denoiser(), seed=3, monitors=[told], checkpoints=Folder(folder, 3), validate=validate)
        return trainer

    whole, first, second = Notes(), Notes(), Notes()
    reference = build(tmp_path / "whole", 0, whole)
    reference.fit(3)
    stopped = build(tmp_path / "killed", 1, first)
    with pytest.raises(Killed):
        stopped.fit(3)
    assert first.epochs == []
    folder = Folder(tmp_path / "killed", 3)
    newest = folder.newest_good()
    assert newest is not None
    assert load(newest).record["position"] == {"epoch": 1, "examples": 0, "step": STEPS}
    resumed = build(tmp_path / "killed", 0, second)
    resumed.resume(load(newest))
    resumed.fit(3)
    assert_same_bits(resumed.model, reference.model)
    assert resumed.best == reference.best == 2.0
    assert load(folder.best).record["step"] == load(Folder(tmp_path / "whole", 3).best).record["step"] == 2 * STEPS
    for mine, theirs in zip(second.epochs, whole.epochs, strict=True):
        assert mine[:2] == theirs[:2]
        for name in theirs[2].keys() - {"examples_per_second"}:
            assert mine[2][name] == theirs[2][name], name


@pytest.mark.usefixtures("beat_every_step")
def test_a_signal_in_the_last_step_of_an_epoch_ends_the_run_before_its_validation(tmp_path: Path) -> None:
    validated: list[int] = []

    def validate() -> dict[str, float]:
        validated.append(trainer.position.epoch)
        return {"loss": 1.0}

    options: dict[str, Any] = {"checkpoints": Folder(tmp_path, 3), "validate": validate}
    trainer = trainer_of(plain_network(), stops_at(STEPS, signal.SIGTERM), **options)
    assert trainer.fit(2).signal == signal.SIGTERM
    assert validated == []
    trainer = trainer_of(plain_network(), **options)
    newest = Folder(tmp_path, 3).newest_good()
    assert newest is not None
    trainer.resume(load(newest))
    trainer.fit(2)
    assert validated == [1, 2]


def test_what_was_saved_before_a_validation_does_not_stay_where_no_checkpoint_is_due(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def validate() -> dict[str, float]:
        seen.append([path.name for path in Folder(tmp_path, 3).steps()])
        return {"loss": float(trainer.position.epoch)}

    trainer = trainer_of(plain_network(), checkpoints=Folder(tmp_path, 3), checkpoint_every=10, validate=validate)
    trainer.best = 0.0  # None of these is better.
    trainer.fit(3)
    names = [f"step-{epoch * STEPS:09d}.safetensors" for epoch in (1, 2, 3)]
    assert seen[0] == names[:1], "not timed yet: saved before"
    assert seen[1] == [], "a short one: not saved before, and the first is gone"
    assert [path.name for path in Folder(tmp_path, 3).steps()] == names[2:], "the last is due"


def test_a_resumed_fp16_run_keeps_its_scale_and_its_pardoned_overflows(tmp_path: Path) -> None:
    bad = 3.5  # After so many epochs one loss is NaN, which the limit of one allows.

    def loss(model: nn.Module, batch: Tensor, epoch: float) -> Tensor:
        nonlocal bad
        value = 1e4 * (model(batch) - batch).square().mean()
        if epoch < bad:
            return value
        bad = float("inf")
        return value * float("nan")

    first = trainer_of(plain_network(), loss, precision="fp16", skip_limit=1, checkpoints=Folder(tmp_path, 1))
    assert first.fit(3).skipped_steps > 2
    newest = Folder(tmp_path, 1).newest_good()
    assert newest is not None
    second = trainer_of(plain_network(7), loss, precision="fp16", skip_limit=1)
    second.resume(load(newest))
    assert second.stepper.scaler is not None
    assert first.stepper.scaler is not None
    assert second.stepper.scaler.get_scale() == first.stepper.scaler.get_scale()
    second.fit(4)
    assert second.optimizer.skipped_steps == first.optimizer.skipped_steps + 1


def saved_run(folder: Path, **options: Any) -> Checkpoint:
    trainer_of(plain_network(), checkpoints=Folder(folder, 1), **options).fit(1)
    newest = Folder(folder, 1).newest_good()
    assert newest is not None
    return load(newest)


def test_the_resumed_runs_own_options_rule(tmp_path: Path) -> None:
    trainer = trainer_of(plain_network(), lr=0.5)
    trainer.optimizer.param_groups[0]["weight_decay"] = 0.25
    trainer.resume(saved_run(tmp_path, lr=0.01))
    assert [(group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups] == [(0.5, 0.25)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": torch.optim.SGD}, "--optimizer adam"),
        ({"data": rows(EXAMPLES - 1)}, "an epoch of 26 examples, this run has 25"),
        ({"config": {"seed": 2, "lr": 1.0}}, "--seed 1"),
    ],
)
def test_a_run_of_another_kind_is_not_resumed(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    checkpoint = saved_run(tmp_path, config={"seed": 1, "lr": 0.1})
    model = plain_network()
    start = weights(model)
    with pytest.raises(CheckpointError, match=words):
        trainer_of(model, **options).resume(checkpoint)
    assert torch.equal(weights(model), start)


def test_skipped_steps_have_no_say_in_the_means(beat_every_step: None) -> None:
    """A beat of nothing but NaN is NaN, and the epoch's mean is of the steps that were taken."""
    beats: list[Beat] = []
    epochs: list[dict[str, float]] = []

    class Listener:
        def on_beat(self, beat: Beat, *, step: int, epoch: float, lr: float) -> None:
            beats.append(beat)

        def on_epoch(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
            epochs.append(metrics)

        def close(self) -> None: ...

    steps = iter(range(STEPS))

    def loss(model: nn.Module, batch: Tensor, epoch: float) -> Tensor:
        return squared_error(model, batch, epoch) * 0 + (float("nan") if next(steps) == 2 else 100.0)

    trainer_of(plain_network(), loss, monitors=[Listener()]).fit(1)
    assert [beat.finite_examples for beat in beats] == [BATCH, BATCH, 0, BATCH, BATCH, BATCH]
    assert math.isnan(beats[2].loss)
    assert epochs[0]["loss"] == 100.0


def test_ranks_save_before_they_meet_anew_on_other_hosts(
    tmp_path: Path, beat_every_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Horovod may end them there."""
    trainer = trainer_of(plain_network(), checkpoints=Folder(tmp_path, 3))
    monkeypatch.setattr(World, "hosts_changed", property(lambda world: trainer.position.step == 2))
    monkeypatch.setattr(type(trainer.optimizer), "recovers", True)
    with pytest.raises(HostsChanged):
        trainer.fit(1)
    newest = Folder(tmp_path, 3).newest_good()
    assert newest is not None
    assert load(newest).record["position"] == {"epoch": 0, "examples": 2 * BATCH, "step": 2}


@pytest.mark.parametrize("kind", ["tuple", "mapping"])
def test_batches_of_several_tensors(kind: str) -> None:
    """Inputs and targets, cut into micro-batches together."""

    class Pairs(Rows):
        def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
            for x in super().epoch(epoch, start):
                yield (x, 2 * x) if kind == "tuple" else {"x": x, "y": 2 * x}

    def loss(model: nn.Module, batch: Any, epoch: float) -> Tensor:
        x, y = batch if kind == "tuple" else (batch["x"], batch["y"])
        return (model(x) - y).square().mean()

    results = []
    for wanted, batches in ((loss, Pairs), (lambda m, x, e: (m(x) - 2 * x).square().mean(), Rows)):
        model = plain_network()
        optimizer = DistributedOptimizer(
            torch.optim.Adam(model.parameters(), 0.01), model, world=WORLD, strategy="local", backward_passes_per_step=2
        )
        outcome = Trainer(model, optimizer, wanted, batches(rows(), BATCH, WORLD)).fit(2)
        assert outcome.examples == 2 * STEPS * BATCH
        results.append(weights(model))
    assert torch.equal(*results)


def test_a_checkpoint_of_another_model_is_refused_and_says_how(tmp_path: Path) -> None:
    trainer_of(plain_network(), checkpoints=Folder(tmp_path, 1)).fit(1)
    newest = Folder(tmp_path, 1).newest_good()
    assert newest is not None
    with pytest.raises(CheckpointError, match=r"trains 4 parameters.*this model 2.*--hidden"):
        trainer_of(nn.Sequential(nn.Linear(5, 5))).resume(load(newest))
    wider = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 5))
    start = weights(wider)
    with pytest.raises(CheckpointError, match=r"step-000000006.*[02]\.\w+ is \([45, ]+\) there, \(.*9.*\) here"):
        trainer_of(wider).resume(load(newest))
    assert torch.equal(weights(wider), start), "nothing may be loaded halfway"


@pytest.mark.parametrize(("scaling", "rate"), [("linear", 0.005), ("none", 0.01)])
def test_where_others_have_died_rates_are_scaled_to_those_that_are_left(
    monkeypatch: pytest.MonkeyPatch, scaling: Literal["linear", "none"], rate: float
) -> None:
    """Also where ranks do not step together, and hear of it with an answer."""
    trainer = trainer_of(plain_network(), lr_scaling=scaling)
    monkeypatch.setattr(Rows, "reshare", lambda rows, rank, size: None, raising=False)
    trainer._share = (0, 2)
    trainer.fit(1)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


class Versioned(Denoiser):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}


def test_state_that_a_checkpoint_cannot_hold_is_named_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="_extra_state is a dict"):
        trainer_of(Versioned(), checkpoints=Folder(tmp_path, 1))
    trainer_of(Versioned()).fit(1)


def test_exit_status_is_that_of_the_signal() -> None:
    ended = Outcome(epochs=1, step=1, examples=1, seconds=1, signal=15, skipped_steps=0)
    assert exit_status(ended) == 143
