"""Trouble comes in the doses that were ordered, to whom it was ordered for, and changes nothing else."""

import math
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdvae.disturbance import Disturbance, Jitter, Kill, Slow, Stop, Trouble
from hvdvae.errors import ConfigError


def passes_of(troubles: list[Trouble], *, rank: int, steps: int, seed: int = 0) -> list[int]:
    """Extra passes of each step."""
    disturbance = Disturbance(troubles, seed=seed, rank=rank)
    counts = []
    for step in range(steps):
        done: list[None] = []
        disturbance.before_step(step, lambda done=done: done.append(None))  # type: ignore[misc]
        counts.append(len(done))
    return counts


@given(factor=st.floats(1, 20), steps=st.integers(1, 60))
def test_a_slow_rank_does_so_many_times_the_work_in_whole_passes(factor: float, steps: int) -> None:
    extra = sum(passes_of([Slow(rank=1, factor=factor)], rank=1, steps=steps))
    assert abs(extra - (factor - 1) * steps) < 1 + 1e-6


def test_the_other_ranks_are_left_alone() -> None:
    assert passes_of([Slow(rank=1, factor=3)], rank=0, steps=5) == [0] * 5
    assert passes_of([Slow(rank=1, factor=3)], rank=1, steps=5) == [2] * 5


def test_fractions_are_carried_over() -> None:
    assert passes_of([Slow(rank=0, factor=1.1)], rank=0, steps=20) == ([0] * 9 + [1]) * 2


def test_jitter_has_its_mean_and_a_heavy_tail() -> None:
    extra = np.array([Jitter(mean=0.5, sigma=1.0).extra(0, 1, step) for step in range(20_000)])
    assert extra.mean() == pytest.approx(0.5, rel=0.05)
    # A log-normal's median is exp(-sigma^2 / 2) of its mean, its 99th percentile exp(2.326 sigma) of that.
    assert np.median(extra) == pytest.approx(0.5 * math.exp(-0.5), rel=0.05)
    assert np.quantile(extra, 0.99) == pytest.approx(0.5 * math.exp(-0.5) * math.exp(2.326), rel=0.15)


def test_jitter_is_each_ranks_own_and_the_same_every_time() -> None:
    jitter = Jitter(mean=1.0, sigma=1.0)
    assert jitter.extra(0, 1, 7) == jitter.extra(0, 1, 7)
    different = {jitter.extra(*key) for key in ((0, 1, 7), (1, 1, 7), (0, 2, 7), (0, 1, 8))}
    assert len(different) == 4


def test_sleep_is_measured_in_the_steps_own_work() -> None:
    disturbance = Disturbance([Slow(rank=0, factor=3, by="sleep")], seed=0, rank=0)
    disturbance.worked(0.05)
    done: list[None] = []
    processor, begin = time.process_time(), time.perf_counter()
    disturbance.before_step(0, lambda: done.append(None))
    assert time.perf_counter() - begin >= 0.1
    assert time.process_time() - processor < 0.05
    assert not done


PROGRAM = """
import sys, time
from hvdvae.disturbance import Disturbance, Kill, Stop
trouble = {trouble}
disturbance = Disturbance([trouble], seed=0, rank={rank})
for step in range(3):
    begin = time.perf_counter()
    disturbance.before_step(step, lambda: None)
    print(step, time.perf_counter() - begin, flush=True)
"""


def run(trouble: Trouble, rank: int) -> tuple[int, dict[int, float]]:
    """Status of a process of its own, and seconds of each step."""
    program = PROGRAM.format(trouble=repr(trouble), rank=rank)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    return ended.returncode, {int(step): float(took) for step, took in map(str.split, ended.stdout.splitlines())}


def test_a_rank_stops_for_so_long_and_goes_on() -> None:
    status, took = run(Stop(rank=1, seconds=0.5, at_step=1), rank=1)
    assert status == 0
    assert sorted(took) == [0, 1, 2]
    assert took[1] >= 0.5
    assert max(took[0], took[2]) < 0.5


def test_a_rank_dies_at_its_step() -> None:
    status, took = run(Kill(rank=1, at_step=1), rank=1)
    assert status == -9
    assert sorted(took) == [0]
    assert run(Kill(rank=1, at_step=1), rank=0)[0] == 0


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Slow, {"rank": 0, "factor": 0.5}, "factor is 0.5"),
        (Slow, {"rank": -1, "factor": 2}, "rank is -1"),
        (Slow, {"rank": 0, "factor": math.nan}, "factor is nan"),
        (Slow, {"rank": 0, "factor": 2, "by": "magic"}, "by is 'magic'"),
        (Jitter, {"mean": -1, "sigma": 1}, "mean is -1"),
        (Jitter, {"mean": 1, "sigma": math.inf}, "sigma is inf"),
        (Stop, {"rank": 0, "seconds": 0, "at_step": 1}, "seconds is 0"),
        (Kill, {"rank": 0, "at_step": -1}, "at_step is -1"),
    ],
)
def test_impossible_trouble_is_refused(kind: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**values)
