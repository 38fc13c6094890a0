"""The largest elements and their places (Aji and Heafield 2017; Lin et al. 2018, Deep Gradient Compression).

message: places (k) int32, values (k) float32
"""

import torch
from torch import Tensor

from hvdvae.compression.codec import Gathered
from hvdvae.compression.share import count_of
from hvdvae.errors import ConfigError

SAMPLE = 8192
"""Elements by which a threshold is guessed; the choice among those above it is exact."""


class TopK(Gathered):
    """The k elements of largest size, and zero for all others."""

    name = "topk"
    needs_feedback = True

    def __init__(self, length: int, share: float) -> None:
        """`length`: P. Raises ConfigError."""
        if length >= 2**31:
            raise ConfigError(f"--compression topk counts places in 32 bits, found {length:,} parameters: use randomk")
        self._k = count_of(length, share)
        self._sample = torch.arange(0, length, max(1, length // SAMPLE))
        self.nbytes = 8 * self._k

    def encode(self, vector: Tensor, message: Tensor, key: int) -> None:
        """As Gathered's."""
        places, values = self._parts(message)
        chosen = self._largest(vector.abs())
        places.copy_(chosen)
        torch.index_select(vector, 0, chosen, out=values)

    def add(self, message: Tensor, total: Tensor) -> None:
        """As Gathered's."""
        places, values = self._parts(message)
        total.index_add_(0, places, values)

    def _largest(self, sizes: Tensor) -> Tensor:
        """Places (k,), rising. To sort all of them would take several times as long."""
        if not sizes.numel():
            return torch.empty(0, dtype=torch.int64)
        sample = sizes[self._sample]
        # Half as many again as are wanted: rarely too few.
        rank = min(sample.numel(), 1 + int(1.5 * self._k / sizes.numel() * sample.numel()) + 3)
        threshold = sample.topk(rank).values[-1]
        candidates = (sizes >= threshold).nonzero().view(-1)
        if candidates.numel() < self._k:
            return sizes.topk(self._k).indices.sort().values
        return candidates[sizes[candidates].topk(self._k).indices].sort().values

    def _parts(self, message: Tensor) -> tuple[Tensor, Tensor]:
        return message[: 4 * self._k].view(torch.int32), message[4 * self._k :].view(torch.float32)
