"""Noise of all examples of a batch, drawn at once: its parts, one after the other, get what the whole batch would.

Shapes: B examples of a part, K samples of each, L latent dimensions of a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class BatchNoise:
    """Standard normal, from torch's default generator, as a model draws it for the whole batch."""

    def __init__(self, examples: int) -> None:
        """Of a batch of so many; drawn when the first part asks."""
        self._examples, self._given = examples, 0
        self._drawn: list[Tensor] = []

    def rows(self, place: slice, samples: int, sizes: Sequence[int], device: torch.device) -> list[Tensor]:
        """(K, B, L) of each layer, bottom up, for the examples of `place`."""
        if not self._drawn:
            self._drawn = [torch.randn(samples, self._examples, size, device=device) for size in sizes]
        return [noise[:, place] for noise in self._drawn]

    def next(self, count: int, samples: int, sizes: Sequence[int], device: torch.device) -> list[Tensor] | None:
        """The same for the next `count` examples; None where there are not so many left, or K is another.

        So a loss that asks more than once for an example draws for itself.
        """
        place = slice(self._given, self._given + count)
        if place.stop > self._examples or (self._drawn and len(self._drawn[0]) != samples):
            return None
        self._given += count
        return self.rows(place, samples, sizes, device)
