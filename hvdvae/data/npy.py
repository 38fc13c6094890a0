"""NumPy's own files: small arrays are read once, large ones row by row, also those that .npz stores uncompressed.

numpy.savez stores, numpy.savez_compressed does not: a compressed member is decompressed into memory once.
Nothing is ever unpickled.
"""

import struct
import zipfile
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from hvdvae.data import array_file
from hvdvae.data.held_file import HeldFile
from hvdvae.data.layout import checked_dtype, checked_layout
from hvdvae.data.room import MAX_DEFLATE, check_room
from hvdvae.data.source import ArraySource, Source
from hvdvae.data.split import pick_splits
from hvdvae.errors import DataError

_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: what precedes the lengths of its name and extra field


def open_npy(path: Path) -> Source:
    """Source over a .npy file, which is held.

    Raises DataError for objects, a torn file, or what is not data.
    """
    label, file = str(path), HeldFile.open(path)
    with file.stream() as stream:
        shape, fortran, dtype = _read_header(stream, label)
        offset = stream.tell()
    return array_file.array_source(file, offset, shape, dtype, label, fortran=fortran)


def open_npz(path: Path) -> dict[str, Source]:
    """Sources of a .npz file by split: keys train, validation or valid, test; or one array, as train.

    Raises DataError for a torn archive, unclear keys, objects, or what is not data.
    """
    file = HeldFile.open(path)
    try:
        with file.stream() as stream, zipfile.ZipFile(stream) as archive:
            members: dict[str, zipfile.ZipInfo] = {}
            for info in archive.infolist():
                if members.setdefault(name := info.filename.removesuffix(".npy"), info) is not info:
                    raise DataError(f"{path}: found {name!r} twice; expected one: save it again")
            chosen = pick_splits(list(members), str(path))
            found = {
                split: _member(file, stream, archive, members[key], f"{path}[{key}]") for split, key in chosen.items()
            }
        file.check()
        return found
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and struct raise nearly everything where an archive is damaged.
        raise DataError(
            f"{path}: found a truncated or corrupt archive ({error or type(error).__name__}); expected .npz: save again"
        ) from error


def _member(file: HeldFile, raw: BinaryIO, archive: zipfile.ZipFile, info: zipfile.ZipInfo, label: str) -> Source:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{label}: found compression {info.compress_type}; expected numpy.savez or savez_compressed")
    with archive.open(info) as stream:
        shape, fortran, dtype = _read_header(stream, label)
        header = stream.tell()
        expected = _check_length(shape, dtype, info.file_size - header, label)
        if info.compress_type == zipfile.ZIP_DEFLATED or expected <= array_file.IN_MEMORY_BYTES:
            if expected > MAX_DEFLATE * info.compress_size:
                raise DataError(
                    f"{label}: found {info.compress_size} compressed bytes; expected {expected} bytes of data for "
                    f"shape {shape}: save it again"
                )
            check_room(expected, label, "save it with numpy.savez, from which examples are read when they are needed")
            source = ArraySource(_read_whole(stream, shape, fortran, dtype, label), label)
            source.notes = (array_file.LAID_ANEW,) if fortran else ()
            return source
    raw.seek(info.header_offset)
    name, extra = _LOCAL_HEADER.unpack(raw.read(_LOCAL_HEADER.size))
    start = info.header_offset + _LOCAL_HEADER.size + name + extra
    return array_file.array_source(file, start + header, shape, dtype, label, fortran=fortran)


def _read_header(stream: IO[bytes], label: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError(f"shape {shape}")
    except (zipfile.BadZipFile, OSError):
        raise
    except Exception as error:  # numpy parses the header as Python, which fails in many ways where it is damaged.
        raise DataError(f"{label}: found no readable .npy header ({error}); expected a plain numeric array") from error
    checked_layout(shape, label)
    checked_dtype(dtype, label)
    return shape, fortran, dtype


def _check_length(shape: tuple[int, ...], dtype: np.dtype, found: int, label: str) -> int:
    expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if found < expected:
        raise DataError(f"{label}: found {found} bytes of data; expected {expected} for shape {shape}: save it again")
    return expected


def _read_whole(stream: IO[bytes], shape: tuple[int, ...], fortran: bool, dtype: np.dtype, label: str) -> np.ndarray:
    """The array at which a member's stream stands; at its end zipfile compares the checksum."""
    array = np.empty(shape, dtype, order="F" if fortran else "C")
    target = array.reshape(-1, order="A").view(np.uint8).data
    done = 0
    while done < len(target):
        piece = stream.read(min(1 << 20, len(target) - done))
        if not piece:
            raise DataError(f"{label}: found {done} bytes of data; expected {len(target)}: save it again")
        target[done : done + len(piece)] = piece
        done += len(piece)
    while stream.read(1 << 20):
        pass
    return array
