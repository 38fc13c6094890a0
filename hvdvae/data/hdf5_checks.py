"""Whether HDF5 would read a data set whole: what it lacks it fills with zeros, or ends the process, without a word."""

import importlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hvdvae.data.held_file import HeldFile
from hvdvae.errors import DataError

_FILTERS = {
    4: "szip",
    305: "lzo",
    307: "bzip2",
    32000: "lzf",
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstd",
    32026: "blosc2",
}

_MOST_NESTED = 8
"""Virtual data sets of virtual ones: HDF5 calls itself for each, until its stack ends."""


def why_not_open(path: Path, error: Exception) -> str:
    """What keeps h5py from opening a file, and what to do. Pure."""
    text = str(error)
    if "unable to lock file, errno = 11" in text:
        return (
            f"{path}: another process has it open for writing; expected a file that is closed: wait until that process "
            "has closed it, or read a copy of it"
        )
    if "unable to lock file" in text:
        return (
            f"{path}: this file system has no locks ({text}); expected some: set HDF5_USE_FILE_LOCKING=FALSE, where no "
            "other process writes to the file"
        )
    if "already open for write" in text:
        return (
            f"{path}: a process has it open for writing, or ended without closing it; expected a file that was closed: "
            f"close it there, or, where no process has it open, clear its mark with h5clear -s {path}"
        )
    return f"{path}: found a truncated or corrupt file ({text}); expected HDF5: save it again"


def follow(file: Any, name: str, path: Path) -> Any:
    """What is under a name at the top of a file. Raises DataError for a link that leads nowhere."""
    link = file.get(name, getlink=True)
    if isinstance(link, h5py.HardLink):
        return file[name]
    with suppress(OSError, RuntimeError, KeyError):
        if (item := file.get(name)) is not None:
            return item
    target = getattr(link, "filename", None)
    if target is not None and (there := path.parent / target).is_file():
        try:
            h5py.File(there, "r").close()
        except OSError as error:
            raise DataError(f"{path}[{name}]: a link to {why_not_open(there, error)}") from error
    where = f"{target or ''}{getattr(link, 'path', '')}"
    raise DataError(
        f"{path}[{name}]: found a link to {where}, where nothing is; expected a data set: mend or remove it"
    )


def check_whole(dataset: Any, label: str, *, most_chunk_bytes: int, external_storage: bool) -> list[HeldFile]:
    """Refuse what cannot be read, or only in part (DataError naming the cause); the files that a read looks into.

    That is: filters that are not there, chunks of more than `most_chunk_bytes` when they are decompressed, numbers
    never written, external raw files (unless `external_storage`), and virtual data sets of which a source is missing,
    too small, or the data set itself. Reads no numbers. The data set's own file comes first.
    """
    return _Check(most_chunk_bytes, external_storage).of(dataset, label, ())


_Object = tuple[int, int]
"""A file's number in this process, and an address in it."""


class _Check:
    """A walk from a data set down through the sources of virtual ones, each of which is looked at once."""

    def __init__(self, most_chunk_bytes: int, external_storage: bool) -> None:
        self._most_chunk_bytes, self._external_storage = most_chunk_bytes, external_storage
        self._done: set[_Object] = set()

    def of(self, dataset: Any, label: str, above: tuple[_Object, ...]) -> list[HeldFile]:
        """`above`: the virtual data sets that this one is a source of."""
        info = h5py.h5o.get_info(dataset.id)
        me = (info.fileno, info.addr)
        if me in above or len(above) > _MOST_NESTED:
            what = "itself" if me in above else f"virtual ones, {len(above)} deep"
            raise DataError(f"{label}: found a virtual data set of {what}; expected one whose sources hold numbers")
        if me in self._done:
            return []
        self._done.add(me)
        files = [HeldFile(dataset.file.filename, os.dup(dataset.file.id.get_vfd_handle()))]
        layout = dataset.id.get_create_plist()
        _check_filters(layout, label)
        if layout.get_external_count():
            files += _external_files(dataset, label, self._external_storage)
        elif dataset.is_virtual:
            filled = np.zeros(dataset.shape[0], np.int64)
            for part in dataset.virtual_sources():
                files += self._source(dataset, part, label, filled, (*above, me))
            _check_filled(dataset, filled, label)
        else:
            _check_written(dataset, label, self._most_chunk_bytes)
        return files

    def _source(
        self, dataset: Any, part: Any, label: str, filled: np.ndarray, above: tuple[_Object, ...]
    ) -> list[HeldFile]:
        target, name, key, chosen = part
        label = f"{label}, of which a part is in {name}[{key}]"
        rows, each = _rows_of(target, label)
        np.add.at(filled, rows, each)
        file = dataset.file if name == "." else _open_source(dataset, name, label)
        source = file.get(key)
        if not isinstance(source, h5py.Dataset):
            raise DataError(f"{label}: found no such data set; expected one: HDF5 would read {dataset.fillvalue}")
        if chosen.get_select_type() == h5py.h5s.SEL_ALL:
            fits = source.size == target.get_select_npoints()
        else:
            last = chosen.get_select_bounds()[1]
            fits = len(last) == source.ndim and all(end < size for end, size in zip(last, source.shape, strict=True))
        if not fits:
            raise DataError(
                f"{label}: found the shape {source.shape}; expected a larger one: HDF5 would read {dataset.fillvalue} "
                "for what is missing"
            )
        return self.of(source, label, above)


