"""IDX, the format of MNIST and its kin: a big-endian header, then the numbers, plain or gzipped.

Header: two zero bytes, a dtype code, the rank, then the rank's sizes as uint32.
"""

import gzip
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from hvdvae.data.layout import checked_dtype, checked_layout
from hvdvae.data.source import ArraySource
from hvdvae.errors import DataError

MAP_ABOVE = 1 << 30
"""Plain files above this many bytes are memory-mapped, others read once."""
MAX_DEFLATE = 1032
"""Deflate cannot shrink by more than this factor: a header that claims more data is not to be believed."""

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def open_idx(path: Path) -> ArraySource:
    """Source over an IDX file, gzipped or not. Reads or decompresses it once, in memory, as it is stored.

    Raises DataError for a wrong magic number, a truncated or corrupt file, labels, and dtypes that are not
    data.
    """
    try:
        with path.open("rb") as start:
            packed = start.read(2) == b"\x1f\x8b"
        with cast(BinaryIO, gzip.open(path, "rb")) if packed else path.open("rb") as stream:
            return ArraySource(_read(stream, path, packed), str(path))
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: found a truncated or corrupt file ({error}); expected IDX: fetch it again") from error


def _read(stream: BinaryIO, path: Path, packed: bool) -> np.ndarray:
    shape, dtype = _read_header(stream, path)
    checked_layout(shape, str(path))
    checked_dtype(dtype, str(path))
    offset = 4 + 4 * len(shape)
    expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
    stored = path.stat().st_size
    if (packed and expected > MAX_DEFLATE * stored) or (not packed and expected + offset != stored):
        raise DataError(
            f"{path}: found {stored} bytes; expected {expected} bytes of data by its header {shape}: fetch it again"
        )
    if not packed and expected > MAP_ABOVE:
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
    array = np.empty(shape, dtype)
    _fill(stream, array.reshape(-1).view(np.uint8).data, path)
    if stream.read(1):  # also makes gzip compare its checksum
        raise DataError(f"{path}: found more data than its header {shape} says; expected none: fetch it again")
    return array


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
    return struct.unpack(f">{magic[3]}I", sizes), np.dtype(_DTYPES[magic[2]])


def _fill(stream: BinaryIO, target: memoryview, path: Path) -> None:
    done = 0
    while done < len(target):
        # Straight into the array: read() would hold all bytes twice.
        count = stream.readinto(target[done : done + (1 << 20)])  # type: ignore[attr-defined]
        if not count:
            raise DataError(f"{path}: found {done} bytes of data; expected {len(target)}: fetch it again")
        done += count
