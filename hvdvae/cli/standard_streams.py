"""Standard output and error that may be on a full disk, or a pipe that nobody reads: no training ends for its words."""

import io
import os
import sys
from typing import Any, TextIO


class Lenient(io.FileIO):
    """A file descriptor whose writes are lost, once one of them has failed."""

    def __init__(self, number: int, name: str) -> None:
        """`name`: for a message on standard error; none where it is empty."""
        super().__init__(number, "w", closefd=False)
        self._what = name
        self.failed = False

    def write(self, data: Any, /) -> int:
        """As a file's; says once that what comes now is lost."""
        try:
            return super().write(data)
        except OSError as error:
            self.failed = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self._what:
                print(
                    f"hvdvae: error: {self._what}: {error.strerror}; what comes now is lost",
                    file=sys.stderr,
                    flush=True,
                )
            return len(data)


def lenient(stream: TextIO | None, name: str = "") -> tuple[TextIO, Lenient]:
    """Another stream over the same descriptor, or over none where it is closed, and what knows of failures. Local."""
    number = stream.fileno() if stream is not None else os.open(os.devnull, os.O_WRONLY)
    raw = Lenient(number, name)
    if not isinstance(stream, io.TextIOWrapper):
        return io.TextIOWrapper(io.BufferedWriter(raw)), raw
    like: dict[str, Any] = {
        key: getattr(stream, key) for key in ("encoding", "errors", "line_buffering", "write_through")
    }
    # As Python's own: PYTHONUNBUFFERED has no buffer in between.
    return io.TextIOWrapper(raw if stream.write_through else io.BufferedWriter(raw), **like), raw