def _check_filters(layout: Any, label: str) -> None:
    for number in range(layout.get_nfilters()):
        code, _, _, name = layout.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            with suppress(ImportError):
                importlib.import_module("hdf5plugin")
        if not h5py.h5z.filter_avail(code):
            known = _FILTERS.get(code) or name.decode(errors="replace") or "unknown"
            raise DataError(
                f"{label}: compressed by the filter {code} ({known}), for which HDF5 has no plug-in here; expected "
                "one: pip install hdf5plugin, set HDF5_PLUGIN_PATH to the folder that has it, or save the data by gzip"
            )


def _check_written(dataset: Any, label: str, most_chunk_bytes: int) -> None:
    if dataset.chunks is None:
        there = dataset.id.get_storage_size() >= dataset.nbytes
        found = "numbers that were never written" if not there else ""
    else:
        count = math.prod(-(-extent // chunk) for extent, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        written = _check_chunks(dataset, label, most_chunk_bytes)
        found = f"{written} of {count} chunks, the others were never written" if written < count else ""
    if found:
        raise DataError(
            f"{label}: found {found}, and would be read as {dataset.fillvalue}; expected all of them: write the rest, "
            "or shrink the data set to what was written (resize)"
        )


def _check_chunks(dataset: Any, label: str, most_bytes: int) -> int:
    """How many there are. HDF5 decompresses as much as a chunk becomes, whatever it should be."""
    size = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if size > most_bytes:
        raise DataError(
            f"{label}: found chunks of {dataset.chunks}, {size / 1e6:.0f} MB each, to be decompressed for each "
            f"example; expected at most {most_bytes / 1e6:.0f} MB: h5repack -l CHUNK=... makes smaller ones"
        )
    stored = [0]
    dataset.id.chunk_iter(lambda chunk: stored.append(chunk.size))
    if max(stored) > size + size // 64 + 1024:
        raise DataError(
            f"{label}: found a chunk of {max(stored)} bytes in the file; expected at most {size}, which it is to be "
            "when it is decompressed: save the data again"
        )
    return len(stored) - 1


def _external_files(dataset: Any, label: str, external_storage: bool) -> list[HeldFile]:
    files = [(os.fsdecode(name), offset, size) for name, offset, size in dataset.external]
    if not external_storage:
        raise DataError(
            f"{label}: its numbers lie in {', '.join(name for name, _, _ in files)}, outside of the HDF5 file; "
            "expected them inside, since such a list may name any file of this machine: allow it with "
            "--external-storage (open_dataset(..., external_storage=True)), if you trust the file"
        )
    left, held = dataset.nbytes, []
    prefix = os.environ.get("HDF5_EXTFILE_PREFIX", "").replace("${ORIGIN}", str(Path(dataset.file.filename).parent))
    for name, offset, size in files:
        path = Path(prefix, name)
        wanted = min(size, left)
        found = max(0, path.stat().st_size - offset) if path.is_file() else None
        if found is None or found < wanted:
            has = "no such file" if found is None else f"{found} bytes"
            raise DataError(
                f"{label}: its numbers lie in {path}: found {has}; expected {wanted} bytes from {offset} on: HDF5 "
                "looks in the folder where a run starts, or in HDF5_EXTFILE_PREFIX"
            )
        left -= wanted
        held.append(HeldFile.open(path))
    return held


def _check_filled(dataset: Any, filled: np.ndarray, label: str) -> None:
    wrong = filled != math.prod(dataset.shape[1:])
    if wrong.any():
        raise DataError(
            f"{label}: found no source, or two, for example {int(np.argmax(wrong))} of a virtual data set; "
            f"expected one for each number: HDF5 would read {dataset.fillvalue}"
        )


def _rows_of(target: Any, label: str) -> tuple[np.ndarray, int]:
    """Examples that a source fills, and how many numbers of each."""
    if target.get_select_type() == h5py.h5s.SEL_ALL:
        extent = target.shape
        return np.arange(extent[0]), math.prod(extent[1:])
    regular = target.get_select_type() == h5py.h5s.SEL_HYPERSLABS and target.is_regular_hyperslab()
    start, stride, count, block = target.get_regular_hyperslab() if regular else [(0,)] * 4
    if not regular or max(*count, *block) >= 2**63:
        raise DataError(
            f"{label}: found a part of an irregular or unlimited shape; expected a fixed block: save the data set as "
            "one of its own"
        )
    rows = (start[0] + stride[0] * np.arange(count[0])[:, None] + np.arange(block[0])[None]).ravel()
    return rows, math.prod(times * size for times, size in zip(count[1:], block[1:], strict=True))


def _open_source(dataset: Any, name: str, label: str) -> Any:
    found = next((path for path in _candidates(dataset, name) if path.is_file()), None)
    if found is None or "%" in name:
        raise DataError(
            f"{label}: found no such file; expected it beside the file of the virtual data set: HDF5 would read "
            f"{dataset.fillvalue} for its part"
        )
    try:
        return h5py.File(found, "r")
    except (OSError, RuntimeError) as error:
        raise DataError(f"{label}: {why_not_open(found, error)}") from error


def _candidates(dataset: Any, name: str) -> Iterator[Path]:
    """Where HDF5 looks for the source of a virtual data set, in its order (H5Pset_virtual)."""
    main = Path(dataset.file.filename)
    if os.path.isabs(name):
        yield Path(name)
        name = os.path.basename(name)
    folders: Sequence[str] = os.environ.get("HDF5_VDS_PREFIX", "").split(os.pathsep)
    yield from (Path(folder.replace("${ORIGIN}", str(main.parent)), name) for folder in folders if folder)
    yield main.parent / name
    yield Path(name)
    yield main.resolve().parent / name
