"""A worker that is stopped (SIGSTOP) for a while: who waits for it is the policy's affair."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.conftest import Launch
from tests.system.worker_jobs import WORKERS, await_first_epoch, start, worker

EPOCHS, STOPPED_SECONDS = 40, 10.0


@contextmanager
def stopped(job: Launch) -> Iterator[None]:
    """Inside, worker 1 is."""
    process = worker(job, 1)
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def epochs_done(folder: Path) -> int:
    """Of worker 0, which logs them."""
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return max(int(record["epoch"]) for record in records)


def progress_without_one(folder: Path, plan: str) -> tuple[int, dict[str, object]]:
    """Epochs that worker 0 did while worker 1 was stopped, and the summary at the end of the run."""
    job = start(folder, plan, epochs=EPOCHS)
    try:
        await_first_epoch(folder)
        with stopped(job):
            time.sleep(STOPPED_SECONDS / 4)
            before = epochs_done(folder)
            time.sleep(STOPPED_SECONDS * 3 / 4)
            done = epochs_done(folder) - before
        ended = job.finish(200)
    finally:
        job.kill()
    assert ended.status == 0, ended.output
    return done, json.loads((folder / "run" / "summary.json").read_text())


@pytest.mark.parametrize("plan", ["--consistency asp", "--consistency bsp --backup-workers 1"])
def test_the_others_never_wait(tmp_path: Path, plan: str) -> None:
    done, summary = progress_without_one(tmp_path, plan)
    assert done >= 3
    assert summary["epochs"] == EPOCHS
    assert summary["world_size"] == WORKERS


def test_under_ssp_they_wait_at_the_bound_and_then_go_on(tmp_path: Path) -> None:
    done, summary = progress_without_one(tmp_path, "--consistency ssp --staleness 3")
    assert done == 0
    assert summary["epochs"] == EPOCHS
    clocks = summary["clocks"]
    assert isinstance(clocks, list)
    assert len(set(clocks)) == 1, "each took all of its steps"
