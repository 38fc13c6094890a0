"""How many backward passes a step's gradient is of, where several are accumulated before a step."""

from collections.abc import Sequence

from torch import Tensor, nn

from hvdvae.strategies.gradient_hooks import call_after


class Passes:
    """Of one rank. A pass too few (the end of an epoch) is noticed; one too many is not: it may be a second loss."""

    def __init__(self, expected: int, tensors: Sequence[nn.Parameter]) -> None:
        """`expected`: a step; counts nothing where it is 1. Local."""
        self.expected = expected
        self._counts = [0] * len(tensors)
        if expected > 1:
            call_after(tensors, self, Passes._count)

    @property
    def made(self) -> int:
        """Since the last `clear`: of the parameter with the most gradients, at most `expected`."""
        return min(self.expected, max(self._counts, default=0))

    def clear(self) -> None:
        """Count anew. Local."""
        self._counts = [0] * len(self._counts)

    def _count(self, number: int, parameter: Tensor) -> None:
        self._counts[number] += 1
