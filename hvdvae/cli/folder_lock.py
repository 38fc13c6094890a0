"""One run at a time in a folder of results."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from hvdvae.errors import ConfigError

LOCK_FILE = "lock"
"""Names who holds the folder, and stays: the lock on it goes with its process."""
PATIENCE_SECONDS = 15.0
"""A job that was ended a moment ago may still hold the folder of the one that goes on."""
_HELD: dict[Path, TextIO] = {}
"""By this process."""


def hold(folder: Path) -> None:
    """Let no other process write there until `release`, or the end of this one. May block for some seconds.

    Raises ConfigError naming who holds it. On file systems that know no locks nothing is held.
    """
    release(folder)  # What a run of this process left that failed.
    try:
        file = (folder / LOCK_FILE).open("a+")
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot write there ({error.strerror or error})") from error
    if not _is_locked(file):
        file.seek(0)
        holder = file.read().strip() or "another run"
        file.close()
        raise ConfigError(
            f"--out {folder} is written by {holder}: wait for it, end it, or choose another folder with --out"
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _HELD[folder] = file


def release(folder: Path) -> None:
    """Let others. Local."""
    if folder in _HELD:
        _HELD.pop(folder).close()


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
            return True  # There are no locks here.
        else:
            return True
