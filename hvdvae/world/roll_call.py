"""Watches, until the ranks have met, whether all of this host are there, in a process of its own.

MPI_Init lets no thread run. Where MPI lets ranks go on when one dies, or Slurm does, those that wait in MPI_Init for
one that was killed before it would wait until their deadline, and nobody could say for whom. The launcher's variables
say which ranks this host has, and /proc which of them live. `watched` is the rank's; this file itself is the program of
the watching process, which ends when the rank closes its standard input, or is gone.
"""

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

LOOK_SECONDS = 0.5
GRACE_SECONDS = 3.0
"""That a rank may be missing: launchers start the ranks of a host together."""
KILL_SECONDS = 2.0
STATUS = 64
"""With which a rank ends that waits for one that is gone: the number of the signal that ends it (`_exits_by`)."""
_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_STEP_ID")
"""Variables that tell jobs apart, the first that is set."""
_DAEMONS = {"prterun", "prted", "mpirun", "mpiexec", "orterun", "orted"}
"""Programs that start all ranks of a host before any of them has come far."""


@contextmanager
def watched(environ: Mapping[str, str], rank_variable: str, local_size: int, size: int) -> Iterator[None]:
    """Inside, ranks of this host that are gone end this process, with words that name them. Linux; else nothing.

    `rank_variable`: where the launcher says a process's rank; `local_size`, `size`: ranks of this host (0: not known),
    and of all.
    """
    job = next((name for name in _JOBS if name in environ), None)
    if sys.platform != "linux" or job is None or rank_variable not in environ:
        yield
        return
    words = [str(os.getpid()), rank_variable, job, environ[job], str(local_size), str(size)]
    # Without the launcher's variables: it is no rank.
    clean = {name: environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in environ}
    try:
        process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-s", __file__, *words],
            stdin=subprocess.PIPE,
            env=clean,
            start_new_session=True,
        )
    except OSError:
        yield
        return
    try:
        with _exits_by(STATUS):
            yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


@contextmanager
def _exits_by(number: int) -> Iterator[None]:
    """Inside, this signal ends the process with the signal's number as its status, without any Python.

    Open MPI's launcher ends with 0 where all ranks have died of signals, as ranks may.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    before = libc.signal(number, ctypes.cast(libc._exit, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(number, before)


def living(variable: str, job: str, value: str) -> tuple[dict[int, int], set[int]]:
    """Processes of a job's ranks on this host, by rank; and those of this user that may not be looked at."""
    found: dict[int, int] = {}
    closed: set[int] = set()
    mine = os.getuid()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid != mine:
                continue
            with open(f"/proc/{name}/environ", "rb") as file:
                variables = dict(line.split(b"=", 1) for line in file.read().split(b"\0") if b"=" in line)
        except PermissionError:
            closed.add(int(name))
            continue
        except (FileNotFoundError, ProcessLookupError):
            continue
        if variables.get(job.encode()) == value.encode() and variable.encode() in variables:
            found[int(variables[variable.encode()])] = int(name)
    return found, closed


def ancestors(process: int) -> dict[int, str]:
    """Processes above one, as far as they can be seen: their programs' names, by number."""
    names = {}
    at = process
    while at > 0:
        with open(f"/proc/{at}/stat") as file:
            text = file.read()
        names[at] = text[text.index("(") + 1 : text.rindex(")")]
        at = int(text[text.rindex(")") + 2 :].split()[1])
    del names[process]
    return names


class RollCall:
    """Who was there, and since when somebody is missing. Pure."""

    def __init__(self, local_size: int, size: int) -> None:
        """`local_size`: ranks that this host has, 0: not known; `size`: of all hosts."""
        self._local_size, self._size = local_size, size
        self._seen: dict[int, int] = {}
        self._missing_since: float | None = None

    def missing(self, living: Mapping[int, int], now: float) -> str:
        """Who has been gone for too long; empty: nobody."""
        self._seen.update(living)
        gone = sorted(self._seen.keys() - living.keys())
        if not gone and len(self._seen) >= self._local_size:
            self._missing_since = None
            return ""
        self._missing_since = now if self._missing_since is None else self._missing_since
        if now - self._missing_since < (LOOK_SECONDS if gone else GRACE_SECONDS):
            return ""
        if gone:
            return ", ".join(f"rank {rank} (process {self._seen[rank]})" for rank in gone)
        if self._local_size == self._size:
            return ", ".join(f"rank {rank}" for rank in range(self._size) if rank not in living)
        return f"{self._local_size - len(living)} of the {self._local_size} ranks of this host"


def main(words: list[str]) -> None:
    """Look, until standard input ends."""
    process, local_size, size = int(words[0]), int(words[4]), int(words[5])
    try:
        above = ancestors(process)
        _, closed = living(*words[1:4])
        # In a container of its own a rank sees no others.
        known = bool(_DAEMONS & {*above.values()}) and closed <= above.keys()
        call = RollCall(local_size if known else 0, size)
        while not select.select([0], [], [], LOOK_SECONDS)[0]:
            found, _ = living(*words[1:4])
            if gone := call.missing(found, time.monotonic()):
                sys.stderr.write(
                    f"hvdvae: error: {gone} on {socket.gethostname()} has ended before the ranks have met: start the "
                    "job again\n"
                )
                sys.stderr.flush()
                _end(process, lambda: bool(select.select([0], [], [], KILL_SECONDS)[0]))
                return
    except OSError:
        return  # Where this process may not look, it has nothing to say.


def _end(process: int, has_ended: Callable[[], bool]) -> None:
    for number in (STATUS, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(process, number)
        if has_ended():
            return


if __name__ == "__main__":
    main(sys.argv[1:])
