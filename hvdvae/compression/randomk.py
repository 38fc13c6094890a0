"""Elements at random places, the same on all ranks, so that only values travel and are averaged as they are.

With error feedback (Stich et al. 2018).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hvdvae.compression.codec import Averaged
from hvdvae.compression.share import count_of


class RandomK(Averaged):
    """k elements, and zero for all others."""

    name = "randomk"

    def __init__(self, length: int, share: float) -> None:
        """`length`: P. Raises ConfigError."""
        self._length, self._k = length, count_of(length, share)

    def average(self, vector: Tensor, sent: Tensor, key: int) -> Iterator[Tensor]:
        """As Averaged's."""
        if not self._length:
            return
        places = self._places(key)
        values = vector[places]
        sent.zero_().index_copy_(0, places, values)
        yield values
        vector.zero_().index_copy_(0, places, values)

    def _places(self, key: int) -> Tensor:
        """(k,), each once: an affine walk around the vector, which needs no permutation of all of it."""
        generator = torch.Generator().manual_seed(key)
        start, stride = torch.randint(self._length, (2,), generator=generator).tolist()
        while math.gcd(stride, self._length) != 1:
            stride += 1
        places: Tensor = (start + stride * torch.arange(self._k)) % self._length
        return places
