"""Shared memory that jobs have left behind whose processes were killed: what no process has any more is cleared.

Nobody else does it: a killed MPI cannot, and its launcher may have been killed, too. What is left takes memory until
the host starts anew, and the next job may find no room.
"""

import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
YOUNG_SECONDS = 60.0
"""A segment may have been made, and not been mapped yet."""
_OPEN_MPI = re.compile(r"(?:sm_segment|vader_segment|osc_rdma|osc_sm)\.(?P<host>.+?)\.(?P<rest>[0-9a-f.]+)")
"""Segments of Open MPI 4 and 5: what for, host, user and job, rank."""


def clear(folder: Path = SHARED_MEMORY) -> str:
    """Delete segments of this user's jobs on this host that no process has mapped. Returns what was done, or "".

    Local, and safe beside running jobs of any user. Linux alone tells who has mapped what; elsewhere nothing is done.
    """
    found = dict(_segments(folder))
    in_use = _mapped() if found else set[tuple[int, int]]()
    if in_use is None:
        return ""
    count = size = 0
    for path, (identity, length) in found.items():
        if identity not in in_use:
            with suppress(OSError):  # Another run was first.
                path.unlink()
                count, size = count + 1, size + length
    if not count:
        return ""
    return f"cleared {count} segments ({size / 2**20:,.0f} MiB) in {folder} that killed jobs had left behind"


def _segments(folder: Path) -> Iterator[tuple[Path, tuple[tuple[int, int], int]]]:
    """Ours by name, owner and age: where, which file, and bytes."""
    host = socket.gethostname()
    with suppress(OSError):
        for path in folder.iterdir():
            match = _OPEN_MPI.fullmatch(path.name)
            if match is None or match["host"] not in (host, host.partition(".")[0]):
                continue
            with suppress(OSError):
                about = path.lstat()
                old = time.time() - max(about.st_mtime, about.st_ctime) > YOUNG_SECONDS
                if old and stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid():
                    yield path, ((about.st_dev, about.st_ino), about.st_size)


def _mapped() -> set[tuple[int, int]] | None:
    """Devices and numbers of all files that this user's processes have mapped; None where that cannot be known."""
    found: set[tuple[int, int]] = set()
    try:
        processes = [entry for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    except OSError:
        return None
    for process in processes:
        try:
            if process.stat().st_uid != os.getuid():
                continue
            lines = (process / "maps").read_text(errors="replace").splitlines()
        except OSError:
            # It has ended meanwhile, or may not be looked into, as what has more rights than its user. What a rank has
            # mapped is of use to it also without a name.
            continue
        for line in lines:
            _, _, _, device, number, *_ = line.split(maxsplit=5)
            major, _, minor = device.partition(":")
            found.add((os.makedev(int(major, 16), int(minor, 16)), int(number)))
    return found if found else None
