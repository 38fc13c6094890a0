"""Deadlines on waits that cannot be interrupted: a thread a process that watches the thread that computes.

A rank that waits in a collective is inside C code; no signal or exception reaches it there. So a watchdog thread
looks on. Once a wait is past its deadline it says which rank waits for which, at what step, prints the stacks, and
ends the job.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from hvdvae.abort import abort_job

EXIT_CODE = 75
"""Exit status of a job that a watchdog ended (EX_TEMPFAIL: restart from the checkpoint)."""

PATIENCE = 12
"""Deadlines that a patient wait lasts where nobody can be asked."""

STUCK_SECONDS = 3.0
"""After which a call of MPI that should have returned is taken to be stuck."""

LOCKED_SECONDS = 10.0
"""Beyond two deadlines: after which a library that keeps the interpreter's lock ends the process."""

ANSWER_SECONDS = 3.0
"""How long the others have to say what they are doing."""


@dataclass(frozen=True)
class State:
    """What one rank is doing."""

    rank: int
    host: str
    step: int
    waiting: str
    """Name of the operation it waits in; empty while it computes."""
    seconds: float
    """How long it has waited."""
    where: str
    """Innermost line of its Python stack."""

    def __str__(self) -> str:
        """One line, as the late rank prints it."""
        doing = f"waits in {self.waiting!r} for {self.seconds:.1f} s" if self.waiting else "computes"
        return f"rank {self.rank} ({self.host}) {doing}, step {self.step}, at {self.where}"


class Inquiry(Protocol):
    """How watchdogs of several ranks ask each other (world/mpi.py)."""

    lost: set[int]
    """Ranks that are known to have died, or left, while the job goes on."""

    def answer(self, state: Callable[[], State]) -> None:
        """Answer all questions that have come in; does not block."""

    def ask(self, state: Callable[[], State], seconds: float) -> dict[int, State]:
        """Ask all others, for at most so many seconds."""


class Watchdog:
    """Watches the thread that made it; `waiting` marks the waits. One a process."""

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        seconds: float,
        inquiry: Inquiry | None = None,
    ) -> None:
        """Build only; `start` runs it. `seconds`: how long a wait may last."""
        self.step = 0
        self.waited = 0.0
        """Seconds spent in waits so far."""
        self.seconds = seconds
        self.part_of: Callable[[int], str] = lambda rank: ""
        """What a rank holds of a model that several hold together, for messages."""
        self._rank, self._size = rank, size
        self._host = socket.gethostname()
        self._inquiry = inquiry
        self._watched = threading.get_ident()
        self._wait: tuple[str, float, bool] | None = None
        self._stopped = threading.Event()
        # Two threads: one that answers over MPI, which may get stuck there behind a rank that was stopped while it held
        # a lock in shared memory; and one that looks on, and never does.
        self._threads = [threading.Thread(target=self._watch, name="hvdvae-watchdog", daemon=True)]
        if inquiry is not None:
            self._threads.append(threading.Thread(target=self._answer, name="hvdvae-answers", daemon=True))

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def forget(self, ranks: set[int]) -> None:
        """Ask no more of these, which have left, though the job goes on. Local."""
        if self._inquiry is not None:
            self._inquiry.lost |= ranks

    def stop(self) -> None:
        """End the threads; blocks until they have ended (at most one period)."""
        self._stopped.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def waiting(self, operation: str, *, patient: bool = False) -> Iterator[None]:
        """Mark that the body waits for other ranks, in `operation`. Costs about a microsecond.

        `patient`: another rank may be busy for long (a download, say). Past the deadline the wait then goes on as long
        as every other rank answers; where ranks cannot ask each other, for PATIENCE deadlines.
        """
        outer = self._wait
        start = time.monotonic()
        self._wait = (operation, start, patient)
        try:
            yield
        finally:
            self._wait = outer
            if outer is None:
                self.waited += time.monotonic() - start

    def state(self) -> State:
        """What the watched thread is doing now."""
        wait = self._wait
        frame = sys._current_frames().get(self._watched)
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "no Python code"
        return State(
            rank=self._rank,
            host=self._host,
            step=self.step,
            waiting=wait[0] if wait else "",
            seconds=time.monotonic() - wait[1] if wait else 0.0,
            where=where,
        )

    def _watch(self) -> None:
        while not self._stopped.wait(self._period()):
            # A library may wait for a lock with the interpreter's in hand (Horovod's enqueueing does, behind a call of
            # MPI that never returns): then no Python runs, this thread included. This timer needs none.
            faulthandler.dump_traceback_later(2 * self.seconds + LOCKED_SECONDS, exit=True, file=sys.__stderr__ or 2)
            wait = self._wait
            if wait is None:
                continue
            _, start, patient = wait
            lasted = time.monotonic() - start
            if lasted > self.seconds * (1 if not patient or self._inquiry is not None else PATIENCE):
                self._expire(wait)

    def _answer(self) -> None:
        assert self._inquiry is not None
        while not self._stopped.wait(self._period()):
            self._inquiry.answer(self.state)

    def _period(self) -> float:
        return min(0.5, self.seconds / 4)

    def _ask(self) -> dict[int, State]:
        found: dict[int, State] = {}
        inquiry = self._inquiry
        if inquiry is not None:
            asking = threading.Thread(target=lambda: found.update(inquiry.ask(self.state, ANSWER_SECONDS)), daemon=True)
            asking.start()
            asking.join(ANSWER_SECONDS + STUCK_SECONDS)
        return found

    def _expire(self, wait: tuple[str, float, bool]) -> None:
        mine = self.state()
        others = self._ask()
        if self._wait is not wait:  # The others came while we asked.
            return
        _, _, patient = wait
        if patient and self._inquiry is not None and len(others) + len(self._inquiry.lost) == self._size - 1:
            return
        sys.stderr.write(self.report(mine, others))
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        # Aborting goes through MPI, too; whatever it does, this process ends, and the launcher ends the others.
        threading.Thread(target=_exit_later, daemon=True).start()
        abort_job(EXIT_CODE)

    def report(self, mine: State, others: dict[int, State]) -> str:
        """Which rank waits for which: `mine` waits, `others` answered; ranks that did not are named as silent."""
        lines = [
            f"hvdvae: deadline of {self.seconds:g} s exceeded (--deadline): {mine}",
        ]
        lost = self._inquiry.lost if self._inquiry is not None else set()
        known = {self._rank, *others, *lost}
        missing = [rank for rank in range(self._size) if rank not in known]
        for rank in sorted(others):
            other = others[rank]
            together = other.waiting == mine.waiting and other.step == mine.step
            lines.append(f"  {'also there' if together else 'waited for'}: {other}")
        if self._inquiry is not None:
            for rank in missing:
                part = f" ({held})" if (held := self.part_of(rank)) else ""
                lines.append(
                    f"  waited for: rank {rank}{part} does not answer: stopped, swapping, or its host or link is gone"
                )
        elif missing:
            lines.append(
                "  which rank is late is not known: this MPI (or Gloo) lets only one thread of a process send messages"
            )
        return "\n".join(lines) + "\n"


def _exit_later() -> None:
    time.sleep(STUCK_SECONDS)
    os._exit(EXIT_CODE)
