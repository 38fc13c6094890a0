"""The training loop: any model with a loss, any strategy, any number of ranks.

    trainer = Trainer(model, optimizer, loss, batches)
    trainer.fit(epochs=20)

`batches` is a torch DataLoader, which is cut over the ranks (dataloader.py), or what batch.Batches describes. With
`folder="runs/mine"` the run is kept there, and `trainer.resume()` goes on with it.

`loss(model, batch, epoch)` returns a scalar, or a mapping with `loss` and, for VAEs, `rate` and `distortion`; means
over the batch. `batch` is whatever `batches` yields: a tensor, or a tuple or mapping of tensors. `epoch` is the
fractional count of epochs done.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from hvdvae.allocator import keep_freed_memory
from hvdvae.averaged_statistics import BATCHES, AveragedStatistics
from hvdvae.batch import Batch, Batches, examples_of
from hvdvae.checkpoint import Folder, Source
from hvdvae.dataloader import DataLoaderBatches, check_alike
from hvdvae.ema import MovingAverage
from hvdvae.epoch_metrics import EpochSums
from hvdvae.errors import ConfigError, HostsChanged, RankLost
from hvdvae.heartbeat import pulse_of
from hvdvae.mean_loss import MeanLoss
from hvdvae.monitor import Monitor
from hvdvae.outcome import Outcome
from hvdvae.pulse import Beat
from hvdvae.recovery import enter, recover
from hvdvae.resume import Position, newest_of, restore, snapshot
from hvdvae.run_folder import RunFolder
from hvdvae.schedule import Schedule, world_scale
from hvdvae.signals import caught
from hvdvae.stepper import Loss, Stepper
from hvdvae.strategies import Strategy
from hvdvae.strategies.checkpointed import check_state
from hvdvae.world import World

if TYPE_CHECKING:
    from hvdvae.parallel.pipeline import Pipeline

LONG_SECONDS = 2.0
"""A validation that takes longer, or has not been timed yet, begins after a save: who is ended in it loses no epoch.

