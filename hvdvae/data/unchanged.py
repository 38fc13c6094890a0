"""Files that stay as they were while a run reads them, or are named."""

import os
from typing import NamedTuple

from hvdvae.errors import DataError


class Stamp(NamedTuple):
    """What changes where a file is written to: its size in bytes, and when that was, in nanoseconds."""

    size: int
    written: int


def stamp_of(found: os.stat_result) -> Stamp:
    """The stamp of a file by what the system says of it. Pure."""
    return Stamp(found.st_size, found.st_mtime_ns)


def check_unchanged(descriptor: int, stamp: Stamp, path: str) -> None:
    """Refuse a file, held by its descriptor, that was written to since (DataError naming it). A microsecond.

    One that another has taken the place of stays what it was, for whoever holds it.
    """
    if stamp_of(os.fstat(descriptor)) != stamp:
        raise DataError(
            f"{path}: was written to while this run reads it; expected it to stay: start anew, and save new data under "
            "another name"
        )
