"""With --replace-workers and ULFM a server starts a worker in the place of one that was killed."""

import json
from pathlib import Path

import pytest

from tests.system.worker_jobs import BATCH, EXAMPLES, MPIRUN_ULFM, WORKERS, await_first_epoch, has_ulfm, start, worker

EPOCHS = 40


@pytest.fixture(autouse=True)
def needs_ulfm() -> None:
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")


def kill_one(folder: Path, plan: str, epochs: int) -> tuple[str, dict[str, object]]:
    """Output and summary of a job whose worker 1 is killed in the first epochs."""
    # Nobody says how many threads: the new worker has to find out for itself.
    job = start(folder, f"{plan} --replace-workers", epochs=epochs, mpirun=MPIRUN_ULFM, threads="")
    try:
        process = worker(job, 1)
        await_first_epoch(folder)
        process.kill()
        ended = job.finish(200)
    finally:
        job.kill()
    assert ended.status == 0, ended.output
    return ended.output, json.loads((folder / "run" / "summary.json").read_text())


@pytest.mark.parametrize("plan", ["--consistency asp", "--consistency bsp", "--rule easgd --push-every 2"])
def test_a_new_worker_trains_from_the_present_weights(tmp_path: Path, plan: str) -> None:
    output, summary = kill_one(tmp_path, plan, epochs=EPOCHS)
    assert "worker 1 has died" in output
    assert "a new worker 1 begins at epoch" in output
    assert summary["died"] == summary["joined"] == [1]
    assert summary["world_size"] == WORKERS - 1, "those that were there from the start evaluate"
    assert summary["epochs"] == EPOCHS
    applied, clocks = summary["applied_by_worker"], summary["clocks"]
    assert isinstance(applied, list)
    assert isinstance(clocks, list)
    assert sum(applied) == summary["pushes"]
    period = 2 if "easgd" in plan else 1
    steps_an_epoch = EXAMPLES // (WORKERS * BATCH) // period
    assert applied[1] > 4 * steps_an_epoch, "it was killed in the first epochs: the rest is the new one's"
    assert clocks[1] > applied[1], "it began where the slowest of the others was"


def test_one_that_comes_when_the_run_is_over_goes(tmp_path: Path) -> None:
    output, summary = kill_one(tmp_path, "--consistency asp", epochs=4)
    assert summary["died"] == [1]
    if not summary["joined"]:
        assert "the run has ended meanwhile" in output
