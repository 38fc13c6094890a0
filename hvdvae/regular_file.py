"""Files opened so that nothing else can stand behind their names: no link, pipe, device or socket.

A folder of results may be one that others write, too. A link that waits under a name that will be written would have a
file elsewhere replaced; a named pipe would hold the job until somebody reads it.
"""

import errno
import os
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)


def open_to_read(path: Path) -> BinaryIO:
    """An existing file, also through a link that its owner has made. Never waits. Raises OSError."""
    return _opened(path, os.O_RDONLY, "rb")


def open_new(path: Path) -> BinaryIO:
    """A file that was not there, to write and read. Raises OSError (FileExistsError)."""
    return _opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, "r+b")


def open_to_append(path: Path) -> BinaryIO:
    """A file that is there, or a new one, to write behind its end; not through a link. Never waits. Raises OSError."""
    return _opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, "r+b")


def open_in_place(path: Path) -> BinaryIO:
    """A file that is there, or a new one, from its start; not through a link. Never waits. Raises OSError."""
    return _opened(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, "r+b")


def temporary(path: Path) -> Path:
    """A name beside a file's, ending in .tmp, that nobody can know before. Pure but for the draw."""
    return path.with_name(f"{path.stem}.{secrets.token_hex(6)}.tmp")


def why(error: OSError, path: Path) -> str:
    """What went wrong, in words; where a disk is full, which one. Local."""
    text = str(error.strerror or error)
    if error.errno not in _FULL:
        return text
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = os.statvfs(place)
    device = place.stat().st_dev
    while place != place.parent and place.parent.stat().st_dev == device:
        place = place.parent
    return f"{text}: the disk at {place} has {free.f_bavail * free.f_frsize:,} bytes free"


def _opened(path: Path, flags: int, mode: str) -> BinaryIO:
    try:
        # A pipe that nobody writes, or reads, would be waited for.
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # A link, a socket, a folder.
            raise _refusal(path, os.lstat(path).st_mode, error.errno) from error
        raise
    found = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(found):
        os.close(descriptor)
        raise _refusal(path, found, errno.EINVAL)
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, mode)  # type: ignore[return-value]


def _refusal(path: Path, mode: int, number: int) -> OSError:
    return OSError(number, f"it is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, expected a file", str(path))
