"""How a server starts a worker in the place of one that died (MPI_Comm_spawn), while it serves the others.

The new process is this one's command line, and finds in its environment (launcher.JOINS) whose place it takes.
"""

import os
import sys
import threading

from mpi4py import MPI

from hvdvae.errors import WorldError
from hvdvae.launcher import JOINS
from hvdvae.ps.channel import Channel
from hvdvae.ps.hello import Hello, check_hello

MOST = 3
"""Workers that are started for one place: what keeps dying there has a reason that a new process does not cure."""


class Recruiter:
    """One a server. Starting takes seconds and is done in a thread."""

    def __init__(self, channel: Channel, hello: Hello) -> None:
        """Nobody is to be started yet. `hello`: what the workers said when they met."""
        self._channel, self._hello = channel, hello
        self._threads: list[threading.Thread] = []
        self._started: dict[int, int] = {}
        self.expected: set[int] = set()
        """Places for which a worker was started that has not come yet."""
        self._there: set[int] = set()
        """Those of them whose worker can be heard."""

    def replace(self, worker: int) -> None:
        """Start a worker in this one's place, unless too many have died there. Does not block."""
        self._started[worker] = self._started.get(worker, 0) + 1
        if self._started[worker] > MOST:
            sys.stderr.write(f"hvdvae: {MOST} workers were started in the place of worker {worker} and died: no more\n")
            return
        self.expected.add(worker)
        thread = threading.Thread(target=self._start, args=(worker,), name=f"hvdvae-start-{worker}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def replace_lost(self, dead: set[int]) -> None:
        """Start another for those that have died before they came."""
        for worker in sorted(self._there & dead):
            sys.stderr.write(f"hvdvae: the new worker {worker} has died before it came\n")
            self._there.discard(worker)
            self.expected.discard(worker)
            self.replace(worker)

    def refusal(self, worker: int, hello: Hello, *, is_over: bool) -> str | None:
        """Why the one that has come for this place cannot have it; None if it can."""
        self.expected.discard(worker)
        self._there.discard(worker)
        if is_over:
            return "the run has ended meanwhile"
        try:
            check_hello([self._hello, hello], workers=2)
        except WorldError as error:
            return str(error)
        return None

    def wait(self) -> None:
        """Return once all that were started can be heard, or could not be. Blocks."""
        for thread in self._threads:
            thread.join()

    def _start(self, worker: int) -> None:
        options = MPI.Info.Create()
        options.Set("PMIX_ENVAR", f"{JOINS}={worker}/{self._channel.workers}")
        options.Set("wdir", os.getcwd())
        try:
            both = MPI.COMM_SELF.Spawn(sys.executable, sys.orig_argv[1:], info=options)
            self._channel.admit(worker, both.Merge(high=True), 0)
            self._there.add(worker)
        except MPI.Exception as error:
            self.expected.discard(worker)
            sys.stderr.write(
                f"hvdvae: no worker could be started in the place of worker {worker} ({error}); the "
                "others go on: has the job a free slot (mpirun --map-by :OVERSUBSCRIBE)?\n"
            )
