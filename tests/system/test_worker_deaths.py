"""With ULFM (mpirun --with-ft ulfm) the others go on when a worker is killed, at whatever moment.

As a script it is a soak: python -m tests.system.test_worker_deaths 50 FOLDER kills so many workers at random moments.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.system.worker_jobs import (
    BATCH,
    EXAMPLES,
    MPIRUN_ULFM,
    WORKERS,
    await_first_epoch,
    await_validated,
    has_ulfm,
    start,
    worker,
)

EPOCHS = 6
PLANS = (
    "--consistency asp",
    "--consistency ssp --staleness 1",
    "--consistency bsp",
    "--consistency bsp --backup-workers 1",
    "--servers 2",
    "--prefetch",
    "--rule dcasgd",
    "--rule easgd --push-every 2",
)


def kill_one(folder: Path, plan: str, *, victim: int, delay: float, unheard: bool = False) -> None:
    """Kill a worker so many seconds after training began; check that nothing was lost and nobody hung.

    `unheard`: the server is stopped meanwhile, and hears of the death before it hears what the worker sent last.
    """
    job = start(folder, plan, epochs=EPOCHS, mpirun=MPIRUN_ULFM)
    try:
        process = worker(job, victim)
        await_first_epoch(folder)
        time.sleep(delay)
        server = worker(job, WORKERS) if unheard else None
        if server is not None:
            server.suspend()
            time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        if server is not None:
            time.sleep(1.0)
            server.resume()
        ended = job.finish(100)
    finally:
        job.kill()
    assert ended.status == 0, ended.output
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["died"] == [victim]
    assert ended.output.count(f"worker {victim} has died") == 1
    assert summary["epochs"] == EPOCHS
    assert summary["world_size"] == WORKERS - 1
    assert summary["pushes"] == sum(summary["applied_by_worker"]) == sum(summary["staleness_histogram"].values())
    if "bsp" not in plan:
        assert summary["updates"] == summary["pushes"], "one update a push"
    # Somebody took over of its share: more steps than a worker of three has in so many epochs.
    period = 2 if "easgd" in plan else 1
    assert max(summary["clocks"]) > EPOCHS * (EXAMPLES // (WORKERS * BATCH)) // period, summary


@pytest.mark.parametrize("plan", PLANS)
def test_the_others_go_on_and_take_over_its_share(tmp_path: Path, plan: str) -> None:
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")
    kill_one(tmp_path, plan, victim=1, delay=0.1)


@pytest.mark.parametrize("plan", ["--consistency asp", "--consistency bsp"])
def test_the_last_words_of_the_dead_come_after_the_news(tmp_path: Path, plan: str) -> None:
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")
    kill_one(tmp_path, plan, victim=1, delay=0.1, unheard=True)


def test_rank_0_keeps_the_log_so_its_death_ends_the_job(tmp_path: Path) -> None:
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")
    job = start(tmp_path, "--consistency asp", epochs=EPOCHS, mpirun=MPIRUN_ULFM)
    process = worker(job, 0)
    await_first_epoch(tmp_path)
    process.send_signal(signal.SIGKILL)
    ended = job.finish(60)
    assert ended.status == 75
    assert "worker 0, which keeps the log and the checkpoints, has died" in ended.output
    assert "--resume" in ended.output


@pytest.mark.parametrize("victim", [1, WORKERS], ids=["worker", "server"])
def test_a_death_in_the_final_test_leaves_the_results_to_the_others(tmp_path: Path, victim: int) -> None:
    """The server has done its work by then; of a worker the others do the share, too."""
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")
    job = start(tmp_path, "", epochs=1, mpirun=MPIRUN_ULFM, samples=8000)
    try:
        process = worker(job, victim)
        await_validated(tmp_path)  # After the only epoch: all that the server holds has been fetched.
        assert not (tmp_path / "run" / "summary.json").exists(), "the final test goes on"
        process.kill()
        ended = job.finish(100)
    finally:
        job.kill()
    assert ended.status == 0, ended.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["died"] == ([victim] if victim < WORKERS else [])
    assert summary["world_size"] == (WORKERS - 1 if victim < WORKERS else WORKERS)
    assert summary["test_nll"] > 0


def soak(kills: int, folder: Path) -> None:
    """Kill so many workers, each in a job of its own, at random moments of random plans. Stops at the first failure."""
    print(f"seed {kills}, {os.cpu_count()} cores")
    choose = random.Random(kills)
    for number in range(kills):
        plan, victim, delay = choose.choice(PLANS), choose.randrange(1, WORKERS), choose.uniform(0.0, 0.8)
        place = folder / str(number)
        place.mkdir(parents=True)
        begin = time.monotonic()
        kill_one(place, plan, victim=victim, delay=delay)
        print(
            f"{number + 1}/{kills}: {plan}, worker {victim} after {delay:.3f} s: {time.monotonic() - begin:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    soak(int(sys.argv[1]), Path(sys.argv[2]))
