"""A file that is held open and read at offsets: one that changes is named, where a mapped one may end the process.

To take a random row costs a system call of some two microseconds, where a mapping costs a fault now and then.
"""

import io
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from hvdvae.data.unchanged import check_unchanged, stamp_of
from hvdvae.errors import DataError

_AT_ONCE = 1 << 30
"""Linux reads at most 2 GiB a call."""


class HeldFile:
    """The content that a path had when it was opened, whatever takes its place; `path` is for messages."""

    def __init__(self, path: str, descriptor: int) -> None:
        """Takes over the descriptor, and closes it when this is collected."""
        self.path, self._descriptor = path, descriptor
        weakref.finalize(self, os.close, descriptor)
        self._stamp = stamp_of(os.fstat(descriptor))
        self.size = self._stamp.size

    @classmethod
    def open(cls, path: Path) -> "HeldFile":
        """Raises OSError."""
        return cls(str(path), os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def __reduce__(self) -> str:
        raise TypeError(f"{self.path} is held open by this process: open the data set in the other one")

    def stream(self) -> BinaryIO:
        """From its beginning, to read headers."""
        raw = os.fdopen(os.dup(self._descriptor), "rb", buffering=0)
        raw.seek(0)
        return io.BufferedReader(raw)

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` (bytes) from `offset`. Blocks. Raises DataError where the file has changed, or ends before."""
        done = 0
        while done < len(target):
            count = os.preadv(self._descriptor, [target[done : done + _AT_ONCE]], offset + done)
            if count == 0:
                break
            done += count
        self.check()
        if done < len(target):
            raise DataError(
                f"{self.path}: found {self.size} bytes; expected {offset + len(target)}, or more: save it again"
            )

    def rows(self, offset: int, row_bytes: int, indices: Sequence[int]) -> bytearray:
        """The rows of `row_bytes` from `offset` on at `indices`, one after the other. Blocks. Raises as `read_into`."""
        first, count = indices[0], len(indices)
        if indices == list(range(first, first + count)):
            together = bytearray(count * row_bytes)
            self.read_into(memoryview(together), offset + first * row_bytes)
            return together
        starts = [offset + index * row_bytes for index in indices]
        for start in starts:  # The system fetches what it has not yet, all at a time.
            os.posix_fadvise(self._descriptor, start, row_bytes, os.POSIX_FADV_WILLNEED)
        found = bytearray().join([os.pread(self._descriptor, row_bytes, start) for start in starts])
        self.check()
        if len(found) < count * row_bytes:
            raise DataError(f"{self.path}: found {self.size} bytes; expected {max(starts) + row_bytes}: save it again")
        return found

    def check(self) -> None:
        """Raises DataError where the file was written to since it was opened."""
        check_unchanged(self._descriptor, self._stamp, self.path)
