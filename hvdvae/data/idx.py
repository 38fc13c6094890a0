"""IDX, the format of MNIST and its kin: a big-endian header, then the numbers, plain or gzipped.

Header: two zero bytes, a dtype code, the rank, then the rank's sizes as uint32.
"""

import gzip
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from hvdvae.data.array_file import array_source
from hvdvae.data.held_file import HeldFile
from hvdvae.data.layout import checked_dtype, checked_layout
from hvdvae.data.room import MAX_DEFLATE, check_room
from hvdvae.data.source import ArraySource, Source
from hvdvae.errors import DataError

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def open_idx(path: Path) -> Source:
    """Source over an IDX file, gzipped or not; a gzipped one is decompressed once, in memory.

    Raises DataError for a wrong magic number, a truncated or corrupt file, labels, and dtypes that are not
    data.
    """
    file = HeldFile.open(path)
    try:
        with file.stream() as stream:
            packed = stream.read(2) == b"\x1f\x8b"
            stream.seek(0)
            if packed:
                with gzip.open(stream, "rb") as unpacked:
                    found: Source = ArraySource(_decompress(cast(BinaryIO, unpacked), path, file.size), str(path))
                file.check()
                return found
            shape, dtype = _read_header(stream, path)
            offset = stream.tell()
    except (EOFError, OSError, zlib.error, struct.error) as error:
        raise DataError(f"{path}: found a truncated or corrupt file ({error}); expected IDX: fetch it again") from error
    expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if offset + expected != file.size:
        raise _wrong_size(path, file.size, expected, shape)
    return array_source(file, offset, shape, dtype, str(path))


def _decompress(stream: BinaryIO, path: Path, stored: int) -> np.ndarray:
    shape, dtype = _read_header(stream, path)
    expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if expected > MAX_DEFLATE * stored:
        raise _wrong_size(path, stored, expected, shape)
    check_room(expected, str(path), "unpack the file, from which examples are read when they are needed")
    array = np.empty(shape, dtype)
    _fill(stream, array.reshape(-1).view(np.uint8).data, path)
    if stream.read(1):  # also makes gzip compare its checksum
        raise DataError(f"{path}: found more data than its header {shape} says; expected none: fetch it again")
    return array


def _wrong_size(path: Path, stored: int, expected: int, shape: tuple[int, ...]) -> DataError:
    return DataError(
        f"{path}: found {stored} bytes; expected {expected} bytes of data by its header {shape}: fetch it again"
    )


def _read_header(stream: BinaryIO, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES:
        raise DataError(
            f"{path}: found the magic number {magic.hex() or 'of an empty file'}; expected IDX (00 00 "
            "dtype rank, as 00000803 for images): name an IDX file"
        )
    sizes = stream.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise DataError(f"{path}: found a header cut short; expected {magic[3]} sizes: fetch it again")
    shape, dtype = struct.unpack(f">{magic[3]}I", sizes), np.dtype(_DTYPES[magic[2]])
    checked_layout(shape, str(path))
    checked_dtype(dtype, str(path))
    return shape, dtype


def _fill(stream: BinaryIO, target: memoryview, path: Path) -> None:
    done = 0
    while done < len(target):
        # Straight into the array: read() would hold all bytes twice.
        count = stream.readinto(target[done : done + (1 << 20)])  # type: ignore[attr-defined]
        if not count:
            raise DataError(f"{path}: found {done} bytes of data; expected {len(target)}: fetch it again")
        done += count
