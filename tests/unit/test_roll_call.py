"""Ranks of a host that are gone before the ranks have met are named; those that are late are not."""

import os
import subprocess
import sys
import time

import pytest

from hvdvae.world import roll_call
from hvdvae.world.roll_call import GRACE_SECONDS, RollCall, ancestors, living


def test_who_was_there_and_is_gone_is_named_soon() -> None:
    call = RollCall(local_size=0, size=3)
    assert call.missing({0: 10, 1: 11}, 0.0) == ""
    assert call.missing({0: 10}, 1.0) == "", "once may be an accident"
    assert call.missing({0: 10, 1: 11}, 1.5) == ""
    assert call.missing({0: 10}, 2.0) == ""
    assert call.missing({0: 10}, 2.6) == "rank 1 (process 11)"


@pytest.mark.parametrize(("size", "named"), [(3, "rank 1, rank 2"), (6, "2 of the 3 ranks of this host")])
def test_who_never_came_is_missed_after_a_while(size: int, named: str) -> None:
    call = RollCall(local_size=3, size=size)
    assert call.missing({0: 10}, 5.0) == ""
    assert call.missing({0: 10}, 5.0 + GRACE_SECONDS / 2) == ""
    assert call.missing({0: 10}, 5.0 + GRACE_SECONDS) == named


def test_where_the_number_is_not_known_nobody_is_missed_that_was_not_seen() -> None:
    call = RollCall(local_size=0, size=3)
    assert call.missing({0: 10}, 0.0) == call.missing({0: 10}, 100.0) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_of_a_job_are_found_by_their_variables() -> None:
    sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    mine = {"A_JOB": "this one", "A_RANK": "3"}
    with (
        subprocess.Popen(sleeper, env={**os.environ, **mine}) as rank,
        subprocess.Popen(sleeper, env={**os.environ, **mine, "A_JOB": "another"}) as other,
    ):
        give_up = time.monotonic() + 30
        while living("A_RANK", "A_JOB", "this one")[0] != {3: rank.pid}:
            assert time.monotonic() < give_up
        rank.kill()
        other.kill()
    assert living("A_RANK", "A_JOB", "this one")[0] == {}
    assert os.getppid() in ancestors(os.getpid())


ENDS = """
import sys, time
from hvdvae.world.roll_call import watched

with watched({**__import__("os").environ, "SLURM_STEP_ID": "a step", "A_RANK": "0"}, "A_RANK", 0, 2):
    print("there", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_that_waits_for_one_that_is_gone_ends_with_its_name() -> None:
    environment = {**os.environ, "SLURM_STEP_ID": "a step"}
    sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    with (
        subprocess.Popen(sleeper, env={**environment, "A_RANK": "1"}) as lost,
        subprocess.Popen(
            [sys.executable, "-c", ENDS],
            env={**environment, "A_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as waits,
    ):
        assert waits.stdout is not None
        assert waits.stdout.readline() == "there\n"
        time.sleep(4 * roll_call.LOOK_SECONDS)
        lost.kill()
        lost.wait()
        _, said = waits.communicate(timeout=60)
    assert waits.returncode == roll_call.STATUS
    assert f"rank 1 (process {lost.pid}) on " in said
    assert "has ended before the ranks have met: start the job again" in said
