"""255 levels a chunk, rounded at random so that the mean is right: QSGD (Alistarh et al. 2017) with the maximum norm.

One message:

    scales (ceil(P / 1024)) float32, levels (P) int8
"""

import math

import torch
from torch import Tensor

from hvdvae.compression.blocks import BLOCK, blocks
from hvdvae.compression.codec import Gathered

CHUNK, LEVELS = 1024, 127


class Int8(Gathered):
    """value = scale * level / 127, where the scale is the chunk's largest size."""

    name = "int8"

    def __init__(self, length: int) -> None:
        """`length`: P."""
        self._length, self._chunks = length, math.ceil(length / CHUNK)
        self.nbytes = 4 * self._chunks + length
        # Random numbers cost more than all else: a block's worth, begun at a random place for each block.
        self._noise = torch.rand(2 * BLOCK, generator=torch.Generator().manual_seed(0))
        self._drawn = torch.empty(min(BLOCK, length))

    def encode(self, vector: Tensor, message: Tensor, key: int) -> None:
        """As Gathered's."""
        scales, levels = self._parts(message)
        offsets = torch.randint(BLOCK, (self._length // BLOCK + 2,), generator=torch.Generator().manual_seed(key))
        for (part, chunks, size), offset in zip(blocks(self._length, CHUNK), offsets.tolist(), strict=False):
            block = vector[part].view(-1, size)
            drawn = self._drawn[: block.numel()].view(-1, size)
            scale = torch.abs(block, out=drawn).amax(1, keepdim=True)
            scales[chunks].copy_(scale.view(-1))
            # A chunk of zeros has no scale to divide by.
            torch.mul(block, torch.where(scale == 0, 0.0, LEVELS / scale), out=drawn)
            drawn.add_(self._noise[offset : offset + drawn.numel()].view(-1, size)).floor_()
            levels[part].copy_(drawn.clamp_(-LEVELS, LEVELS).view(-1))

    def add(self, message: Tensor, total: Tensor) -> None:
        """As Gathered's."""
        scales, levels = self._parts(message)
        for part, chunks, size in blocks(self._length, CHUNK):
            step = (scales[chunks] / LEVELS).view(-1, 1)
            total[part].view(-1, size).addcmul_(levels[part].view(-1, size).float(), step)

    def _parts(self, message: Tensor) -> tuple[Tensor, Tensor]:
        return message[: 4 * self._chunks].view(torch.float32), message[4 * self._chunks :].view(torch.int8)
