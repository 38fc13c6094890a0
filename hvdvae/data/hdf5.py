"""HDF5: contiguous data sets are memory-mapped, chunked ones read once if they are small, else streamed."""

from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np

from hvdvae.data.layout import checked_dtype, checked_layout, converted
from hvdvae.data.source import ArraySource, Indices, Source, Values
from hvdvae.data.split import pick_splits
from hvdvae.errors import DataError

IN_MEMORY_BYTES = 1 << 30
"""A chunked data set up to this size is read into memory: random rows of it would decompress whole chunks."""


def open_hdf5(path: Path, *, in_memory_bytes: int = IN_MEMORY_BYTES) -> dict[str, Source]:
    """Sources of an HDF5 file by split: train, validation or valid, test; or one data set, as train.

    Streamed sources keep the file open. Raises DataError for a torn file, unclear names, or what is not data.
    """
    try:
        file = h5py.File(path, "r")
        datasets = {name: item for name, item in file.items() if isinstance(item, h5py.Dataset)}
        groups = [name for name, item in file.items() if isinstance(item, h5py.Group)]
        if groups and not datasets:
            raise DataError(
                f"{path}: found the groups {', '.join(groups)}; expected data sets called train, validation and test, "
                "or one, at the top of the file: copy or link them there"
            )
        return {
            split: _source(datasets[key], path, f"{path}[{key}]", in_memory_bytes)
            for split, key in pick_splits(list(datasets), str(path)).items()
        }
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: found a truncated or corrupt file ({error}); expected HDF5: save it again") from error


def _source(dataset: Any, path: Path, label: str, in_memory_bytes: int) -> Source:
    if dataset.shape is None:
        raise DataError(f"{label}: found an empty data set; expected at least one example")
    checked_layout(dataset.shape, label)
    checked_dtype(dataset.dtype, label)
    offset = dataset.id.get_offset()
    # None: chunked, compact, or in another file. An enum, as HDF5 stores bool, is one byte, as numpy's.
    if offset is not None and not dataset.external:
        return ArraySource(np.memmap(path, dtype=dataset.dtype, mode="r", offset=offset, shape=dataset.shape), label)
    if dataset.nbytes <= in_memory_bytes:
        return ArraySource(dataset[()], label)
    return HDF5Source(dataset, label)


class HDF5Source(Source):
    """A chunked data set that stays on disk. A gather reads each wanted example once, in file order."""

    in_memory = False

    def __init__(self, dataset: Any, path: str) -> None:
        layout = checked_layout(dataset.shape, path)
        self._dataset, self._channels_last = dataset, layout.channels_last
        self.path, self.shape, self.dtype = path, layout.shape, checked_dtype(dataset.dtype, path)

    def __len__(self) -> int:
        return int(self._dataset.shape[0])

    def gather(self, indices: Indices) -> Values:
        rows, back = np.unique(indices, return_inverse=True)  # HDF5 selects increasing rows only
        dense = len(rows) and rows[-1] - rows[0] + 1 == len(rows)
        try:
            stored = self._dataset[int(rows[0]) : int(rows[-1]) + 1] if dense else self._dataset[rows]
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{self.path}: reading failed ({error}); expected readable chunks: save it again"
            ) from error
        batch = converted(stored, self.dtype)[back]
        if self._channels_last:
            batch = np.moveaxis(batch, 3, 1)
        return cast(Values, np.ascontiguousarray(batch).reshape(-1, *self.shape))
