"""One run at a time in a folder of results."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from hvdvae.errors import BusyError, ConfigError

LOCK_FILE = "lock"
"""Names who holds the folder, and stays: the lock on it goes with its process."""
PATIENCE_SECONDS = 15.0
"""A job that was ended a moment ago may still hold the folder of the one that goes on."""
_HELD: list[TextIO] = []
"""By this process."""


def hold(folder: Path) -> None:
    """Let no other process write there until `release`, or the end of this one. May block for PATIENCE_SECONDS.

    Raises BusyError naming who holds it. On file systems that know no locks, or have none left, nothing is held.
    """
    folder = folder.resolve()
    try:
        file = (folder / LOCK_FILE).open("a+")
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot write there ({error.strerror or error})") from error
    if any(os.path.sameopenfile(held.fileno(), file.fileno()) for held in _HELD):
        file.close()
        return
    if not _is_locked(file):
        file.seek(0)
        holder = file.read().strip() or "another run"
        file.close()
        raise BusyError(
            f"--out {folder} is written by {holder}: wait for it, end it, or choose another folder with --out"
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _HELD.append(file)


def release() -> None:
    """Let others write where this process held them off. Local."""
    while _HELD:
        _HELD.pop().close()


def _is_locked(file: TextIO) -> bool:
    give_up = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                return False
            time.sleep(0.1)
        except OSError:
            return True
        else:
            return True
