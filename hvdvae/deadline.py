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
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from hvdvae.abort import abort_job

EXIT_CODE = 75
"""Exit status of a job that a watchdog ended (EX_TEMPFAIL: restart from the checkpoint)."""

PATIENCE = 12
"""Deadlines that a patient wait lasts where nobody can be asked."""

STUCK_SECONDS = 3.0
"""After which a call of MPI that should have returned is taken to be stuck."""

LOCKED_SECONDS = 10.0
"""Beyond two deadlines: after which a library that keeps the interpreter's lock ends the process."""

DEPARTED_SECONDS = 1.0
"""After which a wait for a rank that has left is taken to be in vain."""

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


class Group(NamedTuple):
    """Ranks that come to the same waits, all of them to all."""

    name: str
    ranks: tuple[int, ...]
    """In the numbering of the watchdogs."""


@dataclass(frozen=True)
class Departure:
    """A rank has left for good: its program has ended, or it has closed its World."""

    rank: int
    host: str
    steps: int
    """That it took."""
    waits: dict[str, int]
    """That it came to, by the name of the group."""


class Inquiry(Protocol):
    """How watchdogs of several ranks ask each other (world/mpi.py)."""

    lost: set[int]
    """Ranks that are known to have died, or left, while the job goes on."""
    departed: dict[int, Departure]
    """What ranks have said that have left."""

    def leave(self, departure: Departure) -> None:
        """Say so to all others; does not block."""

    def answer(self, state: Callable[[], State]) -> None:
        """Answer all questions that have come in; does not block."""

    def ask(self, state: Callable[[], State], seconds: float) -> dict[int, State]:
        """Ask all others, for at most so many seconds."""


class _Wait(NamedTuple):
    """One that is going on."""

    operation: str
    start: float
    patient: bool
    group: Group | None
    """That all come to it, where that is known."""
    number: int
    """Of this wait among those of the group."""


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
        self._wait: _Wait | None = None
        self._waits: Counter[str] = Counter()
        """Those of each group so far, by its name."""
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
    def waiting(self, operation: str, *, patient: bool = False, group: Group | None = None) -> Iterator[None]:
        """Mark that the body waits for other ranks, in `operation`. Costs about a microsecond.

        `patient`: another rank may be busy for long (a download, say). Past the deadline the wait then goes on as long
        as every other rank answers, unless each has waited as long and they wait in different operations; where ranks
        cannot ask each other, for PATIENCE deadlines. `group`: ranks that all come to this wait; one that has left
        before ends the job.
        """
        outer = self._wait
        start = time.monotonic()
        number = 0
        if group is not None:
            number = self._waits[group.name] = self._waits[group.name] + 1
        self._wait = _Wait(operation, start, patient, group, number)
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
            waiting=wait.operation if wait else "",
            seconds=time.monotonic() - wait.start if wait else 0.0,
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
            lasted = time.monotonic() - wait.start
            if lasted > min(DEPARTED_SECONDS, self.seconds) and (gone := self.departed()) and self._wait is wait:
                self._end(f"hvdvae: error: {gone}\n")
            if lasted > self.seconds * (1 if not wait.patient or self._inquiry is not None else PATIENCE):
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

    def leave(self) -> None:
        """Say to all others that this rank comes to no more waits of any group. Does not block."""
        if self._inquiry is not None:
            self._inquiry.leave(Departure(self._rank, self._host, self.step, dict(self._waits)))

    def departed(self) -> str:
        """Which rank has left before it came to the wait that is going on, and what to do; empty: none has. Local."""
        wait = self._wait
        if wait is None or wait.group is None or self._inquiry is None:
            return ""
        for rank, one in sorted(self._inquiry.departed.items()):
            is_missing = rank in wait.group.ranks and one.waits.get(wait.group.name, 0) < wait.number
            if is_missing and rank not in self._inquiry.lost:
                return (
                    f"rank {rank} ({one.host}) has finished after {one.steps} steps, and {self.state()}: "
                    "give all ranks as many batches (a sampler that pads or drops, or the least number over all ranks)"
                )
        return ""

    def _expire(self, wait: _Wait) -> None:
        mine = self.state()
        others = self._ask()
        if self._wait is not wait:  # The others came while we asked.
            return
        everyone = self._inquiry is not None and len(others) + len(self._inquiry.lost) == self._size - 1
        if wait.patient and everyone and not self._is_deadlock(mine, others):
            return
        self._end(self.report(mine, others))

    def _is_deadlock(self, mine: State, others: dict[int, State]) -> bool:
        """Whether nobody computes, all have waited for a deadline, and not for each other in the same operation."""
        states = [mine, *others.values()]
        all_wait = all(state.waiting and state.seconds > self.seconds for state in states)
        return all_wait and len({state.waiting for state in states}) > 1

    def _end(self, words: str) -> None:
        sys.stderr.write(words)
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
