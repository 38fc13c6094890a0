"""What a checkpoint holds: named tensors, and a JSON-able record of everything else.

Whole in memory (`Checkpoint`), or to come tensor by tensor: on its way to a file (`Draft`), or from one (`Source`). So
no rank need ever hold all of a model that ranks hold together.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Piece(NamedTuple):
    """A tensor that a checkpoint will hold."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    get: Callable[[], Tensor]
    """Where ranks hold it together, it blocks, and all of them ask for their pieces in the order of names."""

    @classmethod
    def of(cls, tensor: Tensor) -> "Piece":
        """Of one that is there."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


class Draft(NamedTuple):
    """A checkpoint that is to be written."""

    pieces: dict[str, Piece]
    record: dict[str, Any]

    def ask(self) -> None:
        """Ask for every piece, as the rank does that writes them. Blocks where ranks hold one together."""
        for name in sorted(self.pieces):
            self.pieces[name].get()

    def taken(self) -> "Checkpoint":
        """In memory, of this rank alone. Local."""
        return Checkpoint({name: piece.get() for name, piece in self.pieces.items()}, self.record)


class Source(Protocol):
    """A checkpoint that comes tensor by tensor."""

    @property
    def name(self) -> str:
        """For messages: the file that it comes from."""

    @property
    def record(self) -> dict[str, Any]:
        """Everything else."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all tensors."""

    def each(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Tensors of a kind, by their names without it. Blocks; every rank must call it, to the end."""


class Checkpoint(NamedTuple):
    """One that is in memory; a `Source`, too."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    name: str = "the checkpoint"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def each(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """As Source's. Local."""
        for name in self.tensors:
            if kind_of(name) == kind:
                yield name.partition("/")[2], self.tensors[name]

    def draft(self) -> Draft:
        """To be written."""
        return Draft({name: Piece.of(tensor) for name, tensor in self.tensors.items()}, self.record)


def kind_of(name: str) -> str:
    """model/encoder.weight is of kind model."""
    return name.partition("/")[0]
