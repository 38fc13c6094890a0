"""`--strategy ps` as a user types it: trains, stops, resumes, and refuses what cannot work."""

import json
import signal
from pathlib import Path

import pytest
import torch

from hvdvae.checkpoint import Folder, load
from tests.system.conftest import Command, Start

SIZES = ["--hidden", "10", "--latent", "3", "--threads", "1", "--nll-samples", "2", "--pictures-every", "0"]


def words(images: Path, *more: str, epochs: int = 4, out: str = "run") -> list[str]:
    run = ["--batch-size", "2", "--lr", "0.002", "--epochs", str(epochs), "--out", out, "--strategy", "ps"]
    return ["-m", "hvdvae", "train", "--data", str(images), *SIZES, *run, *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = Folder(folder / "checkpoints", 3).newest_good()
    assert newest is not None
    return load(newest).tensors


@pytest.mark.parametrize(
    "options",
    [
        ["--consistency", "ssp", "--staleness", "4"],
        ["--servers", "2", "--prefetch", "--schedule", "cosine", "--clip-norm", "20"],
        ["--consistency", "bsp", "--backup-workers", "1", "--optimizer", "sgd", "--momentum", "0.5"],
        ["--rule", "dcasgd", "--ema", "0.99"],
        ["--rule", "easgd", "--push-every", "3"],
        ["--servers", "2", "--prefetch", "--compression", "int8"],
        ["--push-every", "2", "--compression", "topk", "--compression-share", "0.1"],
    ],
    ids=" ".join,
)
def test_trains_and_counts(start: Start, images: Path, tmp_path: Path, options: list[str]) -> None:
    job = start(4, *words(images, *options, epochs=2)).finish()
    assert job.status == 0, job.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    workers = 4 - summary["servers"]
    assert summary["world_size"] == workers
    period = int(options[options.index("--push-every") + 1]) if "--push-every" in options else 1
    periods = -(-summary["steps"] // period)  # The end cuts the last one short.
    assert summary["clocks"] == [periods] * workers
    assert summary["pushes"] + summary["dropped_pushes"] == workers * periods
    assert sum(summary["staleness_histogram"].values()) == summary["pushes"]
    assert summary["bytes_pushed"] > 0
    assert summary["bytes_pulled"] > 0
    assert summary["test_nll"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert epochs[1]["validation_loss"] < epochs[0]["validation_loss"]


def test_a_resumed_bsp_run_is_the_run_that_never_stopped(start: Start, images: Path, tmp_path: Path) -> None:
    """Law 8, with optimizer state on two servers, and also on another number of servers."""
    options = ["--consistency", "bsp", "--schedule", "cosine"]
    for out, ranks, servers in (("whole", 3, "1"), ("parts", 4, "2")):
        job = start(ranks, *words(images, *options, "--servers", servers, out=out)).finish()
        assert job.status == 0, job.output
    for path in (tmp_path / "parts" / "checkpoints").glob("*"):
        if "step" not in path.name or load(path).record["position"]["epoch"] > 2:
            path.unlink()
    job = start(3, *words(images, *options, "--servers", "1", "--resume", out="parts")).finish()
    assert job.status == 0, job.output
    assert "resumed at step" in job.output
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


@pytest.mark.parametrize("consistency", [["asp"], ["ssp", "--staleness", "1"], ["bsp"]], ids=" ".join)
def test_a_signal_saves_and_a_resume_goes_on(
    start: Start, images: Path, tmp_path: Path, consistency: list[str]
) -> None:
    import time

    options = ["--consistency", *consistency]
    job = start(3, *words(images, *options, epochs=500))
    give_up = time.monotonic() + 60
    while not Folder(tmp_path / "run" / "checkpoints", 3).steps():
        assert time.monotonic() < give_up, "no checkpoint came"
        time.sleep(0.02)
    job.process.send_signal(signal.SIGUSR1)
    ended = job.finish(60)
    assert ended.status != 0
    assert "SIGUSR1: saved at step" in ended.output
    newest = Folder(tmp_path / "run" / "checkpoints", 3).newest_good()
    assert newest is not None
    epoch = load(newest).record["position"]["epoch"]
    again = start(3, *words(images, *options, "--resume", epochs=epoch + 2)).finish()
    assert again.status == 0, again.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == epoch + 2


@pytest.mark.parametrize(
    ("ranks", "options", "expected"),
    [
        (3, ["--servers", "3"], "3 parameter servers (--servers, --replicas) of 3 started ranks leave none to train"),
        (2, ["--consistency", "ssp"], "--consistency ssp needs a bound"),
        (2, ["--staleness", "3"], "--staleness is for --consistency ssp"),
        (3, ["--consistency", "bsp", "--rule", "dcasgd"], "--rule dcasgd is for pushes that come one by one"),
        (2, ["--consistency", "bsp", "--backup-workers", "1"], "--backup-workers is 1 of 1 workers"),
        (2, ["--compression", "powersgd"], "use one of fp16, bf16, int8, sign, topk, or --strategy allreduce"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    start: Start, images: Path, tmp_path: Path, ranks: int, options: list[str], expected: str
) -> None:
    job = start(ranks, *words(images, *options)).finish(60)
    assert job.status != 0
    assert expected in job.output
    assert "Traceback" not in job.output
    assert not (tmp_path / "run").exists()


def test_without_a_launcher_and_under_gloo_it_says_how_to_start(start: Start, images: Path, command: Command) -> None:
    alone = command("train", "--data", images, *SIZES, "--strategy", "ps")
    assert alone.status != 0
    assert "mpirun -np 2" in alone.output
    job = start(2, *words(images), launcher="horovodrun-gloo").finish(60)
    assert job.status != 0
    assert "MPI sees one process there. Start with mpirun, srun or horovodrun --mpi" in job.output


def test_a_worker_that_dies_ends_the_job(start: Start, images: Path) -> None:
    """Without fault tolerance of MPI: at once, and not by the deadline."""
    import os
    import time

    import psutil  # type: ignore[import-untyped]

    job = start(3, *words(images, epochs=500))
    give_up = time.monotonic() + 60
    victims: list[psutil.Process] = []
    while not victims:
        assert time.monotonic() < give_up
        time.sleep(0.5)
        for child in psutil.Process(job.process.pid).children(recursive=True):
            if child.environ().get("OMPI_COMM_WORLD_RANK") == "1" and "-m" in child.cmdline():
                victims.append(child)
    time.sleep(4)
    os.kill(victims[0].pid, signal.SIGKILL)
    assert job.finish(30).status != 0
