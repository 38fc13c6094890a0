"""End the whole job at once, from any rank and any state."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from hvdvae.launcher import survives_deaths

LEFT: set[int] = set()
"""Ranks of the launch that have ended well before the others, which had no work for them."""
_LAUNCHER = os.getppid()
TELL_OTHERS: list[Callable[[int], None]] = []
"""How to have all other ranks end with a code, each by itself; one at most, known once ranks have met."""
_ENDING = threading.Lock()
TURN_SECONDS = 1.0
"""That a rank leaves to the first of those that live to end the job."""
LAST_SECONDS = 0.5
"""Within which a rank hears that it is the only one that is left."""
TOLD_SECONDS = 2.0
"""That the others have to end by themselves; they listen twice a second (deadline.py)."""
GRACE_SECONDS, KILL_SECONDS = 4, 8
"""That the launcher has to end the job before it is told by a signal, and before it is ended by one."""


def abort_job(code: int) -> NoReturn:
    """End this process, and through MPI, where it runs, all others, with a non-zero code.

    Without MPI the launcher notices the death and ends the others. Does not return; buffers are flushed first.
    """
    if not _ENDING.acquire(blocking=False):
        # Another thread ends this process already, with the code of what went wrong first.
        time.sleep(TURN_SECONDS + TOLD_SECONDS + GRACE_SECONDS + KILL_SECONDS)
        os._exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if "mpi4py.MPI" in sys.modules:
        mpi = sys.modules["mpi4py.MPI"]
        if mpi.Is_initialized() and not mpi.Is_finalized():
            if survives_deaths(os.environ):
                if not _is_first(mpi):
                    # Open MPI's launcher takes an abort for one more death now and then. So one aborts, and the others
                    # are there to be ended: the last of several that abort would be the only one that is left.
                    time.sleep(TURN_SECONDS)
                if _is_last(mpi, LAST_SECONDS):
                    # Open MPI's launcher ends with 0 where the only rank that is left aborts.
                    os._exit(code)
                _end_launcher()
                # Of four ranks and more the launcher takes an abort for one more death, always: the others would live
                # until it is told by a signal, after which it has a status of its own, 1.
                for tell in TELL_OTHERS:
                    with suppress(mpi.Exception):  # Who does not hear it is ended with the launcher.
                        tell(code)
                    if _is_last(mpi, TOLD_SECONDS):
                        os._exit(code)
                threading.Timer(GRACE_SECONDS + KILL_SECONDS, os._exit, [code]).start()
            mpi.COMM_WORLD.Abort(code)
    os._exit(code)


def _is_last(mpi: Any, seconds: float) -> bool:
    """Whether all other ranks of the launch have gone, as far as is heard in so many seconds."""
    size, give_up = mpi.COMM_WORLD.size, time.monotonic() + seconds
    while time.monotonic() < give_up:
        if size > 1 and len(_gone(mpi)) == size - 1:
            return True
        time.sleep(0.02)
    return False


def _is_first(mpi: Any) -> bool:
    """Whether no rank before this one is known to live."""
    return set(range(mpi.COMM_WORLD.rank)) <= _gone(mpi)


def _gone(mpi: Any) -> set[int]:
    everyone = mpi.COMM_WORLD
    with suppress(mpi.Exception):  # The probe is for MPI to hear the news.
        everyone.Iprobe(mpi.ANY_SOURCE, mpi.ANY_TAG)
    try:
        everyone.Ack_failed()
        failed = everyone.Get_failed()
    except mpi.Exception:  # Who ends the job needs no answer.
        return LEFT
    return LEFT.union(failed.Translate_ranks(list(range(failed.size)), everyone.Get_group()))


def _end_launcher() -> None:
    """Where ranks may die and others go on, Open MPI's launcher has been seen to take an abort for one more death.

    And, where several abort at once, never to return.
    """
    nowhere, parent = subprocess.DEVNULL, os.getppid()
    if parent != _LAUNCHER or parent == 1:
        return  # It has gone, and this process was handed to another.
    words = f"sleep {GRACE_SECONDS}; kill -TERM {parent} && sleep {KILL_SECONDS} && kill -KILL {parent}"
    command = ["sh", "-c", words]
    subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)