Where saves average (Strategy.saves_average), each validation of an epoch that is to be saved does, and no other.
"""
HOSTS_CHANGED = 1000
"""Beyond all signals: some rank has heard that there are other hosts."""


@dataclass(frozen=True)
class Stage:
    """What all ranks do together; whoever has done it knows what comes next. JSON-able."""

    number: int = 0
    """Counts them: where a rank dies, some have done one more than others."""
    doing: Literal["train", "conclude", "listen", "leave", "nothing"] = "train"
    signal: int = 0
    """Number of the signal that ends the run."""
    examples: int = 0
    """Of the epoch that is to be concluded, and the seconds that it took."""
    seconds: float = 0.0


class Trainer:
    """Runs epochs, keeps ranks in agreement, saves, and resumes where a checkpoint stands."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Strategy,
        loss: Loss | None,
        batches: "Batches | DataLoader[Any]",
        *,
        folder: str | Path | None = None,
        seed: int = 0,
        schedule: Schedule | None = None,
        precision: str = "fp32",
        ema_decay: float = 0.0,
        skip_limit: int = 50,
        lr_scaling: Literal["none", "linear", "sqrt"] = "none",
        monitors: Sequence[Monitor] | Callable[[], Sequence[Monitor]] = (),
        checkpoints: Folder | None = None,
        checkpoint_every: int = 1,
        validate: "Callable[[], dict[str, float]] | DataLoader[Any] | None" = None,
        validate_every: int = 1,
        config: Mapping[str, Any] | None = None,
        pipeline: "Pipeline | None" = None,
    ) -> None:
        """Build only. Every rank builds the same.

        `folder`: where the run is kept (run_folder.py): checkpoints, metrics.jsonl, TensorBoard, and progress on the
        terminal; in place of `monitors` and `checkpoints`. Rank 0 alone needs to see it.
        `monitors` act on rank 0 only; a function that makes them is called there when training starts, and by whoever
        is rank 0 once that has died. `lr_scaling`: what the learning rates were multiplied by (schedule.world_scale);
        where ranks die they are scaled anew.
        `validate`: called by every rank after an epoch, returns numbers that are equal on all, `loss` (lower is better)
        among them; or a DataLoader, over all of whose examples the mean of `loss` is taken.
        `config`: saved in checkpoints. Periods are in epochs. `pipeline`: this rank's stage, where the
        model is split into stages; its chain has the loss then, and `loss` may be None.
        """
        if optimizer.precision not in (None, precision) or (optimizer.precision and ema_decay):
            raise ConfigError(
                f"weights {optimizer.precision!r} (--weights) go with precision {optimizer.precision!r} (--precision) "
                f"and without ema_decay (--ema), found {precision!r} and {ema_decay}"
            )
        replicas = optimizer.world
        if isinstance(batches, DataLoader):
            place: dict[str, Any] = {"rank": replicas.rank, "size": replicas.size, "device": replicas.device}
            batches = DataLoaderBatches(batches, seed=seed, **place)
        missing = [name for name in ("examples", "steps", "epoch") if not hasattr(batches, name)]
        if missing:
            raise ConfigError(
                f"batches is a {type(batches).__name__} without {', '.join(missing)}, expected a torch DataLoader, or "
                "what hvdvae.batch.Batches describes, as data.Loader is: it says which examples are this rank's"
            )
        self._folder = RunFolder(Path(folder)) if folder is not None else None
        if self._folder is not None:
            if checkpoints is not None or callable(monitors) or len(monitors):
                raise ConfigError("folder stands for checkpoints and monitors: give it, or these")
            checkpoints = self._folder.checkpoints
        if checkpoints is not None:
            check_state(model)
        keep_freed_memory()
        self.model, self.optimizer, self.batches = model, optimizer, batches
        optimizer.is_told_the_step = optimizer.is_told_the_passes = True
        self.world = optimizer.whole
        self.position = Position()
        flat = optimizer.flat
        ema = MovingAverage(flat.parameters, ema_decay, holder=flat) if ema_decay else None
        self.ema = ema
        self.averaged_statistics = AveragedStatistics(model, optimizer) if ema is not None else None
        self.best: float | None = None
        self.owed: dict[str, float] | None = None
        """What training told of an epoch whose validation is still to come, as one that was saved before it has it."""
        self._validation_seconds = math.inf
        """Of the last one on the slowest rank, the same on all."""
        self.pipeline = pipeline
        options: dict[str, Any] = {"precision": precision, "skip_limit": skip_limit, "pipeline": pipeline}
        self.stepper = Stepper(model, optimizer, loss, seed=seed, schedule=schedule, ema=ema, **options)
        self._lr_scaling = lr_scaling
        self._make_monitors = monitors
        self._monitors: list[Monitor] = []
        self.died: list[str] = []
        """Ranks that were lost while the others went on, by their ranks and hosts at the start."""
        self._checkpoints, self._checkpoint_every = checkpoints, checkpoint_every
        if isinstance(validate, DataLoader):
            # Where ranks do not step together, rank 0 evaluates while the others train on.
            judges = replicas if optimizer.synchronous else World.alone(device=str(replicas.device))
            mean_loss = MeanLoss(model, loss, validate, judges, seed=seed)
            validate = lambda: mean_loss(self.epochs_done)  # noqa: E731
        self._validate, self._validate_every = validate, validate_every
        self._told = self._until = 0
        """Epochs that monitors know of."""
        self.configuration = dict(config or {})
        """Saved with checkpoints, and compared when one is resumed."""
        self._pulse = pulse_of(optimizer)
        self._share = (optimizer.world.rank, optimizer.world.size)
        """As the batches are cut; where the strategy says another, they are cut anew."""
        if optimizer.joined_at is not None:
            self.position = Position.at(optimizer.joined_at, batches.examples, batches.steps(0))

    def _monitors_here(self) -> list[Monitor]:
        if not self.world.is_first:
            return []
        if self._folder is not None:
            return self._folder.monitors(epochs=self._until, done=self.epochs_done, step=self.position.step)
        return list(self._make_monitors() if callable(self._make_monitors) else self._make_monitors)

    def fit(self, epochs: int) -> Outcome:
        """Train until `epochs` are done or a signal comes. Blocks; every rank must call it.

        Mutates the model. On SIGINT, SIGTERM or SIGUSR1 of any rank all ranks finish the same step, save, and return.
        Raises NonFiniteError on all ranks once more than `skip_limit` steps were skipped, RankLost where a rank has
        died and the others cannot go on, SystemExit(0) on a rank that they have no work for (parallel/survival.py).
        """
        self._examples, self._seconds, self._sums = 0, 0.0, EpochSums()
        self._monitors, self._until = [], epochs
        going_on: Literal["train", "leave"] = "train" if self.position.epoch < epochs else "leave"
        self.stage = Stage(doing="conclude" if self.owed is not None else going_on)
        if self.world.joins and self.optimizer.synchronous:
            enter(self)
        elif self.optimizer.synchronous:
            check_alike(self.batches, self.optimizer.world, self.position.examples)
        self.optimizer.start()
        self.optimizer.tell_progress(self.epochs_done)
        self.world.starting = False
        self._monitors = self._monitors or self._monitors_here()
        try:
            with caught() as flag:
                while self.stage.doing != "nothing":
                    try:
                        self.stage = self._do(self.stage, epochs, lambda: flag.number)
                    except RankLost as lost:
                        recover(self, lost)
        finally:
            for monitor in self._monitors:
                monitor.close()
        return Outcome(
            epochs=self.epochs_done,
            step=self.position.step,
            examples=self._examples,
            seconds=self._seconds,
            signal=self.stage.signal,
            skipped_steps=self.optimizer.skipped_steps,
        )

    def resume(self, checkpoint: Source | None = None) -> bool:
        """Continue from a checkpoint, in memory or spread from rank 0; None: the newest good one in `folder`.

        Returns whether there is one. Every rank must call it; blocks if it is spread. Raises CheckpointError if it does
        not fit, or if of those in the folder none is whole.
        """
        if checkpoint is None:
            checkpoint = newest_of(self._checkpoints, self.world)
            if checkpoint is None:
                return False
            restore(self, checkpoint)
            if self.world.is_first:
                sys.stderr.write(f"hvdvae: resumed at step {self.position.step} of {checkpoint.name}\n")
            return True
        restore(self, checkpoint)
        return True

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Inside, the model holds what is to be evaluated: the moving average, if there is one, and its statistics.

        Call it inside the optimizer's `fetched`. Blocks where layers keep statistics; every rank that enters that must.
        """
        if self.ema is None or self.averaged_statistics is None:
            yield
            return
        with self.ema.applied():
            self.averaged_statistics.measure(self.position.step, self._look)
            with self.averaged_statistics.applied():
                yield

    def _look(self) -> Iterator[None]:
        """Some of the coming epoch's batches through the model."""
        count = min(BATCHES, self.batches.steps(0))
        batches = self.batches.epoch(self.position.epoch, 0)
        return self.stepper.look(itertools.islice(batches, count), self.position.step, self.epochs_done)

    @property
    def epochs_done(self) -> float:
        """With the fraction of the one that is not finished."""
        return self.position.epoch + self.position.examples / self.batches.examples

    def _do(self, stage: Stage, epochs: int, signal_number: Callable[[], int]) -> Stage:
        """What all ranks do together now; returns what they do next, so that all know it who have done this."""
        number, ends = stage.number + 1, self.position.epoch >= epochs
        if stage.doing == "train":
            signal_given, seen, took = self._run_epoch(signal_number)
            self._examples, self._seconds = self._examples + seen, self._seconds + took
            if signal_given or self.position.epoch >= epochs:
                self.optimizer.finish()
            # A signal amid an epoch ends the run at once; else the epoch is concluded first.
            return Stage(number, "leave" if self.position.examples else "conclude", signal_given, seen, took)
        if stage.doing == "conclude":
            self._end_epoch(epochs, stage)
            return Stage(number, "listen", stage.signal)
        if stage.doing == "listen":  # For a signal during validation, or in the last step.
            signal_given = stage.signal or self._agreed(signal_number())
            return Stage(number, "leave" if signal_given or ends else "train", signal_given)
        self.optimizer.finish()
        # Where ranks do not step together, some may have heard of it in their last step, and some not.
        signal_given = self.optimizer.signal_of_all(stage.signal, signal_number())
        if signal_given:
            self._save(is_best=False)
        return Stage(number, "nothing", signal_given)

    def _run_epoch(self, signal_number: Callable[[], int]) -> tuple[int, int, float]:
        """One epoch, or the rest of one. Returns the signal that ended it, examples of all ranks, and seconds."""
        self.model.train()
        start = self.position.examples
        steps = self.batches.steps(start)
        total, self._sums = 0, EpochSums()
        begin = time.perf_counter()
        self._pulse.start()
        signal_given = 0
        batches = self.batches.epoch(self.position.epoch, start)
        number = 0
        while number < steps:
            before = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - before
            self._step(batch, waited)
            number += 1
            if self.optimizer.share != self._share:
                # Somebody has died: what is left of the epoch is cut anew over those that go on.
                before = self._share[1]
                self._share = self.optimizer.share
                self.batches.reshare(*self._share)
                self._scale_learning_rates(before)
                start = min(self.position.examples, self.batches.examples)
                number, steps = 0, self.batches.steps(start)
                batches = self.batches.epoch(self.position.epoch, start)
            if self._pulse.due or number >= steps:
                changed = self.world.hosts_changed and self.optimizer.recovers
                beat = self._pulse.beat(signal_number() or HOSTS_CHANGED * changed)
                if beat.signal == HOSTS_CHANGED:
                    # Where one of them cannot be reached, Horovod ends the processes that meet anew.
                    self._save(is_best=False)
                    raise HostsChanged("horovodrun has other hosts")
                total += beat.examples
                self._report(beat)
                signal_given = beat.signal
                if signal_given and number < steps:
                    return signal_given, total, time.perf_counter() - begin
        self.position.next_epoch()
        return signal_given, total, time.perf_counter() - begin

    def take_place(self, size_before: int) -> None:
        """Go on at the place that this rank has among others, where as many as `size_before` averaged. Local."""
        world = self.optimizer.world
        self._share = (world.rank, world.size)
        self._validation_seconds = math.inf  # As a new rank has it.
        self._scale_learning_rates(size_before)
        self._pulse = pulse_of(self.optimizer)
        if self.pipeline is not None:
            self.pipeline.recover()
        self.batches.reshare(*self._share)
        self._monitors = self._monitors or self._monitors_here()

    def _scale_learning_rates(self, size_before: int) -> None:
        factor = world_scale(self._lr_scaling, self._share[1]) / world_scale(self._lr_scaling, size_before)
        self.stepper.scale_learning_rates(factor)

    def _agreed(self, signal_number: int) -> int:
        if not self.optimizer.synchronous:
            return self.optimizer.signal_to_leave(signal_number)
        return int(self.world.max_(torch.tensor([signal_number]), "agreement on a signal"))

    def _step(self, batch: Batch, data_seconds: float) -> None:
        position, examples = self.position, examples_of(batch)
        self.world.watchdog.step = position.step
        epoch = position.epoch + (position.examples + 0.5 * examples * self._share[1]) / self.batches.examples
        self.stepper.step(batch, position.step, epoch, self._pulse)
        position.advance(examples * self._share[1])
        self.optimizer.tell_progress(self.epochs_done)
        self._pulse.count_step(examples, data_seconds)

    def _report(self, beat: Beat) -> None:
        self._sums.add(beat)
        epoch = self.epochs_done
        lr = float(self.optimizer.param_groups[0]["lr"])
        for monitor in self._monitors:
            monitor.on_beat(beat, step=self.position.step, epoch=epoch, lr=lr)

    def _end_epoch(self, epochs: int, stage: Stage) -> None:
        if not (self.optimizer.synchronous or self.world.is_first):
            return  # Rank 0 evaluates and saves what the servers hold; the others train on.
        epoch, last = self.position.epoch, self.position.epoch >= epochs
        metrics = self._sums.metrics(self.optimizer, stage.examples, stage.seconds) if self.owed is None else self.owed
        is_best, is_due = False, last or epoch % self._checkpoint_every == 0
        if self._validate is not None and (epoch % self._validate_every == 0 or last):
            if stage.signal:
                self.owed = metrics  # There may be no time for it; whoever resumes makes up for it.
                return
            # A save that averages changes what is trained: whether it comes must not hang on a clock.
            comes_first = is_due if self.optimizer.saves_average else self._validation_seconds > LONG_SECONDS
            saved_before = comes_first and self._checkpoints is not None
            if saved_before:
                self.owed = metrics
                self._save(is_best=False, keeps_others=True)
            found = self._run_validation(self._validate)
            self.owed = None
            metrics |= {f"validation_{name}": value for name, value in found.items()}
            # A loss that is not finite would stay the best for ever: nothing is less than NaN.
            is_best = math.isfinite(found["loss"]) and (self.best is None or found["loss"] < self.best)
            if saved_before and not (is_due or is_best) and self._checkpoints is not None and self.world.is_first:
                self._checkpoints.drop(self.position.step)
        # Where a rank dies in here, all of it is done again; but an epoch is told once.
        for monitor in self._monitors if epoch > self._told else ():
            monitor.on_epoch(epoch, self.position.step, metrics)
        self._told = epoch
        before, self.best = self.best, found["loss"] if is_best else self.best
        if is_best or is_due:
            try:
                self._look_at_average()
                self._save(is_best=is_best)
            except RankLost:
                self.best, self.owed = before, metrics
                raise
        # Whoever goes on knows that it was told.
        self._meet("the end of an epoch")

    def _run_validation(self, validate: Callable[[], dict[str, float]]) -> dict[str, float]:
        self.model.eval()
        optimizer, begin = self.optimizer, time.monotonic()
        with torch.no_grad(), optimizer.fetched(), optimizer.arithmetic(), self.evaluation_weights():
            found = validate()
        self.model.train()
        self._meet("validation")
        took = torch.tensor([time.monotonic() - begin])
        if optimizer.synchronous:
            self.world.max_(took, "seconds of the validation")
        self._validation_seconds = float(took)
        return found

    def _look_at_average(self) -> None:
        """Where no validation has, measure what a checkpoint has of the average."""
        if self.ema is None or self._checkpoints is None:
            return
        optimizer = self.optimizer
        with torch.no_grad(), optimizer.fetched(), optimizer.arithmetic(), self.evaluation_weights():
            pass

    def _save(self, *, is_best: bool, keeps_others: bool = False) -> None:
        if self._checkpoints is None or not (self.optimizer.synchronous or self.world.is_first):
            return
        with self.optimizer.saving() as rows:
            taken = snapshot(self, rows, self.configuration)
            if self.world.is_first:
                self._checkpoints.save(taken, is_best=is_best, keeps_others=keeps_others)
            else:
                taken.ask()
        # Nobody goes on as if it were there before it is.
        self._meet("rank 0 saves")

    def _meet(self, what: str) -> None:
        """Where ranks step together: return once all have come, however long one takes."""
        if self.optimizer.synchronous:
            self.world.barrier(what, patient=True)
