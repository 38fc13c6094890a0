"""A rank that fails ends the job, non-zero, with its reason, within the deadline. Nothing hangs."""

import sys
from pathlib import Path

import pytest

from tests.system.conftest import Launch, Start, clean_environment, launcher_command
from tests.system.worker_jobs import MPIRUN_ULFM, has_ulfm

CASES = Path(__file__).parent
CASE = str(CASES / "failing_rank.py")
DEADLINE = 4.0
GRACE = 40.0
"""Seconds for starting and ending ranks on a busy machine."""

CARRIERS = [("mpirun", "mpi"), ("mpirun", "horovod"), ("horovodrun-gloo", "horovod")]


@pytest.mark.parametrize(("launcher", "engine"), CARRIERS)
def test_a_rank_that_raises_ends_the_job_with_its_traceback(start: Start, launcher: str, engine: str) -> None:
    job = start(2, CASE, "raises", engine, "300", launcher=launcher).finish(GRACE)
    assert job.status != 0
    assert "uncaught exception on rank 1" in job.output
    assert "RuntimeError: the bad example 4711" in job.output
    assert "failing_rank.py" in job.output, "the traceback names the line"


def test_the_cause_is_the_last_line_of_a_supervised_job(start: Start) -> None:
    """Behind twenty lines of Open MPI's."""
    mpirun = [*launcher_command("mpirun", 2), sys.executable, CASE, "raises", "mpi", "300", "--out", "run"]
    job = start(1, "-m", "hvdvae", "supervise", "--restarts", "0", "--", *mpirun, launcher="none").finish(2 * GRACE)
    assert job.status != 0
    last = job.output.rstrip().splitlines()[-1]
    assert last.startswith("hvdvae supervise: the cause, on rank 1 (")
    assert last.endswith("): RuntimeError: the bad example 4711")


def test_ranks_that_were_started_for_other_roles_are_named(start: Start, images: Path) -> None:
    words = ["-m", "hvdvae", "train", "--data", str(images), "--epochs", "1", "--out", "run"]
    job = start(1, *words, ":", "-n", "1", sys.executable, *words, "--strategy", "ps").finish(GRACE)
    assert job.status == 2
    assert "rank 1 was started for 1 parameter servers, rank 0 for 0 (--strategy, --servers" in job.output


def test_an_exception_in_a_thread_ends_the_job(start: Start) -> None:
    job = start(2, CASE, "raises in a thread", "mpi", "300").finish(GRACE)
    assert job.status != 0
    assert "uncaught exception on rank 1" in job.output
    assert "ZeroDivisionError" in job.output


@pytest.mark.parametrize(("launcher", "engine"), CARRIERS)
def test_a_rank_that_is_killed_ends_the_job(start: Start, launcher: str, engine: str) -> None:
    job = start(2, CASE, "dies", engine, "300", launcher=launcher).finish(GRACE)
    assert job.status != 0


@pytest.mark.parametrize("engine", ["mpi", "horovod"])
@pytest.mark.parametrize("way", ["calls another operation", "computes for ever", "stops"])
def test_a_rank_that_does_not_come_is_named(start: Start, way: str, engine: str) -> None:
    """The others say who waits for whom, at what step and where, and end the job at the deadline."""
    job = start(2, CASE, way, engine, str(DEADLINE)).finish(DEADLINE + GRACE)
    assert job.status != 0
    assert "failing_rank.py" in job.output, "the stack says where"
    if (way, engine) == ("stops", "horovod") and "Timeout (0:00:18)!" in job.output:
        return  # Horovod waited with the interpreter's lock in hand: nothing but the stacks could be had.
    assert f"deadline of {DEADLINE:g} s exceeded" in job.output
    late = {
        "calls another operation": "waits in 'a barrier that nobody else calls'",
        "computes for ever": "rank 1 (",
        "stops": "rank 1 does not answer",
    }[way]
    assert late in job.output
    assert "step 3" in job.output


def test_a_rank_that_never_joins_ends_the_job(start: Start) -> None:
    """Before the ranks have met, no watchdog can ask; the stack of the one that waits says where."""
    job = start(2, CASE, "joins late", "mpi", str(DEADLINE)).finish(DEADLINE + GRACE)
    assert job.status != 0
    assert "join_mpi" in job.output


def test_pytest_under_mpirun_ends_when_one_rank_fails(start: Start, tmp_path: Path) -> None:
    """`mpirun -np 2 pytest tests/parallel` must not hang while the rank that passed waits for the one that failed."""
    folder = tmp_path / "parallel"
    folder.mkdir()
    source = Path(__file__).parents[1] / "parallel" / "conftest.py"
    (folder / "conftest.py").write_text(source.read_text())
    (folder / "test_one_rank.py").write_text(
        "def test_it(world):\n    assert world.rank == 0, 'rank one is wrong'\n    world.barrier()\n"
    )
    job = start(2, "-m", "pytest", "-p", "no:cacheprovider", str(folder)).finish(GRACE)
    assert job.status != 0
    assert "FAILED on rank 1 of 2" in job.output
    assert "rank one is wrong" in job.output


@pytest.mark.parametrize("end", ["closes", "exits"])
def test_a_rank_that_has_finished_before_the_others_is_named_at_once(start: Start, end: str) -> None:
    """Not at the deadline, as one that does not answer."""
    job = start(2, str(CASES / "finishes_early.py"), "shared memory", "300", end).finish()
    assert job.status == 75, job.output
    assert "hvdvae: error: rank 1 (" in job.output
    assert "has finished after 2 steps, and rank 0 (" in job.output
    assert "step 2, at " in job.output
    assert "give all ranks as many batches" in job.output


def test_so_is_one_that_horovod_ends_the_wait_for(start: Start) -> None:
    job = start(2, str(CASES / "finishes_early.py"), "horovod", "300", "exits").finish()
    assert job.status != 0
    assert "rank 1 (" in job.output, job.output
    assert "has finished after 2 steps, and rank 0 (" in job.output


@pytest.mark.parametrize("way", ["killed", "exits"])
def test_a_rank_that_ends_before_the_ranks_have_met_is_named(tmp_path: Path, way: str) -> None:
    """Where the launcher lets the others go on, they would wait in MPI_Init until their deadline."""
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")
    program = [sys.executable, str(CASES / "ends_before_meeting.py"), way, "300"]
    launch = [*MPIRUN_ULFM.split(), "-n", "3", "--bind-to", "none"]
    job = Launch([*launch, *program], clean_environment(), tmp_path).finish()
    assert job.status != 0
    assert "rank 1 on " in job.output or "rank 1 (process " in job.output, job.output
    assert "has ended before the ranks have met: start the job again" in job.output
    assert "they have met" not in job.output
