"""What hvdvae memory predicts is what a run takes, and what does not fit on one rank trains on two."""

import json
import sys
from pathlib import Path

import psutil
import pytest
import torch

from hvdvae.cli import host_memory
from hvdvae.vae import build_model
from tests.system.conftest import Command, Launch, clean_environment
from tests.system.memory_job import SHAPE

JOB = str(Path(__file__).with_name("memory_job.py"))
LARGE = ("--model", "mlp", "--hidden", "7000", "7000", "--latent", "20", "--activation", "relu", "--batch-size", "8")
NEEDED = 6e9
"""Bytes that the largest of these jobs takes in all."""

pytestmark = pytest.mark.skipif(
    psutil.virtual_memory().available < NEEDED, reason=f"needs {NEEDED / 1e9:.0f} GB of free memory"
)


def run(folder: Path, ranks: int, *words: str) -> tuple[int, str]:
    launch = ["mpirun", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", "-n", str(ranks)] if ranks > 1 else []
    carried = () if {"local", "ps", "local-sgd", "diloco"} & {*words} else ("--engine", "mpi")
    job = Launch([*launch, sys.executable, JOB, *LARGE, *carried, *words], clean_environment(), folder).finish(270)
    return job.status, job.output


def test_the_model_is_large() -> None:
    with torch.device("meta"):
        model = build_model("mlp", SHAPE, hidden=[7000, 7000], latent=[20], activation="relu")
    assert sum(parameter.numel() for parameter in model.parameters()) > 100e6


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ("--strategy", "local")),
        (1, ("--strategy", "local", "--optimizer", "sgd", "--ema", "0.99")),
        (1, ("--strategy", "local", "--optimizer", "adagrad")),
        (1, ("--strategy", "local", "--precision", "bf16")),
        # Mostly activations, in blocks too large for malloc to leave holes between them.
        (1, ("--strategy", "local", "--hidden", "2000", "2000", "--batch-size", "6000")),
        (2, ()),
        (2, ("--strategy", "sharded")),
        (2, ("--strategy", "sharded", "--zero-stage", "2", "--precision", "bf16", "--weights", "bf16")),
        (2, ("--pipeline", "2")),
        (4, ("--mesh", "dp=2,tp=2")),
        (2, ("--strategy", "diloco", "--hidden", "4000", "4000")),
        (2, ("--strategy", "ps", "--hidden", "5000", "5000")),
        (3, ("--strategy", "ps", "--consistency", "bsp", "--hidden", "5000", "5000")),
    ],
    ids=str,
)
def test_predictions_are_within_15_percent(tmp_path: Path, ranks: int, words: tuple[str, ...]) -> None:
    status, output = run(tmp_path, ranks, *words)
    assert status == 0, output
    rows = [row for line in output.splitlines() if line.startswith("[{") for row in json.loads(line)]
    assert len(rows) == ranks
    for row in rows:
        assert row["grew"] == pytest.approx(row["predicted"], rel=0.15), rows


def test_the_whole_command_trains_and_resumes_where_one_rank_cannot(tmp_path: Path) -> None:
    """Building, training, saving, resuming on another mesh and testing: the whole model is never in one place."""
    megabytes = 1150
    words = "--data digits --hidden 5000 5000 --latent 20 --activation relu --batch-size 250 --threads 1"
    run = f"-m hvdvae train {words} --nll-samples 2 --pictures-every 0 --keep 1 --out run"
    mpirun = f"mpirun --bind-to none --map-by :OVERSUBSCRIBE -n 2 {sys.executable}"

    def limited(command: str) -> tuple[int, str]:
        limit = f"ulimit -d {megabytes * 1000} && exec {command}"
        ended = Launch(["bash", "-c", limit], clean_environment(), tmp_path).finish(120)
        return ended.status, ended.output

    status, output = limited(f"{sys.executable} {run} --epochs 1 --strategy local --overwrite")
    assert status != 0
    assert "can't allocate memory" in output or "MemoryError" in output, output
    for epochs, split in ((1, "--mesh pp=2 --overwrite"), (2, "--mesh tp=2 --resume")):
        status, output = limited(f"{mpirun} {run} --epochs {epochs} --engine mpi {split}")
        assert status == 0, output
    assert "resumed at step" in output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 2


