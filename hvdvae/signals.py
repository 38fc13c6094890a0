"""SIGINT and SIGTERM as a flag that the loop reads, so that a run can save before it leaves."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Caught:
    """Number of the signal that came; 0 while none has."""

    number = 0


@contextmanager
def caught() -> Iterator[Caught]:
    """Catch SIGINT and SIGTERM inside; a second one acts as if not caught. Only the main thread can catch signals."""
    flag = Caught()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def note(number: int, frame: FrameType | None) -> None:
        flag.number = number
        # mpirun and Slurm repeat SIGTERM; an impatient user repeats Ctrl-C and means it.
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
