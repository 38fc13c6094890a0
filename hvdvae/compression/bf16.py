"""The upper half of a float32: 2 bytes an element, its range, two digits.

Never summed by MPI, which knows no such type: messages are decoded first.
"""

import torch
from torch import Tensor

from hvdvae.compression.codec import Gathered


class Bf16(Gathered):
    """bfloat16, rounded to the nearest."""

    name = "bf16"
    is_elementwise = True

    def __init__(self, length: int) -> None:
        """`length`: P."""
        self.nbytes = 2 * length

    def encode(self, vector: Tensor, message: Tensor, key: int) -> None:
        """As Gathered's."""
        message.view(torch.bfloat16).copy_(vector)

    def add(self, message: Tensor, total: Tensor) -> None:
        """As Gathered's."""
        total.add_(message.view(torch.bfloat16))
