"""Arrays that lie in a file as they are: read once if they are small, else row by row from the file, which is held."""

import os
import tempfile

import numpy as np

from hvdvae.data.held_file import HeldFile
from hvdvae.data.layout import checked_dtype, checked_layout, converted
from hvdvae.data.source import ArraySource, Indices, Source, Values
from hvdvae.errors import DataError

IN_MEMORY_BYTES = 1 << 30
"""Arrays up to this size are read into memory. A constant: ranks, and a run that is resumed, must come to the same."""
LAID_ANEW = "stored in Fortran order, laid anew in memory"
BLOCK_BYTES = 64 << 20
"""An array in Fortran order is laid anew in blocks of this size."""


def array_source(
    file: HeldFile, offset: int, shape: tuple[int, ...], dtype: np.dtype, label: str, *, fortran: bool = False
) -> Source:
    """Source over an array of `shape` and `dtype` from `offset` on in a file.

    One in Fortran order, whose examples lie scattered, is laid anew: in memory, or in a temporary file. Blocks while it
    is read. Raises DataError where the file ends before the array does, or has no room in the temporary folder.
    """
    row_bytes = int(np.prod(shape[1:], dtype=object)) * dtype.itemsize
    total = shape[0] * row_bytes
    if file.size < offset + total:
        found = max(0, file.size - offset)
        raise DataError(f"{label}: found {found} bytes of data; expected {total} for shape {shape}: save it again")
    read_as = checked_dtype(dtype, label)
    if max(total, total // dtype.itemsize * read_as.itemsize) <= IN_MEMORY_BYTES:
        array = np.empty(shape, dtype, order="F" if fortran else "C")
        file.read_into(array.reshape(-1, order="A").view(np.uint8).data, offset)
        source: Source = ArraySource(array, label)
        if fortran:
            source.notes = (LAID_ANEW,)
        return source
    if not fortran:
        return RowSource(file, offset, shape, dtype, label)
    source = RowSource(_laid_anew(file, offset, shape, dtype, label), 0, shape, dtype, label)
    source.notes = (
        f"stored in Fortran order, laid anew in a temporary file of {total / 1e9:.1f} GB in {tempfile.gettempdir()}; "
        "numpy.ascontiguousarray before saving spares that",
    )
    return source


class RowSource(Source):
    """Rows that are read from a file at each gather, all of an example in one piece."""

    in_memory = False

    def __init__(self, file: HeldFile, offset: int, shape: tuple[int, ...], dtype: np.dtype, label: str) -> None:
        layout = checked_layout(shape, label)
        self.path, self.shape, self.dtype, self.stored = label, layout.shape, checked_dtype(dtype, label), dtype
        self._file, self._offset, self._count = file, offset, shape[0]
        self._row_shape, self._channels_last = shape[1:], layout.channels_last
        self._row_bytes = int(np.prod(self._row_shape)) * dtype.itemsize

    def __len__(self) -> int:
        return self._count

    def gather(self, indices: Indices) -> Values:
        if len(indices) == 0:
            return np.empty((0, *self.shape), self.dtype)
        wanted = indices.tolist()
        if min(wanted) < 0 or max(wanted) >= self._count:
            raise IndexError(f"{self.path} has {self._count} examples, {min(wanted)} to {max(wanted)} are wanted")
        rows = np.frombuffer(self._file.rows(self._offset, self._row_bytes, wanted), self.stored)
        batch = converted(rows.reshape(-1, *self._row_shape), self.dtype)
        if self._channels_last:
            batch = np.moveaxis(batch, 3, 1)
        return np.ascontiguousarray(batch).reshape(-1, *self.shape)


def _laid_anew(file: HeldFile, offset: int, shape: tuple[int, ...], dtype: np.dtype, label: str) -> HeldFile:
    """A temporary file without a name with the rows of an array in Fortran order one after the other."""
    count, columns = shape[0], int(np.prod(shape[1:]))
    step = max(1, BLOCK_BYTES // (columns * dtype.itemsize))
    # In Fortran order the first axis runs fastest: the file is (columns, count), the columns in Fortran order, too.
    block = np.empty((columns, min(step, count)), dtype)
    try:
        with tempfile.TemporaryFile() as rows:
            for start in range(0, count, step):
                size = min(step, count - start)
                for column in range(columns):
                    target = block[column, :size].view(np.uint8).data
                    file.read_into(target, offset + (column * count + start) * dtype.itemsize)
                some = block[:, :size].T.reshape(size, *shape[:0:-1]).transpose(0, *range(len(shape) - 1, 0, -1))
                rows.write(np.ascontiguousarray(some).data)
            rows.flush()
            return HeldFile(label, os.dup(rows.fileno()))
    except OSError as error:
        raise DataError(
            f"{label}: stored in Fortran order, and no room to lay it anew in {tempfile.gettempdir()} ({error}); "
            f"expected {count * columns * dtype.itemsize} bytes there: set TMPDIR to another folder, or save "
            "numpy.ascontiguousarray(array)"
        ) from error
