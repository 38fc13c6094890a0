"""What hvdvae memory predicts is what a run takes, and what does not fit on one rank trains on two."""

import json
import sys
from pathlib import Path

import psutil
import pytest
import torch

from hvdvae.vae import build_model
from tests.system.conftest import Command, Launch, clean_environment
from tests.system.memory_job import SHAPE

JOB = str(Path(__file__).with_name("memory_job.py"))
LARGE = ("--model", "mlp", "--hidden", "7000", "7000", "--latent", "20", "--activation", "relu", "--batch-size", "8")
LARGE += ("--engine", "mpi")
NEEDED = 6e9
"""Bytes that the largest of these jobs takes in all."""

pytestmark = pytest.mark.skipif(
    psutil.virtual_memory().available < NEEDED, reason=f"needs {NEEDED / 1e9:.0f} GB of free memory"
)


def run(folder: Path, ranks: int, *words: str) -> tuple[int, str]:
    launch = ["mpirun", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", "-n", str(ranks)] if ranks > 1 else []
    job = Launch([*launch, sys.executable, JOB, *LARGE, *words], clean_environment(), folder).finish(120)
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
    ],
    ids=str,
)
def test_predictions_are_within_15_percent(tmp_path: Path, ranks: int, words: tuple[str, ...]) -> None:
    status, output = run(tmp_path, ranks, *words)
    assert status == 0, output
    rows = json.loads(output.strip().splitlines()[-1])
    assert len(rows) == ranks
    for row in rows:
        assert row["grew"] == pytest.approx(row["predicted"], rel=0.15), rows


def test_the_whole_command_trains_and_resumes_where_one_rank_cannot(tmp_path: Path) -> None:
    """Building, training, saving, resuming on another mesh and testing: the whole model is never in one place."""
    megabytes = 1150
    words = "--data digits --hidden 5000 5000 --latent 20 --activation relu --batch-size 250 --engine mpi --threads 1"
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
        status, output = limited(f"{mpirun} {run} --epochs {epochs} {split}")
        assert status == 0, output
    assert "resumed at step" in output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 2


def test_the_command_shows_every_stage(command: Command) -> None:
    given = ("--ranks", "8", "--shape", "1", "28", "28", "--", *LARGE, "--mesh", "dp=2,pp=2,tp=2")
    found = command("memory", *given)
    assert found.status == 0, found.output
    assert "mesh dp=2,pp=2,tp=2: 2 x 4 ranks" in found.output
    rows = [line.split() for line in found.output.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows] == ["0", "1"]
    # 109.6 million parameters, of which almost all are split over four: 4 bytes each.
    assert float(rows[0][1]) + float(rows[1][1]) == pytest.approx(109.7 * 4 / 2, rel=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ranks", "0", "--", "--model", "mlp"), "--ranks is 0, expected at least 1"),
        (("--ranks", "3", "--", "--tensor", "2"), "--tensor 2: a model takes 2 ranks then"),
        (("--ranks", "3", "--", "--strategy", "ps"), "hvdvae memory knows --strategy local, allreduce and sharded"),
        (("--ranks", "2", "--", "--hidden", "0"), "--hidden is [0]"),
        (("--ranks", "2", "--", "--pipeline", "2", "--cuts", "x"), "--cuts is 'x', expected auto, measured"),
        (("--ranks", "9", "--", "--pipeline", "9"), "--pipeline 9: this model has 6 steps"),
    ],
)
def test_what_cannot_be_predicted_is_said(command: Command, words: tuple[str, ...], message: str) -> None:
    found = command("memory", *words)
    assert found.status != 0
    assert message in found.output
