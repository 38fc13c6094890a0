"""With --replicas 1 and ULFM a parameter server's backup goes on where it is killed, at whatever moment.

As a script it is a soak: python -m tests.system.test_server_deaths 50 FOLDER kills so many servers at random moments.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.system.worker_jobs import (
    BATCH,
    EXAMPLES,
    MPIRUN_ULFM,
    WORKERS,
    await_first_epoch,
    has_ulfm,
    start,
    strike,
    worker,
)

EPOCHS = 6
STEPS = EPOCHS * (EXAMPLES // (WORKERS * BATCH))
"""Of each worker."""
PRIMARY, BACKUP = WORKERS, WORKERS + 1
PLANS = (
    "--consistency asp",
    "--consistency ssp --staleness 1",
    "--consistency bsp --clip-norm 20",
    "--servers 2",
    "--prefetch",
    "--rule dcasgd",
    "--rule easgd --push-every 2",
)


def kill(folder: Path, plan: str, *, victims: list[int], delay: float) -> tuple[int, str]:
    """Kill ranks, one after the other, after training began. Returns exit status and output."""
    job = start(folder, f"{plan} --replicas 1", epochs=EPOCHS, mpirun=MPIRUN_ULFM)
    try:
        processes = [worker(job, victim) for victim in victims]
        await_first_epoch(folder)
        for process in processes:
            time.sleep(delay)
            process.kill()
        ended = job.finish(100)
    finally:
        job.kill()
    return ended.status, ended.output


def summary_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "run" / "summary.json").read_text())
    return found


def steps_of_adam(folder: Path) -> set[int]:
    """As the optimizer counted them, in the last checkpoint: of each parameter."""
    last = max((folder / "run" / "checkpoints").glob("step-*.safetensors"))
    with safe_open(last, framework="pt") as file:
        return {int(file.get_tensor(name)) for name in file.keys() if name.endswith("/step")}  # noqa: SIM118


def check_nothing_lost(folder: Path, plan: str, takeovers: int) -> None:
    """Every push of every worker was applied once, by the counts of the servers, and of the optimizer itself."""
    summary = summary_of(folder)
    assert summary["takeovers"] == takeovers
    assert summary["died"] == []
    assert summary["epochs"] == EPOCHS
    pushes = STEPS // (2 if "easgd" in plan else 1)
    assert summary["applied_by_worker"] == [pushes] * WORKERS
    assert summary["updates"] == (pushes if "bsp" in plan else pushes * WORKERS)
    if "easgd" not in plan:
        assert steps_of_adam(folder) == {summary["updates"]}


def kill_server(folder: Path, plan: str, *, delay: float) -> None:
    """Kill a primary so many seconds after training began; check that nothing was lost and nobody hung."""
    status, output = kill(folder, plan, victims=[PRIMARY], delay=delay)
    assert status == 0, output
    assert output.count("its backup") == 1, "it says once that it goes on"
    check_nothing_lost(folder, plan, takeovers=1)


@pytest.fixture(autouse=True)
def needs_ulfm() -> None:
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")


@pytest.mark.parametrize("plan", PLANS)
def test_the_backup_goes_on_and_nothing_is_lost(tmp_path: Path, plan: str) -> None:
    kill_server(tmp_path, plan, delay=0.1)


def test_a_server_goes_on_without_its_backup(tmp_path: Path) -> None:
    status, output = kill(tmp_path, "--consistency ssp --staleness 1", victims=[BACKUP], delay=0.1)
    assert status == 0, output
    assert "goes on alone" in output
    check_nothing_lost(tmp_path, "", takeovers=0)


def test_a_worker_and_then_a_server(tmp_path: Path) -> None:
    """The backup was told of the worker's death, and forgets it too."""
    status, output = kill(tmp_path, "--consistency bsp", victims=[1, PRIMARY], delay=0.1)
    assert status == 0, output
    summary = summary_of(tmp_path)
    assert summary["takeovers"] == 1
    assert summary["died"] == [1]
    assert summary["world_size"] == WORKERS - 1
    assert steps_of_adam(tmp_path) == {summary["updates"]}


def test_without_a_backup_left_the_job_ends(tmp_path: Path) -> None:
    status, output = kill(tmp_path, "--consistency asp", victims=[PRIMARY, BACKUP], delay=0.1)
    assert status != 0
    assert "has died" in output
    assert "--resume" in output


def test_a_backup_that_took_over_ends_the_job_where_it_must(tmp_path: Path) -> None:
    """An abort after a death: Open MPI's launcher may take it for one more death, and let the others wait."""
    status, output = kill(tmp_path, "--consistency bsp", victims=[PRIMARY, 0], delay=0.1)
    assert status != 0
    assert "worker 0, which keeps the log and the checkpoints, has died" in output
    assert "--resume" in output


def test_a_signal_to_a_backup_saves_as_one_to_a_worker_does(tmp_path: Path) -> None:
    """It answers no worker: its primary hears of it."""
    job = start(tmp_path, "--replicas 1", epochs=500, mpirun=MPIRUN_ULFM)
    ended = strike(job, tmp_path, BACKUP, signal.SIGTERM)
    assert ended.status == 128 + signal.SIGTERM, ended.output
    assert "SIGTERM: saved at step" in ended.output


def soak(kills: int, folder: Path) -> None:
    """Kill so many servers, each in a job of its own, at random moments of random plans. Stops at the first failure."""
    print(f"seed {kills}, {os.cpu_count()} cores")
    choose = random.Random(kills)
    for number in range(kills):
        plan, delay = choose.choice(PLANS), choose.uniform(0.0, 0.8)
        place = folder / str(number)
        place.mkdir(parents=True)
        kill_server(place, plan, delay=delay)
        wait = summary_of(place)["longest_wait_seconds"]
        print(f"{number + 1}/{kills}: {plan}, after {delay:.3f} s: longest wait {wait:.3f} s", flush=True)


if __name__ == "__main__":
    soak(int(sys.argv[1]), Path(sys.argv[2]))
