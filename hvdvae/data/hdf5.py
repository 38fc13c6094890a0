"""HDF5: data sets are read once if they are small; large ones row by row from the file, or chunk by chunk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np

from hvdvae.data.array_file import RowSource
from hvdvae.data.hdf5_checks import check_whole, follow, why_not_open
from hvdvae.data.held_file import HeldFile
from hvdvae.data.layout import checked_dtype, checked_layout, converted
from hvdvae.data.source import ArraySource, Indices, Source, Values
from hvdvae.data.split import pick_splits
from hvdvae.errors import DataError

IN_MEMORY_BYTES = 1 << 30
"""A data set up to this size is read into memory: random rows of it would decompress whole chunks."""
MOST_CHUNK_BYTES = 64 << 20
"""What a chunk may become where it is decompressed again and again; so much of them is kept for each data set."""
_SLOTS = 10_007  # Of the cache of chunks; a prime, as HDF5 advises.


def open_hdf5(
    path: Path, *, in_memory_bytes: int = IN_MEMORY_BYTES, external_storage: bool = False
) -> dict[str, Source]:
    """Sources of an HDF5 file by split: train, validation or valid, test; or one data set, as train.

    Every layout is read as HDF5 reads it. Data sets that stay on disk keep their files open. Raises DataError for a
    file that a writer holds or that is torn, unclear names, what is not data, and what HDF5 would read in part alone,
    or from any file of this machine (`external_storage` allows that).
    """
    try:
        file = h5py.File(path, "r", rdcc_nbytes=MOST_CHUNK_BYTES, rdcc_nslots=_SLOTS)
        found = _open_splits(file, path, in_memory_bytes, external_storage)
        if all(source.in_memory for source in found.values()):
            file.close()
        return found
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise DataError(why_not_open(path, error)) from error


def _open_splits(file: Any, path: Path, in_memory_bytes: int, external_storage: bool) -> dict[str, Source]:
    items = {name: follow(file, name, path) for name in file}
    datasets = {name: item for name, item in items.items() if isinstance(item, h5py.Dataset)}
    groups = [name for name, item in items.items() if isinstance(item, h5py.Group)]
    if groups and not datasets:
        raise DataError(
            f"{path}: found the groups {', '.join(groups)}; expected data sets called train, validation and test, "
            "or one, at the top of the file: copy or link them there"
        )
    return {
        split: _source(datasets[key], f"{path}[{key}]", in_memory_bytes, external_storage)
        for split, key in pick_splits(list(datasets), str(path)).items()
    }


def _source(dataset: Any, label: str, in_memory_bytes: int, external_storage: bool) -> Source:
    if dataset.shape is None:
        raise DataError(f"{label}: found an empty data set; expected at least one example")
    checked_layout(dataset.shape, label)
    checked_dtype(dataset.dtype, label)
    # What is read once may have chunks that are larger, but not many times as large as it is itself.
    most = MOST_CHUNK_BYTES if dataset.nbytes > in_memory_bytes else max(MOST_CHUNK_BYTES, 4 * dataset.nbytes)
    files = check_whole(dataset, label, most_chunk_bytes=most, external_storage=external_storage)
    if dataset.nbytes <= in_memory_bytes:
        source: Source = ArraySource(dataset[()], label)
        for file in files:
            file.check()
        return source
    offset = dataset.id.get_offset()
    # Its own file, which a link may have led to. An enum, as HDF5 stores bool, is one byte, as numpy's.
    if (
        dataset.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
        and not dataset.external
        and _is_plain(dataset)
    ):
        return RowSource(files[0], offset, dataset.shape, dataset.dtype, label)
    return HDF5Source(dataset, label, files)


def _is_plain(dataset: Any) -> bool:
    """Whether the bytes in the file are numpy's, not packed in some other way."""
    return bool(dataset.id.get_type() == h5py.h5t.py_create(dataset.dtype, logical=True))


class HDF5Source(Source):
    """A data set that stays on disk. A gather reads each wanted example once, in file order."""

    in_memory = False

    def __init__(self, dataset: Any, path: str, files: Sequence[HeldFile] = ()) -> None:
        """`files`: those that a read looks into, to notice a change."""
        layout = checked_layout(dataset.shape, path)
        self._dataset, self._channels_last, self._files = dataset, layout.channels_last, files
        self.path, self.shape, self.stored = path, layout.shape, dataset.dtype
        self.dtype = checked_dtype(dataset.dtype, path)

    def __len__(self) -> int:
        return int(self._dataset.shape[0])

    def gather(self, indices: Indices) -> Values:
        rows, back = np.unique(indices, return_inverse=True)  # HDF5 selects increasing rows only
        dense = len(rows) and rows[-1] - rows[0] + 1 == len(rows)
        try:
            stored = self._dataset[int(rows[0]) : int(rows[-1]) + 1] if dense else self._dataset[rows]
        except (OSError, RuntimeError) as error:
            self._check_files()
            raise DataError(
                f"{self.path}: reading failed ({error}); expected readable chunks: save it again"
            ) from error
        self._check_files()
        batch = converted(stored, self.dtype)[back]
        if self._channels_last:
            batch = np.moveaxis(batch, 3, 1)
        return cast(Values, np.ascontiguousarray(batch).reshape(-1, *self.shape))

    def _check_files(self) -> None:
        for file in self._files:
            file.check()
