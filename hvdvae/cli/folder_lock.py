"""One run at a time in a folder of results."""

import fcntl
import io
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from hvdvae.errors import BusyError, ConfigError
from hvdvae.regular_file import open_in_place, why

LOCK_FILE = "lock"
"""Names who holds the folder, and stays: the lock on it goes with its process."""
PATIENCE_SECONDS = 15.0
"""A job that was ended a moment ago may still hold the folder of the one that goes on."""
_OURS = re.compile(r"process \d+ on .*")
_HELD: list[TextIO] = []
"""By this process."""


def hold(folder: Path, *, replaces: bool = False) -> None:
    """Let no other process write there until `release`, or the end of this one. May block for PATIENCE_SECONDS.

    Raises BusyError naming who holds it, and ConfigError for a lock that is a link or, unless `replaces`, somebody
    else's file. On file systems that know no locks, or have none left, nothing is held.
    """
    folder = folder.resolve()
    try:
        file = io.TextIOWrapper(open_in_place(folder / LOCK_FILE), encoding="utf-8", errors="replace")
    except OSError as error:
        raise _unwritable(folder, error) from error
    if any(os.path.sameopenfile(held.fileno(), file.fileno()) for held in _HELD):
        file.close()
        return
    locked = _is_locked(file)
    holder = file.read(1000).strip()
    if not locked:
        file.close()
        raise BusyError(
            f"--out {folder} is written by {holder or 'another run'}: wait for it, end it, or choose another folder "
            "with --out"
        )
    if holder and not _OURS.fullmatch(holder) and not replaces:
        file.close()
        raise ConfigError(
            f"--out {folder} holds a file {LOCK_FILE} that no run wrote, and this run would replace it: move it away, "
            "replace it with --overwrite, or choose another folder"
        )
    _HELD.append(file)
    try:
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as error:
        raise _unwritable(folder, error) from error


def release() -> None:
    """Let others write where this process held them off. Local."""
    while _HELD:
        with suppress(OSError):  # What could not be written was said.
            _HELD.pop().close()


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"--out {folder}: cannot write there ({LOCK_FILE}: {why(error, folder)}): make room, or choose another folder"
    )


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
