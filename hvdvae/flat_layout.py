"""Where tensors stand in a vector: one after the other, each at a multiple of 64 bytes, with zeros in the gaps.

Shapes: P elements of the vector, D of the tensors themselves, which is what is counted, sent by codecs and saved.
Kernels may then read a tensor as they read any that torch has allocated: in blocks of 16 bytes, as complex numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 64
"""Bytes, as torch's own allocations are."""


class Runs:
    """The parts (P,) of a vector that hold numbers, without the gaps between them."""

    def __init__(self, parts: Sequence[slice], length: int) -> None:
        """`parts`: in order, not overlapping; neighbours become one. `length`: P."""
        self.length = length
        self._parts: list[slice] = []
        for part in parts:
            if part.stop == part.start:
                continue
            if self._parts and self._parts[-1].stop == part.start:
                self._parts[-1] = slice(self._parts[-1].start, part.stop)
            else:
                self._parts.append(part)
        self.count = sum(part.stop - part.start for part in self._parts)
        """D."""

    @property
    def ends(self) -> list[list[int]]:
        """Start and stop of each part, JSON-able."""
        return [[part.start, part.stop] for part in self._parts]

    def within(self, piece: slice) -> "Runs":
        """Those of a piece of the vector, counted from its start."""
        cut = [slice(max(p.start, piece.start), min(p.stop, piece.stop)) for p in self._parts]
        own = [slice(p.start - piece.start, p.stop - piece.start) for p in cut if p.stop > p.start]
        return Runs(own, piece.stop - piece.start)

    def dense(self, vector: Tensor) -> Tensor:
        """The numbers (D,) of a vector (P,): a copy, or the vector itself where it has no gaps."""
        if self.count == self.length:
            return vector
        return torch.cat([vector[part] for part in self._parts]) if self._parts else vector[:0]

    def spread(self, dense: Tensor, vector: Tensor) -> None:
        """Write numbers (D,) into a vector (P,), which may be the same; its gaps stay as they are."""
        if self.count == self.length:
            if vector.data_ptr() != dense.data_ptr():
                vector.copy_(dense)
            return
        start = 0
        for part in self._parts:
            stop = start + part.stop - part.start
            vector[part].copy_(dense[start:stop])
            start = stop


class Layout:
    """Of groups of tensors, whose slices follow each other without a gap between them."""

    def __init__(self, groups: Sequence[Sequence[int]], itemsize: int) -> None:
        """`groups`: elements of each tensor; `itemsize`: bytes of one."""
        step = ALIGNED // itemsize
        self.places: list[slice] = []
        """Of each tensor."""
        self.dense_places: list[slice] = []
        """Where each stands without the gaps, in (D,)."""
        self.groups: list[slice] = []
        """Of each group, with the gap behind each of its tensors."""
        start = 0
        for group in groups:
            first = start
            for count in group:
                self.places.append(slice(start, start + count))
                before = self.dense_places[-1].stop if self.dense_places else 0
                self.dense_places.append(slice(before, before + count))
                start += -(-count // step) * step
            self.groups.append(slice(first, start))
        self.length = start
        """P."""
        self.runs = Runs(self.places, start)
