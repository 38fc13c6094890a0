"""What the loop of a study asks of whoever takes part, on one rank."""

from typing import Any, Protocol

from torch import nn


class Contender(Protocol):
    """One rank of one way of parallelizing. All methods block; but for `end`, every rank that trains calls them."""

    model: nn.Module
    """What the loss is computed with."""
    rank: int
    size: int
    """Among those that train."""
    steps_together: bool
    """Whether all ranks take the same steps."""

    def prepare(self) -> None:
        """Begin: all ranks return at about the same moment, with the same weights."""

    def zero_grad(self) -> None:
        """Before the backward pass. Local."""

    def exchange(self) -> None:
        """What follows the backward pass and is other ranks' affair too."""

    def update(self) -> None:
        """What is left of a step. Local."""

    def steps_done(self) -> int:
        """Of all ranks together, as far as this one knows. Local."""

    def any(self, flag: bool) -> bool:
        """Whether some rank says so; where ranks do not step together, whether this one does."""

    def look(self) -> Any:
        """A context manager inside which the first rank's `model` has the weights that would be kept."""

    def end(self) -> dict[str, Any]:
        """Stop training. What the contender itself counted, JSON-able."""
