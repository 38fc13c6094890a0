"""NumPy's own files: .npy is memory-mapped; members of .npz are, where they are stored uncompressed.

numpy.savez stores, numpy.savez_compressed does not: a compressed member is decompressed into memory once.
Nothing is ever unpickled.
"""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from hvdvae.data.layout import checked_dtype, checked_layout
from hvdvae.data.source import ArraySource, Source
from hvdvae.data.split import pick_splits
from hvdvae.errors import DataError

_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: what precedes the lengths of its name and extra field


def open_npy(path: Path) -> ArraySource:
    """Source over a .npy file, memory-mapped.

    Raises DataError for objects, a torn file, or what is not data.
    """
    label = str(path)
    with path.open("rb") as stream:
        shape, fortran, dtype = _read_header(stream, label)
        return ArraySource(_map(path, stream.tell(), shape, fortran, dtype, path.stat().st_size, label), label)


def open_npz(path: Path) -> dict[str, Source]:
    """Sources of a .npz file by split: keys train, validation or valid, test; or one array, as train.

    Raises DataError for a torn archive, unclear keys, objects, or what is not data.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): archive.getinfo(name) for name in archive.namelist()}
            chosen = pick_splits(list(members), str(path))
            return {
                split: ArraySource(_member(path, archive, members[key], f"{path}[{key}]"), f"{path}[{key}]")
                for split, key in chosen.items()
            }
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{path}: found a truncated or corrupt archive ({error}); expected .npz: save again") from error


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, label: str) -> np.ndarray:
    with archive.open(info) as stream:
        shape, fortran, dtype = _read_header(stream, label)
        header = stream.tell()
        if info.compress_type == zipfile.ZIP_STORED:
            with path.open("rb") as raw:
                raw.seek(info.header_offset)
                name, extra = _LOCAL_HEADER.unpack(raw.read(_LOCAL_HEADER.size))
            start = info.header_offset + _LOCAL_HEADER.size + name + extra
            return _map(path, start + header, shape, fortran, dtype, start + info.file_size, label)
        return _decompress(stream, shape, fortran, dtype, info.file_size - header, label)


def _read_header(stream: IO[bytes], label: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError(f"shape {shape}")
    except (zipfile.BadZipFile, zlib.error, OSError):
        raise
    except Exception as error:  # numpy parses the header as Python, which fails in many ways where it is damaged.
        raise DataError(f"{label}: found no readable .npy header ({error}); expected a plain numeric array") from error
    checked_layout(shape, label)
    checked_dtype(dtype, label)
    return shape, fortran, dtype


def _check_length(shape: tuple[int, ...], dtype: np.dtype, found: int, label: str) -> None:
    expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if found < expected:
        raise DataError(f"{label}: found {found} bytes of data; expected {expected} for shape {shape}: save it again")


def _map(
    path: Path, offset: int, shape: tuple[int, ...], fortran: bool, dtype: np.dtype, end: int, label: str
) -> np.ndarray:
    _check_length(shape, dtype, end - offset, label)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C")


def _decompress(
    stream: IO[bytes], shape: tuple[int, ...], fortran: bool, dtype: np.dtype, found: int, label: str
) -> np.ndarray:
    _check_length(shape, dtype, found, label)
    array = np.empty(shape, dtype, order="F" if fortran else "C")
    target = array.reshape(-1, order="A").view(np.uint8).data
    done = 0
    while done < len(target):
        piece = stream.read(min(1 << 20, len(target) - done))
        if not piece:
            raise DataError(f"{label}: found {done} bytes of data; expected {len(target)}: save it again")
        target[done : done + len(piece)] = piece
        done += len(piece)
    stream.read(1)  # makes zipfile compare its checksum
    return array
