"""Memory that processes of one host share: a file in Linux's memory file system, mapped by all, and then forgotten.

Not an MPI window: freeing one needs all its ranks, and with ULFM some may have died.
"""

import mmap
import os
from pathlib import Path

_FOLDER = Path("/dev/shm")


def create(name: str, size: int) -> mmap.mmap:
    """New memory of `size` bytes, zeroed, under a name of its own. Raises OSError where there is no room."""
    file = os.open(_FOLDER / name, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(file, 0, size)  # Now, and not as a SIGBUS when a page is touched.
        return mmap.mmap(file, size)
    finally:
        os.close(file)


def attach(name: str) -> mmap.mmap:
    """The memory that another process has created."""
    file = os.open(_FOLDER / name, os.O_RDWR | os.O_NOFOLLOW)
    try:
        return mmap.mmap(file, 0)
    finally:
        os.close(file)


def forget(name: str) -> None:
    """Remove the name, which all have used: the memory lives as long as a process that maps it, however that ends."""
    (_FOLDER / name).unlink(missing_ok=True)
