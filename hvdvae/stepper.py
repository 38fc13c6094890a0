"""One step: learning rate, noise, forward and backward, exchange, update; and what it does where numbers overflow."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdvae.batch import Batch, chunks, examples_of
from hvdvae.ema import MovingAverage
from hvdvae.errors import ConfigError, NonFiniteError
from hvdvae.heartbeat import Heartbeat
from hvdvae.schedule import Schedule
from hvdvae.seeding import seed_everything
from hvdvae.strategies import Strategy

if TYPE_CHECKING:
    from hvdvae.parallel.pipeline import Pipeline

TERMS = ("loss", "rate", "distortion")
Loss = Callable[[nn.Module, Any, float], Tensor | Mapping[str, Tensor]]
"""(model, batch, epoch) to a scalar, or a mapping with `loss` in it; means over the batch."""


class Stepper:
    """Takes the steps of a run."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Strategy,
        loss: Loss | None,
        *,
        seed: int,
        schedule: Schedule | None,
        ema: MovingAverage | None,
        precision: str,
        skip_limit: int,
        pipeline: "Pipeline | None",
    ) -> None:
        """As the trainer has them. Local. Raises ConfigError where nobody has a loss."""
        if loss is None and pipeline is None:
            raise ConfigError("the trainer got loss None, expected a function (model, batch, epoch), or a pipeline")
        self._model, self._optimizer, self._loss, self._seed = model, optimizer, loss, seed
        self._schedule, self._ema, self._pipeline = schedule, ema, pipeline
        self._base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._device = optimizer.world.device
        self._autocast = mixed_precision(precision, self._device)
        self.scaler = torch.amp.GradScaler(self._device.type) if precision == "fp16" else None
        self._skip_limit = skip_limit
        self.overflows = 0
        """Skipped steps in which fp16 was looking for its scale: they do not count towards the limit."""
        self._nothing = torch.zeros((), device=self._device)

    def step(self, batch: Batch, number: int, epoch: float, pulse: Heartbeat) -> None:
        """Take step `number` of the run, at so many epochs. Blocks; every rank must call it. Mutates the model.

        Tells `pulse` of every pass. Raises NonFiniteError on all ranks once too many steps were skipped.
        """
        optimizer = self._optimizer
        self._set_learning_rates(epoch)
        # Ranks that compute one model together draw the same.
        seed_everything(self._device, self._seed, optimizer.world.rank, number)
        optimizer.zero_grad()
        passes = optimizer.backward_passes_per_step
        if self._pipeline is not None:
            done: Iterable[tuple[Mapping[str, Tensor], int]] = self._pipeline.run(batch, epoch, passes, self._autocast)
        else:
            done = self._backward(batch, epoch, passes)
        for values, examples in done:
            optimizer.watch(values["loss"])
            loss, rate, distortion = (values.get(name, self._nothing).detach() for name in TERMS)
            pulse.count(loss, rate, distortion, examples)
        self._update(number)

    def look(self, batches: Iterable[Batch], number: int, epoch: float) -> Iterator[None]:
        """Take batches through model and loss as in a step, and forget what comes of it, but for what layers keep.

        Noise is one of `number` and the batch's place. Blocks where layers do; every rank then takes equally many.
        """
        optimizer = self._optimizer
        for place, batch in enumerate(batches):
            seed_everything(self._device, self._seed, optimizer.world.rank, number, place)
            passes = optimizer.backward_passes_per_step
            if self._pipeline is not None:
                self._pipeline.run(batch, epoch, passes, self._autocast)
                optimizer.zero_grad()  # Stages know no forward without backward.
            else:
                assert self._loss is not None
                for micro in chunks(batch, passes):
                    with self._autocast:
                        self._loss(self._model, micro, epoch)
            yield

    def scale_learning_rates(self, factor: float) -> None:
        """Multiply them, now and as they will be. Local."""
        self._base_lrs = [lr * factor for lr in self._base_lrs]
        for group, lr in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr

    def _backward(self, batch: Batch, epoch: float, passes: int) -> Iterator[tuple[Mapping[str, Tensor], int]]:
        """Forward and backward, micro-batch by micro-batch; after each its losses and its number of examples."""
        examples = examples_of(batch)
        # A model that draws noise may draw that of the whole batch: the parts then come to what the batch does.
        # One that torch.compile has wrapped would be compiled anew for each.
        is_wrapped = hasattr(self._model, "_orig_mod")
        parts_of = getattr(self._model, "parts_of_batch", None) if not is_wrapped else None
        with parts_of(examples) if parts_of is not None and passes > 1 else nullcontext():
            yield from self._passes(chunks(batch, passes), epoch, passes, examples)

    def _passes(
        self, micros: Iterable[Batch], epoch: float, passes: int, examples: int
    ) -> Iterator[tuple[Mapping[str, Tensor], int]]:
        assert self._loss is not None
        for micro in micros:
            with self._autocast:
                result = self._loss(self._model, micro, epoch)
            values = values_of(result)
            micro_examples = examples if passes == 1 else examples_of(micro)
            # The strategy averages over passes; unequal micro-batches count by their examples.
            scaled = values["loss"] * (micro_examples / examples * passes) if passes > 1 else values["loss"]
            (self.scaler.scale(scaled) if self.scaler else scaled).backward()  # type: ignore[no-untyped-call]
            yield values, micro_examples

    def _update(self, number: int) -> None:
        optimizer = self._optimizer
        if self.scaler is not None:
            optimizer.synchronize()
            self.scaler.unscale_(optimizer)
            scale = self.scaler.get_scale()
        skipped = optimizer.skipped_steps
        optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
            # An overflow at a large scale is how the scale is found; the next, lower one may do.
            self.overflows += int(optimizer.skipped_steps > skipped and scale > 1.0)
        if optimizer.skipped_steps == skipped:
            if self._ema is not None:
                self._ema.update()
        elif optimizer.skipped_steps - self.overflows > self._skip_limit:
            raise NonFiniteError(
                f"skipped {optimizer.skipped_steps} steps because a loss or gradient was not finite on some rank "
                f"(--skip-limit {self._skip_limit}), the last at step {number}: lower --lr, set "
                "--clip-norm, or look for bad values in the data"
            )

    def _set_learning_rates(self, epoch: float) -> None:
        if self._schedule is None:
            return
        factor = self._schedule(epoch)
        for group, base in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base * factor


def values_of(result: Any) -> Mapping[str, Tensor]:
    """What a loss function returned, by name. Raises ConfigError where it is no loss."""
    values = result if isinstance(result, Mapping) else {"loss": result}
    for name in values.keys() & set(TERMS):
        value = values[name]
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"the loss function gave {found} for {name!r}, expected a tensor of one number")
        if value.dim():
            values = {**values, name: value.reshape(())}
    if "loss" not in values:
        raise ConfigError(f"the loss function gave a mapping of {sorted(values)}, expected 'loss' among them")
    return values


def mixed_precision(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """The arithmetic of forward and loss: fp32, bf16 or fp16. Local."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