def test_the_command_shows_every_stage(command: Command) -> None:
    given = ("--ranks", "8", "--shape", "1", "28", "28", "--", *LARGE, "--engine", "mpi", "--mesh", "dp=2,pp=2,tp=2")
    found = command("memory", *given)
    assert found.status == 0, found.output
    assert "mesh dp=2,pp=2,tp=2: 2 x 4 ranks" in found.output
    rows = [line.split(" ranks ")[1].split() for line in found.output.splitlines() if line.startswith("stage ")]
    assert len(rows) == 2
    # 109.6 million parameters, of which almost all are split over four: 4 bytes each.
    assert float(rows[0][0]) + float(rows[1][0]) == pytest.approx(109.7 * 4 / 2, rel=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ranks", "0", "--", "--model", "mlp"), "--ranks is 0, expected at least 1"),
        (("--ranks", "3", "--", "--tensor", "2"), "--tensor 2: a model takes 2 ranks then"),
        (("--ranks", "2", "--", "--strategy", "ps", "--backup-workers", "2"), "--backup-workers"),
        (("--host-memory", "lots", "--", "--hidden", "9"), "--host-memory is 'lots'"),
        (("--ranks", "2", "--", "--hidden", "0"), "--hidden is [0]"),
        (("--ranks", "2", "--", "--pipeline", "2", "--cuts", "x"), "--cuts is 'x', expected auto, measured"),
        (("--ranks", "9", "--", "--pipeline", "9"), "--pipeline 9: this model has 6 steps"),
    ],
)
def test_what_cannot_be_predicted_is_said(command: Command, words: tuple[str, ...], message: str) -> None:
    found = command("memory", *words)
    assert found.status != 0
    assert message in found.output


@pytest.mark.parametrize("strategy", [("--mesh", "dp=1,pp=2"), ("--strategy", "ps")])
def test_whether_it_fits_is_said_and_is_the_status(command: Command, strategy: tuple[str, ...]) -> None:
    """Per rank and per host: of two ranks on a host each, one fits where two on one do not."""
    asked = ("--ranks", "2", "--shape", "1", "28", "28", "--host-memory")
    model = ("--", "--model", "mlp", "--hidden", "4000", "4000", *strategy)
    together = command("memory", *asked, "1300M", *model)
    apart = command("memory", *asked, "1300M", "--ranks-per-host", "1", *model)
    assert (together.status, apart.status) == (1, 0), together.output + apart.output
    assert "1,300 MB are there (--host-memory): DOES NOT FIT\nit DOES NOT FIT" in together.output
    assert "a host with 1 rank needs at most" in apart.output
    assert "it fits" in apart.output
    here = command("memory", *asked[:-1], "--", "--hidden", "8", *strategy)
    assert here.status == 0
    assert "a rank needs at most" in here.output


def test_a_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "groups" / "slurm" / "job_7"
    job.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/slurm/job_7\n")
    (tmp_path / "meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable: 32000000 kB\n")
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(host_memory, "_OWN_CGROUP", tmp_path / "own")
    assert host_memory.of_host(tmp_path / "meminfo") == (32000000 * 1024, "MemAvailable of this host")
    # Slurm sets it for the job, and the step's own group has none; page cache is given up where it is needed.
    (job.parent / "memory.max").write_text("max\n")
    (job / "memory.max").write_text(f"{10**9}\n")
    (job / "memory.current").write_text(f"{4 * 10**8}\n")
    (job / "memory.stat").write_text("anon 5\ninactive_file 100000000\n")
    found = host_memory.of_host(tmp_path / "meminfo")
    assert found.bytes == 7 * 10**8
    assert str(job) in found.source
