"""Half precision: 2 bytes an element, three digits, up to 65,504; a step with larger ones is skipped."""

import torch
from torch import Tensor

from hvdvae.compression.codec import Gathered

LARGEST = 65504.0
"""Beyond that it is infinity."""


class Fp16(Gathered):
    """IEEE binary16, rounded to the nearest."""

    name = "fp16"
    is_elementwise = True

    def __init__(self, length: int) -> None:
        """`length`: P."""
        self.nbytes = 2 * length

    def encode(self, vector: Tensor, message: Tensor, key: int) -> None:
        """As Gathered's."""
        message.view(torch.float16).copy_(vector)

    def add(self, message: Tensor, total: Tensor) -> None:
        """As Gathered's."""
        total.add_(message.view(torch.float16))
