"""SIGINT, SIGTERM and SIGUSR1 as a flag that the loop reads, so that a run can save before it leaves.

Slurm sends SIGUSR1 where a job asks for a warning (`--signal=USR1@120`), and mpirun forwards it; a SIGTERM that mpirun
gets itself leaves the ranks about half a second.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Terminated(KeyboardInterrupt):
    """SIGTERM came where it acts as Ctrl-C does."""


class Caught:
    """Number of the signal that came; 0 while none has."""

    number = 0


_BEFORE: list[Callable[[int, FrameType | None], object] | int] = []
"""What SIGTERM did before it was caught, the last last."""


def _let_children_end() -> None:
    """In a forked child: a pool, or whoever else forks, ends its workers by SIGTERM, and waits for them.

    Not by the others: Ctrl-C, and a warning of Slurm, come to all processes, and are for the rank to act on.
    """
    if _BEFORE:
        signal.signal(signal.SIGTERM, _BEFORE[0])


os.register_at_fork(after_in_child=_let_children_end)


@contextmanager
def caught() -> Iterator[Caught]:
    """Catch them inside; a second SIGINT acts as if not caught. Only the main thread can catch signals."""
    flag = Caught()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def note(number: int, frame: FrameType | None) -> None:
        flag.number = number
        # mpirun and Slurm repeat SIGTERM; an impatient user repeats Ctrl-C and means it.
        if number == signal.SIGINT:
            signal.signal(number, before[signal.Signals(number)])

    # A handler that a C library installed reads as None, and cannot be set again from here.
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOPPING}
    _BEFORE.append(before[signal.SIGTERM])
    try:
        for number in STOPPING:
            signal.signal(number, note)
        yield flag
    finally:
        _BEFORE.pop()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deaf_to_warnings() -> Iterator[None]:
    """Inside, a SIGUSR1 (time is nearly up) does nothing: all is saved, and what is left may still end in time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before or signal.SIG_DFL)


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated, so that what was interrupted can say so; not while C code waits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    _BEFORE.append(before or signal.SIG_DFL)
    try:
        yield
    finally:
        _BEFORE.pop()
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
