"""One bit an element and the mean size of its chunk (Seide et al. 2014; scaled sign, Karimireddy et al. 2019).

message: sizes (ceil(P / 4096)) float32, bits (ceil(P / 8)) uint8, the first element in the highest bit
"""

import math

import numpy as np
import torch
from torch import Tensor

from hvdvae.compression.blocks import blocks
from hvdvae.compression.codec import Gathered

CHUNK = 4096


class Sign(Gathered):
    """value = +- the mean size of its chunk."""

    name = "sign"
    needs_feedback = True

    def __init__(self, length: int) -> None:
        """`length`: P."""
        self._length, self._chunks = length, math.ceil(length / CHUNK)
        self.nbytes = 4 * self._chunks + math.ceil(length / 8)

    def encode(self, vector: Tensor, message: Tensor, key: int) -> None:
        """As Gathered's."""
        sizes, bits = self._parts(message)
        for part, chunks, size in blocks(self._length, CHUNK):
            block = vector[part]
            sizes[chunks].copy_(torch.linalg.vector_norm(block.view(-1, size), 1, dim=1).div_(size))
            bits[_bytes(part)].copy_(torch.from_numpy(np.packbits((block >= 0).numpy())))

    def add(self, message: Tensor, total: Tensor) -> None:
        """As Gathered's."""
        sizes, bits = self._parts(message)
        for part, chunks, size in blocks(self._length, CHUNK):
            positive = torch.from_numpy(np.unpackbits(bits[_bytes(part)].numpy(), count=part.stop - part.start))
            mean = sizes[chunks].view(-1, 1)
            total[part].view(-1, size).addcmul_(positive.view(-1, size).float(), 2 * mean).sub_(mean)

    def _parts(self, message: Tensor) -> tuple[Tensor, Tensor]:
        return message[: 4 * self._chunks].view(torch.float32), message[4 * self._chunks :]


def _bytes(part: slice) -> slice:
    """Chunks begin at whole bytes."""
    return slice(part.start // 8, math.ceil(part.stop / 8))
