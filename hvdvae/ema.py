"""An exponential moving average of the weights, as one vector (for VAEs: Vahdat & Kautz 2020)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hvdvae.flat import FlatModel


class MovingAverage:
    """The average of a parameter vector (P,) over steps: average <- decay * average + (1 - decay) * parameters."""

    def __init__(self, parameters: Tensor, decay: float, *, holder: FlatModel | None = None) -> None:
        """Start at the present values; `decay` in (0, 1). `holder`: whose parameters lie in that vector, if a model's.

        Its modules may then give them other storages in forward.
        """
        self.decay = decay
        self.average = parameters.detach().clone()
        self._parameters, self._holder = parameters, holder

    @torch.no_grad()
    def update(self) -> None:
        """Take the present parameters in. Local; equal on ranks that hold equal parameters."""
        self.average.lerp_(self._parameters, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the average inside, its own weights again after. Copies (P,) once."""
        if self._holder is not None:
            self._holder.take_back()
        own = self._parameters.clone()
        self._write(self.average)
        try:
            yield
        finally:
            self._write(own)

    def _write(self, values: Tensor) -> None:
        self._parameters.copy_(values)
        if self._holder is not None:
            self._holder.publish()
