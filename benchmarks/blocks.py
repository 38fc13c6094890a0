"""One timed block of one side, or of several sides that take turns.

Before the clock starts a side warms up, and says how many steps fill the time asked for.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from mpi4py import MPI

from benchmarks.side import Run, Side
from benchmarks.statistics_of_rounds import rotated
from benchmarks.task import Task

FIRST_STEPS = 3
"""Steps in which kernels are chosen and buffers made; they say nothing of the pace."""
WARM_UP_SHARE = 0.15
"""Further warm-up, as a share of the block, which also tells the pace."""
PIECES = 8
"""Turns that each of several sides takes in a block."""


class Block(NamedTuple):
    """What was measured."""

    examples: int
    """Of all ranks."""
    steps: int
    seconds: float
    """The longest that a rank took."""

    @property
    def examples_per_second(self) -> float:
        """Of all ranks together."""
        return self.examples / self.seconds

    @property
    def milliseconds_per_step(self) -> float:
        """Of the rank that took longest."""
        return 1e3 * self.seconds / self.steps


def _timed(run: Run, steps: int) -> float:
    start = time.perf_counter()
    run(steps)
    return time.perf_counter() - start


def _pace(run: Run, seconds: float) -> float:
    """Warm up for about so many seconds; seconds a step."""
    run(FIRST_STEPS)
    pace = _timed(run, 2) / 2
    steps = max(2, int(WARM_UP_SHARE * seconds / pace))
    return _timed(run, steps) / steps


def together(side: Side, task: Task, seconds: float, world: MPI.Comm) -> Block:
    """A block of a side on all ranks of `world`. Blocks; every rank must call it.

    The clock runs from a barrier until the last rank is through. What goes wrong on all ranks is raised on
    all of them; what goes wrong on one ends the job by the deadline of what the others wait in.
    """
    with side.open(task) as run:
        run(FIRST_STEPS)
        pace = world.allreduce(_timed(run, 2) / 2, MPI.MAX)
        warm_up = max(2, int(WARM_UP_SHARE * seconds / pace))
        pace = world.allreduce(_timed(run, warm_up) / warm_up, MPI.MAX)
        steps = max(2, round(seconds / pace))
        world.Barrier()
        longest = world.allreduce(_timed(run, steps), MPI.MAX)
        del run  # A side must be able to free what it holds before it closes what that stands on.
    return Block(steps * task.batch * world.size, steps, longest)


def in_turns(sides: Sequence[Side], task: Task, seconds: float, first: int) -> dict[str, Block | Exception]:
    """Blocks of several sides in this process, in PIECES pieces each, one side's piece after the other's.

    So a difference of some percent between them is not the machine's mood. `first`: which side begins. A
    side that raises has its exception for a result.
    """
    failed: dict[str, Exception] = {}
    runs: dict[str, Run] = {}
    steps: dict[str, int] = {}
    spent: dict[str, float] = {side.key: 0.0 for side in sides}
    with ExitStack() as opened:
        for side in sides:
            try:
                runs[side.key] = opened.enter_context(side.open(task))
                steps[side.key] = max(1, round(seconds / PIECES / _pace(runs[side.key], seconds)))
            except Exception as error:  # Whatever it is, the other sides can still be measured.
                failed[side.key] = error
        for piece in range(PIECES):
            for key in rotated([key for key in runs if key not in failed], first + piece):
                try:
                    spent[key] += _timed(runs[key], steps[key])
                except Exception as error:
                    failed[key] = error
    done = {key: PIECES * steps[key] for key in runs if key not in failed}
    return failed | {key: Block(count * task.batch, count, spent[key]) for key, count in done.items()}
