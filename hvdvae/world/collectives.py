"""What ranks say to each other besides gradients: small sums, maxima, broadcasts, gathered records.

Three carriers give the same contract: `Alone` (size 1, imports nothing), `MpiCollectives` (mpi.py) and
`HorovodCollectives` (gloo.py, where there is no MPI). All calls block and must be made by all ranks in the same order.
Arrays are contiguous NumPy arrays of float32, float64, int64 or uint8, changed in place.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Collectives(Protocol):
    """The contract of a carrier. Every method blocks; every rank must call it."""

    rank: int
    size: int

    def sum_(self, array: Array) -> None:
        """Sum over ranks, in place; the same bits on every rank."""

    def max_(self, array: Array) -> None:
        """Elementwise maximum over ranks, in place."""

    def broadcast_(self, array: Array, root: int) -> None:
        """Overwrite the array with root's."""

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order, on every rank."""

    def gather_rows(self, row: Array, rows: Array) -> None:
        """Every rank's `row` (n,), equally long on all, to `rows` (size, n)."""

    def exchange_rows(self, rows: Array, found: Array) -> None:
        """Row j of every rank's `rows` (size, n), equally long on all, to rank j's `found` (size, n)."""

    def barrier(self) -> None:
        """Return once every rank has called."""

    def revoke(self) -> None:
        """End the others' waits, since a rank has died; local."""

    def shrink(self) -> None:
        """Go on without the ranks that have died."""


class Alone:
    """The world of one process."""

    rank = 0
    size = 1

    def sum_(self, array: Array) -> None:
        """A sum over one rank."""

    def max_(self, array: Array) -> None:
        """A maximum over one rank."""

    def broadcast_(self, array: Array, root: int) -> None:
        """A broadcast to oneself."""

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """One's own bytes."""
        return [data]

    def gather_rows(self, row: Array, rows: Array) -> None:
        """One's own row."""
        rows[0] = row

    def exchange_rows(self, rows: Array, found: Array) -> None:
        """One's own row."""
        found[:] = rows

    def barrier(self) -> None:
        """Nobody to wait for."""

    def revoke(self) -> None:
        """Nobody waits."""

    def shrink(self) -> None:
        """Nobody to lose."""


def unequal_lengths(lengths: list[int]) -> list[slice]:
    """Where each rank's bytes stand in the concatenation of all, shape (size,)."""
    ends = np.cumsum(lengths)
    return [slice(int(end) - length, int(end)) for end, length in zip(ends, lengths, strict=True)]


def slice_of(length: int, rank: int, size: int) -> slice:
    """The slice of `rank` where `size` ranks share a vector of `length` elements; the first ones are longer. Pure."""
    share, left = divmod(length, size)
    start = rank * share + min(rank, left)
    return slice(start, start + share + (rank < left))
