"""Where examples come from: one interface, whatever the file.

Shapes: N examples, B examples of a batch, then `shape`: (D,) for vectors, (C, H, W) for images.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hvdvae.data.layout import checked_dtype, checked_layout, converted
from hvdvae.errors import DataError

Indices = NDArray[np.int64]
Values = NDArray[np.uint8] | NDArray[np.float32]

LEAST_WHITE = 128
"""8-bit images have a pixel at least as bright: bytes that stay below it are counts, classes or genotypes."""

CHUNK_BYTES = 4 << 20
"""Scans over a whole source read it in pieces of about this size, so their memory is bounded."""


class Source(ABC):
    """N examples of one shape and dtype, read by index. Own formats: derive and set the first four fields."""

    path: str
    """The file or folder, for messages."""
    shape: tuple[int, ...]
    """Shape of one example: (D,) or (C, H, W)."""
    dtype: np.dtype
    """uint8 or float32, as `gather` returns it."""
    in_memory: bool
    """True: a gather costs about a memcpy, so a thread that prefetches would only take cycles."""
    white_is_255: bool = False
    """Whether bytes are of image files, where 255 is white however dark they are."""
    notes: tuple[str, ...] = ()
    """What else was done to the examples between the file and `gather`, each a few words for the start of a run."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples N."""

    @abstractmethod
    def gather(self, indices: Indices) -> Values:
        """Examples at `indices` (B,) in that order as a new array (B, *shape).

        Blocks while the file is read.
        """

    @cached_property
    def stored(self) -> np.dtype:
        """The dtype that the file has; `gather` returns `dtype`."""
        return self.dtype

    @property
    def nbytes(self) -> int:
        """Size of all examples in bytes, as `gather` would return them."""
        return len(self) * self.example_bytes

    @property
    def example_bytes(self) -> int:
        """Size of one example in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def spans(self) -> Iterator[Indices]:
        """All indices in order, in pieces whose examples take about CHUNK_BYTES."""
        step = max(1, CHUNK_BYTES // self.example_bytes)
        for start in range(0, len(self), step):
            yield np.arange(start, min(start + step, len(self)), dtype=np.int64)

    def chunks(self) -> Iterator[tuple[int, Values]]:
        """All examples in order as (index of the first, values), about CHUNK_BYTES at a time."""
        for span in self.spans():
            yield int(span[0]), self.gather(span)

    @cached_property
    def limits(self) -> tuple[float, float]:
        """An interval that holds all values: exact for floats; for uint8 0, and the greatest or 255.

        The first call reads the source in chunks: floats to the end, uint8 up to the first value of LEAST_WHITE or
        more, which stands for 255. Raises DataError at the first example that has a NaN or an infinity.
        """
        return _byte_limits(self) if self.dtype == np.uint8 else _float_limits(self)

    @cached_property
    def peak(self) -> int:
        """The stored value that means 1.0: 255, or 1 for floats and for uint8 that holds only 0 and 1."""
        return 255 if self.dtype == np.uint8 and self.limits[1] > 1 else 1


def _byte_limits(source: Source) -> tuple[float, float]:
    high = 1
    for _, values in source.chunks():
        high = max(high, int(values.max()))
        if high >= LEAST_WHITE:
            return 0.0, 255.0
    return 0.0, float(high)


def _float_limits(source: Source) -> tuple[float, float]:
    low, high = np.inf, -np.inf
    for start, values in source.chunks():
        chunk_low, chunk_high = float(values.min()), float(values.max())  # both pass a NaN on
        if not (np.isfinite(chunk_low) and np.isfinite(chunk_high)):
            bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
            raise DataError(
                f"{source.path}: found a NaN, an infinity or a number beyond float32 in example "
                f"{start + int(np.argmax(bad))}; expected finite values: remove or repair such examples"
            )
        low, high = min(low, chunk_low), max(high, chunk_high)
    return low, high


class ArraySource(Source):
    """Source over an ndarray or memmap of shape (N, D), (N, H, W), (N, C, H, W) or (N, H, W, C).

    The array is kept, not copied, save where it is in memory and would have to be rearranged for every
    batch: not contiguous, or numbers other than uint8 and native float32. A memmap is converted, and channels are
    moved, batch by batch. Raises DataError for a dtype or rank that is not data, and for an empty array.
    """

    def __init__(self, array: np.ndarray, path: str) -> None:
        layout = checked_layout(array.shape, path)
        self.stored, self.dtype = array.dtype, checked_dtype(array.dtype, path)
        self.path, self.shape = path, layout.shape
        self.in_memory = not isinstance(array, np.memmap)
        if array.dtype == np.bool_ and self.in_memory:
            array = array.view(np.uint8)
            if (array > 1).any():  # A damaged file may hold such, which count as true.
                array = (array > 0).view(np.uint8)
        if self.in_memory:
            array = np.ascontiguousarray(converted(array, self.dtype))
        # Rows of the flat view are one memcpy each. np.take would copy a whole array that is not contiguous.
        self._contiguous = array.flags.c_contiguous
        if not self._contiguous:
            warnings.warn(
                f"{path}: examples of this memory map lie scattered, and are slow to read: give open_dataset the file, "
                "which lays them anew, or map numpy.ascontiguousarray(array)",
                stacklevel=2,
            )
        self._rows = array.reshape(len(array), -1) if self._contiguous else array
        self._last = (array.shape[1:], layout.channels_last)

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, indices: Indices) -> Values:
        rows = np.take(self._rows, indices, axis=0) if self._contiguous else self._rows[indices]
        batch = converted(rows, self.dtype)
        stored_shape, channels_last = self._last
        if channels_last:
            batch = np.moveaxis(batch.reshape(-1, *stored_shape), 3, 1)
        return np.ascontiguousarray(batch).reshape(-1, *self.shape)


def base_of(source: Source) -> Source:
    """The source that a subset is of; of any other source, itself."""
    return source.base if isinstance(source, Subset) else source


class Subset(Source):
    """Some examples of another source, which it shares: `rows` (M,) are their indices there.

    Copies no data.
    """

    def __init__(self, base: Source, rows: Indices) -> None:
        if len(rows) == 0:
            raise DataError(f"{base.path}: found no example left for a split; expected at least one: add examples")
        self.base = base
        self._base_rows = np.asarray(rows, dtype=np.int64)
        self.path, self.shape, self.dtype, self.in_memory = base.path, base.shape, base.dtype, base.in_memory
        self.stored, self.white_is_255, self.notes = base.stored, base.white_is_255, base.notes

    def __len__(self) -> int:
        return len(self._base_rows)

    def gather(self, indices: Indices) -> Values:
        return self.base.gather(self._base_rows[indices])

    @cached_property
    def limits(self) -> tuple[float, float]:
        """Those of the whole source, so that a file is scanned once however it is split."""
        return self.base.limits

    @cached_property
    def peak(self) -> int:
        """That of the whole source."""
        return self.base.peak
