"""BatchNorm statistics of averaged weights: those of the weights that are trained are not theirs.

A few batches are taken through the averaged model, as torch.optim.swa_utils.update_bn does (Izmailov et al. 2018): an
average of the statistics would be exact for linear functions of the weights alone, and a variance is none.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hvdvae.strategies import Strategy

BATCHES = 32
"""At most, of each rank. Running statistics with torch's momentum of 0.1 remember about 19."""


class AveragedStatistics:
    """Of one model, on every rank."""

    def __init__(self, model: nn.Module, optimizer: Strategy) -> None:
        """Nothing is known yet. `model`: what is wrapped by `optimizer`, compiled or not."""
        self._model, self._optimizer = model, optimizer
        self.values: dict[str, Tensor] = {}
        """Means and variances, by the names of the buffers; empty before the first `measure`."""
        self._step = -1
        self._has_some: bool | None = None
        """Whether a layer of the whole model keeps any; None: not known yet."""

    def measure(self, step: int, forward: Callable[[], Iterable[Any]]) -> None:
        """Take what `forward` computes, batch by batch; the averaged weights are the model's meanwhile.

        Nothing is done where it was for `step`, or where no layer keeps statistics. The model's own stay as they are.
        Blocks, inside the strategy's `fetched`; every rank that enters that must call it, with equally many batches.
        """
        if step == self._step:
            return
        layers = [layer for _, layer in self._layers()]
        parts = self._optimizer.parts
        if self._has_some is None:
            has_some = torch.tensor([int(bool(layers))])
            if parts is not None:
                parts.groups.model.max_(has_some, "agreement on statistics")  # Stages compute together, or not at all.
            self._has_some = bool(has_some)
        if not self._has_some:
            return
        flat, was_training = self._optimizer.flat, self._model.training
        _ = flat.buffers  # What forward has put in the place of one is in it.
        kept = [(buffer, buffer.clone()) for buffer in self._optimizer.model.buffers()]
        momenta = [layer.momentum for layer in layers]
        self._model.train()
        # Of layers that the model itself keeps from learning (frozen ones in eval mode) they stay.
        learning = [layer for layer in layers if layer.training]
        try:
            for layer in learning:
                layer.reset_running_stats()
                layer.momentum = None  # All batches count alike.
            if learning or parts is not None:
                with torch.enable_grad():  # As losses with gradients in them expect it.
                    for _ in forward():
                        pass
            vector = flat.buffers
            if self._optimizer.synchronous:
                self._optimizer.sum_(vector).div_(len(self._optimizer.peers))
            self.values = {name: buffer.clone() for name, buffer in self._statistics()}
            self._step = step
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
            _ = flat.buffers
            with torch.no_grad():
                for buffer, before in kept:
                    buffer.copy_(before)
            self._model.train(was_training)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has them inside, its own again after. Local."""
        _ = self._optimizer.flat.buffers
        held = dict(self._statistics())
        own = {name: held[name].clone() for name in self.values.keys() & held.keys()}
        try:
            with torch.no_grad():
                for name in own:
                    held[name].copy_(self.values[name])
            yield
        finally:
            with torch.no_grad():
                for name, before in own.items():
                    held[name].copy_(before)

    def load(self, name: str, value: Tensor) -> bool:
        """Take one of a checkpoint. Returns whether the model has such a buffer; raises as copy_ does."""
        held = dict(self._statistics())
        if name in held:
            self.values[name] = held[name].clone().copy_(value)
        return name in held

    def _layers(self) -> Iterator[tuple[str, Any]]:
        """With statistics over batches: torch's BatchNorm and InstanceNorm, and what is built like them."""
        for path, layer in self._optimizer.model.named_modules():
            if isinstance(getattr(layer, "running_mean", None), Tensor) and hasattr(layer, "reset_running_stats"):
                yield path, layer

    def _statistics(self) -> Iterator[tuple[str, Tensor]]:
        saved = self._optimizer.model.state_dict().keys()
        for path, layer in self._layers():
            for name, buffer in layer.named_buffers(recurse=False):
                whole = f"{path}.{name}" if path else name
                if whole in saved and buffer.is_floating_point():
                    yield whole, buffer
