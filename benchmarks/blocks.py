"""One timed block of one side, or of several sides that take turns.

Before the clock starts a side warms up, and says how many steps fill the time asked for.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks.crew import Crew
from benchmarks.side import Run, Side
from benchmarks.statistics_of_rounds import rotated
from benchmarks.task import Task

FIRST_STEPS = 3
"""Steps in which kernels are chosen and buffers made; they say nothing of the pace."""
WARM_UP_SHARE = 0.15
"""Further warm-up, as a share of the block, which also tells the pace."""
PIECES = 8
"""Turns that each of several sides takes in a block."""

Result = dict[str, Any]
"""`examples` of all ranks, `steps` and `seconds`; or `failed`, with the reason."""


def together(side: Side, task: Task, seconds: float, crew: Crew) -> Result:
    """A block of one side. Blocks; every rank of the crew must call it.

    The clock runs from a barrier until the last rank is through. What goes wrong on all ranks is returned; what goes
    wrong on one ends the crew, by the deadline of whatever the others wait in.
    """
    try:
        with side.open(task) as run:
            run(FIRST_STEPS)
            pace = max(crew.gather(_timed(run, 2))) / 2
            warm_up = max(2, int(WARM_UP_SHARE * seconds / pace))
            pace = max(crew.gather(_timed(run, warm_up))) / warm_up
            steps = max(2, round(seconds / pace))
            crew.barrier()
            longest = max(crew.gather(_timed(run, steps)))
            del run  # A side must be able to free what it holds before it closes what that stands on.
    except Exception as error:  # Whatever it is, the other sides can still be measured.
        return _failed(error)
    return _done(steps * task.batch * crew.size, steps, longest)


def in_turns(sides: Sequence[Side], task: Task, seconds: float, first: int) -> dict[str, Result]:
    """Blocks of several sides in this process, in PIECES pieces each, one side's piece after the other's.

    So a difference of some percent between them is not the machine's mood. `first`: which side begins.
    """
    runs: dict[str, Run] = {}
    steps: dict[str, int] = {}
    spent: dict[str, float] = {side.key: 0.0 for side in sides}
    failed: dict[str, Result] = {}
    with ExitStack() as opened:
        for side in sides:
            try:
                run = opened.enter_context(side.open(task))
                run(FIRST_STEPS)
                warm_up = max(2, int(WARM_UP_SHARE * seconds / (_timed(run, 2) / 2)))
                steps[side.key] = max(1, round(seconds / PIECES / (_timed(run, warm_up) / warm_up)))
                runs[side.key] = run
            except Exception as error:
                failed[side.key] = _failed(error)
        for piece in range(PIECES):
            for key in rotated([key for key in runs if key not in failed], first + piece):
                try:
                    spent[key] += _timed(runs[key], steps[key])
                except Exception as error:
                    failed[key] = _failed(error)
    done = {key: PIECES * steps[key] for key in runs if key not in failed}
    return failed | {key: _done(count * task.batch, count, spent[key]) for key, count in done.items()}


def _timed(run: Run, steps: int) -> float:
    start = time.perf_counter()
    run(steps)
    return time.perf_counter() - start


def _done(examples: int, steps: int, seconds: float) -> Result:
    return {"examples": examples, "steps": steps, "seconds": seconds}


def _failed(error: Exception) -> Result:
    return {"failed": f"{type(error).__name__}: {error}"}
