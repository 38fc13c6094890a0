"""Where the time of a rank's steps goes: on the clock, on the processor, and in the queue for one.

Columns of a step, seconds, float64:

    DATA           getting the batch
    TROUBLE        what a scenario adds: work, or sleep
    PASSES         forward and backward
    EXCHANGE       with other ranks, where that is a part of its own
    UPDATE         of the weights

and of all but the first, beside them,

    .. + CPU       the part in which this thread ran
    .. + QUEUE     the part in which it was ready to run, and other processes had the cores
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

DATA, TROUBLE, PASSES, EXCHANGE, UPDATE = 0, 1, 4, 7, 10
CPU, QUEUE = 1, 2
COLUMNS = 13


class Stopwatch:
    """Of the thread that makes it."""

    def __init__(self) -> None:
        """Nothing measured yet."""
        self._rows: list[list[float]] = []
        self._row = [0.0] * COLUMNS
        try:
            # Where the kernel tells how long this thread waited for a core.
            self._schedule: int | None = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except OSError:
            self._schedule = None

    @contextmanager
    def on(self, column: int) -> Iterator[None]:
        """Inside, time goes into a column, and into the two beside it."""
        processor, queue = time.thread_time(), self._queued()
        begin = time.perf_counter()
        yield
        self._row[column] += time.perf_counter() - begin
        if column != DATA:
            self._row[column + CPU] += time.thread_time() - processor
            self._row[column + QUEUE] += self._queued() - queue

    @property
    def work_seconds(self) -> float:
        """Of the processor, in the passes of the step that is being measured."""
        return self._row[PASSES + CPU]

    def next_step(self) -> None:
        """The step has ended."""
        self._rows.append(self._row)
        self._row = [0.0] * COLUMNS

    def steps(self) -> NDArray[np.float64]:
        """(steps, COLUMNS)."""
        return np.array(self._rows, dtype=np.float64).reshape(-1, COLUMNS)

    def _queued(self) -> float:
        """Seconds since the start of this thread; 0 where nobody tells."""
        if self._schedule is None:
            return 0.0
        return int(os.pread(self._schedule, 64, 0).split()[1]) / 1e9
