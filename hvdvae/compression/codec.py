"""What all codecs are: one of two kinds.

Shapes: P elements of a vector, float32; B bytes of a message.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor


class Gathered(ABC):
    """A vector as one message of fixed length, which others decode by themselves."""

    name = ""
    needs_feedback = False
    """Whether what a message leaves out must be remembered, and sent later."""
    is_elementwise = False
    """Whether each element's bytes stand by themselves, so that a slice of a message is the message of a slice."""
    nbytes = 0
    """B."""

    def memory(self) -> dict[str, Tensor]:
        """What the codec itself keeps from one vector to the next, by name."""
        return {}

    @abstractmethod
    def encode(self, vector: Tensor, message: Tensor, key: int) -> None:
        """Write a vector (P,) to a message (B,) uint8. Leaves the vector alone.

        `key`: of what is random; other messages shall have other keys.
        """

    @abstractmethod
    def add(self, message: Tensor, total: Tensor) -> None:
        """Add what a message (B,) says to `total` (P,), in place."""


class Averaged(ABC):
    """A vector as some shorter ones whose mean over ranks says the mean of the vectors."""

    name = ""
    needs_feedback = True

    def memory(self) -> dict[str, Tensor]:
        """What the codec itself keeps from one vector to the next, by name; the same on all ranks."""
        return {}

    @abstractmethod
    def average(self, vector: Tensor, sent: Tensor, key: int) -> Iterator[Tensor]:
        """Replace `vector` (P,) by the mean of what all ranks say; `sent` (P,) becomes what this one said.

        Yields contiguous float32 vectors, each to be replaced by its mean over ranks before the next is asked for.
        `key`: the same on all ranks.
        """
