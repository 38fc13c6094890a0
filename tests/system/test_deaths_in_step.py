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
import torch

from hvdvae.checkpoint import load
from tests.system.conftest import Launch, clean_environment
from tests.system.worker_jobs import await_first_epoch, has_ulfm, strike, worker

EPOCHS, EXAMPLES, BATCH = 8, 1457, 10
SPLIT = (
    "--engine mpi --mesh dp=2,tp=2",
    "--engine horovod --mesh dp=2,pp=2 --pipeline-schedule gpipe --ema 0.9",
    # Messages that wait until somebody takes them.
    "--engine mpi --mesh dp=2,pp=2 --latent 1000 --micro-batches 2 --checkpoint-every 5",
)
"""Models that two ranks hold together, twice."""
PLANS = ("--engine mpi", "--engine horovod", "--compression int8", "--engine mpi --accumulate 2 --ema 0.9")


def kill_one(folder: Path, plan: str, *, ranks: int, victim: int, delay: float, model: int = 1) -> None:
    """Kill a rank so many seconds after the first epoch; check that nothing was lost and nobody hung.

    `model`: ranks that hold a copy of it together.
    """
    copies, left = ranks // model, ranks // model - 1
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
    told = re.search(rf"rank {victim} \(.*\) has died; {left * model} ranks.* go on from step (\d+)", ended.output)
    assert told
    assert summary["world_size"] == left * model
    assert summary["epochs"] == EPOCHS
    # Every epoch is covered: steps of all copies before, of one less after, none twice.
    after, batch = int(told[1]), BATCH * (2 if "accumulate" in plan else 1)
    whole = EXAMPLES // (copies * batch)
    rest = EXAMPLES - (after % whole) * copies * batch
    expected = after + rest // (left * batch)
    expected += (EPOCHS - 1 - after // whole) * (EXAMPLES // (left * batch))
    assert summary["steps"] == expected
    # Learning rate times copies, and copies are fewer.
    assert epochs[-1]["lr"] == pytest.approx(1e-3 * left)
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


@pytest.mark.parametrize(("plan", "victim"), [*zip(SPLIT, (0, 3, 1), strict=True)], ids=str)
def test_whole_copies_of_a_split_model_go_on(tmp_path: Path, plan: str, victim: int) -> None:
    """Of the ranks that are left, those that hold all of it; the checkpoint is whole as ever."""
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")
    kill_one(tmp_path, plan, ranks=4, victim=victim, delay=0.1, model=2)
    evaluate = [sys.executable, "-m", "hvdvae", "evaluate", "run", "--samples", "2", "--data", "digits"]
    assert Launch(evaluate, clean_environment(), tmp_path).finish(60).status == 0


@pytest.mark.parametrize(("mesh", "victim"), [("dp=2,pp=2", 1), ("dp=2,tp=2", 2)])
def test_a_split_model_learns_on_as_the_whole_one_does(tmp_path: Path, mesh: str, victim: int) -> None:
    """Where a rank dies before the same step, of either."""
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")
    script = Path(__file__).parent / "dying_rank.py"
    found = {}
    for name, ranks, dying, words in (("whole", 2, 1, ""), ("split", 4, victim, f"--mesh {mesh}")):
        launch = f"mpirun --with-ft ulfm --bind-to none --map-by :OVERSUBSCRIBE -n {ranks} {sys.executable} {script}"
        options = f"--batch-size 10 --hidden 12 --latent 3 --epochs 3 --engine mpi --ema 0.9 --out {name} {words}"
        job = Launch(f"{launch} {dying} 4 {options}".split(), clean_environment(), tmp_path).finish(60)
        assert job.status == 0, job.output
        assert re.search(rf"rank {dying} \(.*\) has died; .* go on from step 16", job.output), job.output
        found[name] = load(next((tmp_path / name / "checkpoints").glob("step-*")))
    # 12 steps of two copies, four more, and 16 and 24 of one.
    assert found["whole"].record["step"] == found["split"].record["step"] == 12 + 4 + 16 + 24
    assert found["whole"].tensors.keys() == found["split"].tensors.keys()
    for name, tensor in found["whole"].tensors.items():
        torch.testing.assert_close(found["split"].tensors[name], tensor, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(("victims", "missing"), [((0, 1), None), ((1, 3), 1), ((0, 2, 3), 0)], ids=str)
def test_several_may_die_at_once_while_every_part_is_left(
    tmp_path: Path, victims: tuple[int, ...], missing: int | None
) -> None:
    """Else the job ends and says which stage is missing."""
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")
    run = f"--data digits --epochs 6 --batch-size {BATCH} --pictures-every 0 --nll-samples 2 --threads 1 --out run"
    launch = f"mpirun --with-ft ulfm --bind-to none --map-by :OVERSUBSCRIBE -n 4 {sys.executable} -m hvdvae train"
    job = Launch(f"{launch} {run} --engine mpi --mesh dp=2,pp=2".split(), clean_environment(), tmp_path)
    processes = [worker(job, victim) for victim in victims]
    await_first_epoch(tmp_path)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    ended = job.finish(60)
    if missing is None:
        assert ended.status == 0, ended.output
        assert "2 ranks (mesh dp=1,pp=2,tp=1) go on" in ended.output
        return
    assert ended.status == 75, ended.output
    assert f"has died: nobody is left who holds slice 0 of stage {missing} of the model" in ended.output
    assert "--resume" in ended.output


@pytest.mark.parametrize("engine", ["mpi", "horovod"])
def test_a_new_rank_takes_the_place_of_the_dead(tmp_path: Path, engine: str) -> None:
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")
    run = f"--batch-size {BATCH} --epochs 30 --nll-samples 2 --pictures-every 0 --threads 1 --out run --replace-workers"
    launch = f"mpirun --with-ft ulfm --bind-to none --map-by :OVERSUBSCRIBE -n 3 {sys.executable} -m hvdvae train"
    job = Launch(f"{launch} --data digits --engine {engine} {run}".split(), clean_environment(), tmp_path)
    ended = strike(job, tmp_path, 1, signal.SIGKILL, 150)
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


@pytest.mark.parametrize(("ranks", "words"), [(2, "0 2"), (3, "1 75"), (4, "0 2"), (4, "2 2"), (5, "1 2 0 3")])
def test_all_end_with_the_status_of_the_rank_that_fails(tmp_path: Path, ranks: int, words: str) -> None:
    """Open MPI's launcher takes its abort for one more death."""
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")
    launch = f"mpirun --with-ft ulfm --bind-to none --map-by :OVERSUBSCRIBE -n {ranks} {sys.executable}"
    script = Path(__file__).parent / "one_fails.py"
    ended = Launch(f"{launch} {script} {words}".split(), clean_environment(), tmp_path).finish(60)
    assert ended.status == int(words.split()[1]), ended.output


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
    ended = strike(job, tmp_path, 1, signal.SIGKILL)
    assert ended.status == 75, ended.output
    part = {"--pipeline 2": " (stage 1)", "--tensor 2": " (slice 1)"}.get(plan, "")
    assert f"rank 1 ({os.uname().nodename}){part} has died: a rank died during" in ended.output
    assert "--resume" in ended.output


def test_who_dies_before_training_is_named(tmp_path: Path) -> None:
    """There is no checkpoint yet to speak of."""
    if not has_ulfm():
        pytest.skip("this MPI has no ULFM")
    script = Path(__file__).parent / "dies_at_start.py"
    launch = f"mpirun --with-ft ulfm --bind-to none --map-by :OVERSUBSCRIBE -n 3 {sys.executable} {script} 1 train"
    run = "--data digits --epochs 1 --threads 1 --out run"
    ended = Launch(f"{launch} {run}".split(), clean_environment(), tmp_path).finish(60)
    assert ended.status == 75, ended.output
    assert f"rank 1 ({os.uname().nodename}) has died before training began, during" in ended.output
    assert "checkpoint" not in ended.output


def soak(kills: int, folder: Path) -> None:
    """Kill so many ranks, each in a job of its own, at random moments of random plans. Stops at the first failure."""
    choose = random.Random(kills)
    for number in range(kills):
        plan, ranks, delay = choose.choice(PLANS + SPLIT), choose.choice((2, 3, 4)), choose.uniform(0.0, 1.5)
        model, ranks = (2, 4) if plan in SPLIT else (1, ranks)
        victim = choose.randrange(ranks)
        place = folder / str(number)
        place.mkdir(parents=True)
        begin = time.monotonic()
        kill_one(place, plan, ranks=ranks, victim=victim, delay=delay, model=model)
        print(
            f"{number + 1}/{kills}: {plan}, rank {victim} of {ranks} after {delay:.3f} s: "
            f"{time.monotonic() - begin:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    soak(int(sys.argv[1]), Path(sys.argv[2]))
