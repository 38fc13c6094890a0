"""With ULFM (mpirun --with-ft ulfm) synchronous training goes on when a rank is killed, at whatever moment.

As a script it is a soak: python -m tests.system.test_deaths_in_step 50 FOLDER kills so many ranks at random moments.
"""

import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.system.conftest import Launch, clean_environment
from tests.system.worker_jobs import await_first_epoch, has_ulfm, worker

EPOCHS, EXAMPLES, BATCH = 8, 1457, 10
PLANS = ("--engine mpi", "--engine horovod", "--compression int8", "--engine mpi --accumulate 2 --ema 0.9")


def kill_one(folder: Path, plan: str, *, ranks: int, victim: int, delay: float) -> None:
    """Kill a rank so many seconds after the first epoch; check that nothing was lost and nobody hung."""
    run = f"--batch-size {BATCH} --epochs {EPOCHS} --nll-samples 2 --pictures-every 0 --threads 1 --out run"
    run += " --lr-scaling linear"
    launch = f"mpirun --with-ft ulfm --bind-to none --map-by :OVERSUBSCRIBE -n {ranks} {sys.executable} -m hvdvae train"
    job = Launch(f"{launch} --data digits --strategy allreduce {plan} {run}".split(), clean_environment(), folder)
    try:
        process = worker(job, victim)
        await_first_epoch(folder)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        ended = job.finish(100)
    finally:
        job.kill()
    assert ended.status == 0, ended.output
    summary = json.loads((folder / "run" / "summary.json").read_text())
    epochs = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in epochs if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [*range(1, EPOCHS + 1)], "each epoch is told once"
    if "died" not in summary:
        assert "has died" not in ended.output
        assert summary["world_size"] == ranks, "it was killed once training was over"
        return
    assert summary["died"] == [f"rank {victim} ({os.uname().nodename})"]
    told = re.search(rf"rank {victim} \(.*\) has died; {ranks - 1} ranks go on from step (\d+)", ended.output)
    assert told
    assert summary["world_size"] == ranks - 1
    assert summary["epochs"] == EPOCHS
    # Every epoch is covered: steps of all ranks before, of one rank less after, none twice.
    after, batch = int(told[1]), BATCH * (2 if "accumulate" in plan else 1)
    whole = EXAMPLES // (ranks * batch)
    left = EXAMPLES - (after % whole) * ranks * batch
    expected = after + left // ((ranks - 1) * batch)
    expected += (EPOCHS - 1 - after // whole) * (EXAMPLES // ((ranks - 1) * batch))
    assert summary["steps"] == expected
    # Learning rate times ranks, and ranks are fewer.
    assert epochs[-1]["lr"] == pytest.approx(1e-3 * (ranks - 1))
    assert epochs[-1]["validation_elbo"] > epochs[0]["validation_elbo"]


@pytest.mark.parametrize("plan", PLANS)
def test_the_others_go_on_from_the_same_step(tmp_path: Path, plan: str) -> None:
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")
    kill_one(tmp_path, plan, ranks=3, victim=1, delay=0.1)


@pytest.mark.parametrize("engine", ["mpi", "horovod"])
def test_rank_0_may_die_and_one_may_be_left(tmp_path: Path, engine: str) -> None:
    """The next rank keeps the log and the checkpoints."""
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")
    kill_one(tmp_path, f"--engine {engine}", ranks=2, victim=0, delay=0.05)


@pytest.mark.parametrize("engine", ["mpi", "horovod"])
def test_a_new_rank_takes_the_place_of_the_dead(tmp_path: Path, engine: str) -> None:
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")
    run = f"--batch-size {BATCH} --epochs 30 --nll-samples 2 --pictures-every 0 --threads 1 --out run --replace-workers"
    launch = f"mpirun --with-ft ulfm --bind-to none --map-by :OVERSUBSCRIBE -n 3 {sys.executable} -m hvdvae train"
    job = Launch(f"{launch} --data digits --engine {engine} {run}".split(), clean_environment(), tmp_path)
    try:
        process = worker(job, 1)
        await_first_epoch(tmp_path)
        process.send_signal(signal.SIGKILL)
        ended = job.finish(150)
    finally:
        job.kill()
    assert ended.status == 0, ended.output
    assert re.search(r"rank 1 \(\S+\) has died, rank 2 \(.*process \d+\) has come; 3 ranks go on", ended.output)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["world_size"] == 3
    assert len(summary["died"]) == 1
    assert summary["epochs"] == 30


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_job_that_cannot_go_on_tells_so(tmp_path: Path, ranks: int) -> None:
    """Also where the rank that ends it is the only one that is left."""
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")
    launch = f"mpirun --with-ft ulfm --bind-to none --map-by :OVERSUBSCRIBE -n {ranks} {sys.executable}"
    script = Path(__file__).parent / "one_left.py"
    ended = Launch(f"{launch} {script} 75".split(), clean_environment(), tmp_path).finish(60)
    assert ended.status == 75, ended.output


ENDED_BY_A_DEATH = (
    "--strategy local-sgd",
    "--strategy diloco --optimizer adamw",
    "--strategy sharded --engine mpi",
    "--pipeline 2",
    "--tensor 2",
)


@pytest.mark.parametrize("plan", ENDED_BY_A_DEATH)
def test_a_strategy_that_cannot_go_on_says_who_is_missing(tmp_path: Path, plan: str) -> None:
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")
    run = f"--data digits --epochs 50 --batch-size {BATCH} --pictures-every 0 --threads 1 --out run {plan}"
    launch = f"mpirun --with-ft ulfm --bind-to none --map-by :OVERSUBSCRIBE -n 2 {sys.executable} -m hvdvae train"
    job = Launch(f"{launch} {run}".split(), clean_environment(), tmp_path)
    process = worker(job, 1)
    await_first_epoch(tmp_path)
    process.send_signal(signal.SIGKILL)
    ended = job.finish(60)
    assert ended.status == 75, ended.output
    assert f"rank 1 ({os.uname().nodename}) has died: a rank died during" in ended.output
    assert "--resume" in ended.output


def soak(kills: int, folder: Path) -> None:
    """Kill so many ranks, each in a job of its own, at random moments of random plans. Stops at the first failure."""
    choose = random.Random(kills)
    for number in range(kills):
        plan, ranks, delay = choose.choice(PLANS), choose.choice((2, 3, 4)), choose.uniform(0.0, 1.5)
        victim = choose.randrange(ranks)
        place = folder / str(number)
        place.mkdir(parents=True)
        begin = time.monotonic()
        kill_one(place, plan, ranks=ranks, victim=victim, delay=delay)
        print(
            f"{number + 1}/{kills}: {plan}, rank {victim} of {ranks} after {delay:.3f} s: "
            f"{time.monotonic() - begin:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    soak(int(sys.argv[1]), Path(sys.argv[2]))
