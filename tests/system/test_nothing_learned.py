"""A run that learned nothing, or whose model gives no likelihood, is no success: the status and one line say so."""

import json
from pathlib import Path

import numpy as np
import pytest

from hvdvae.checkpoint import load, save
from tests.system.conftest import Command, Start

FEW = ("--epochs", "2", "--batch-size", "64", "--nll-samples", "2", "--hidden", "8", "--latent", "2", "--threads", "1")


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """Images as a scanner has them, from -239 to 1036."""
    values = np.random.default_rng(0).uniform(-239, 1036, (256, 8, 8)).astype(np.float32)
    values[0, 0, :2] = -239, 1036
    np.save(tmp_path / "scan.npy", values)
    return tmp_path / "scan.npy"


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        (("--lr", "1e30"), "gives no finite likelihood"),
        (("--lr", "1e30", "--nll-samples", "0"), "no finite loss in any validation"),
        (("--lr", "1e30", "--skip-limit", "2"), "skipped 3 steps"),
        (
            (
                "--sigma",
                "1e-20",
            ),
            "all of its 6 steps were skipped",
        ),
        (("--lr", "1e-12", "--sigma", "0.02"), "has an NLL of"),
    ],
    ids=["diverged", "no test", "past the limit", "all skipped", "absurd"],
)
def test_a_run_that_learned_nothing_says_so(
    command: Command, scan: Path, tmp_path: Path, more: tuple[str, ...], cause: str
) -> None:
    job = command("train", "--data", scan, "--likelihood", "gaussian", *FEW, "--out", tmp_path / "run", *more)
    assert job.status == 2, job.output
    assert "hvdvae: finished" not in job.output
    said = job.output.split("hvdvae: error: ")[1]
    for word in (cause, "from -239 to 1036", "float32", "--likelihood gaussian", "scale the data", "--lr"):
        assert word in said, job.output


def test_a_finished_run_of_such_values_that_were_scaled_is_one(command: Command, scan: Path, tmp_path: Path) -> None:
    values = np.load(scan)
    np.save(scan, (values - values.mean()) / values.std())
    job = command("train", "--data", scan, "--likelihood", "gaussian", *FEW, "--out", tmp_path / "run")
    assert job.status == 0, job.output
    assert "hvdvae: finished" in job.output, job.output


def test_evaluate_of_a_model_without_a_likelihood_is_no_success(command: Command, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert command("train", "--data", images, *FEW, "--out", out).status == 0
    best = out / "checkpoints" / "best.safetensors"
    found = load(best)
    tensors = dict(found.tensors)
    name = next(name for name in tensors if name.startswith("model/decoder"))
    tensors[name] = tensors[name] * float("nan")
    save(best, type(found)(tensors, found.record))
    job = command("evaluate", out, "--samples", "2")
    assert job.status == 2, job.output
    assert "no finite likelihood" in job.output, job.output
    assert json.loads((out / "evaluation.json").read_text())["nll"] is None


def test_other_data_may_be_far_from_what_a_model_knows(command: Command, scan: Path, tmp_path: Path) -> None:
    values = np.load(scan)
    np.save(tmp_path / "scaled.npy", (values - values.mean()) / values.std())
    np.save(tmp_path / "far.npy", values * 100)
    out = tmp_path / "run"
    few = ("--likelihood", "gaussian", *FEW)
    assert command("train", "--data", tmp_path / "scaled.npy", *few, "--out", out).status == 0
    job = command("evaluate", out, "--data", tmp_path / "far.npy", "--samples", "2")
    assert job.status == 0, job.output
    assert json.loads((out / "evaluation.json").read_text())["nll"] > 1e6


@pytest.mark.parametrize("strategy", ["allreduce --engine mpi", "local-sgd", "ps"])
def test_under_every_way_of_stepping(start: Start, scan: Path, tmp_path: Path, strategy: str) -> None:
    asked = ["--data", str(scan), "--likelihood", "gaussian", "--sigma", "1e-20", "--out", str(tmp_path / "run")]
    job = start(2, "-m", "hvdvae", "train", *asked, *FEW, "--strategy", *strategy.split()).finish()
    assert job.status == 2, job.output
    assert "finished, results" not in job.output, job.output
    assert "has learned nothing" in job.output, job.output
    assert "from -239 to 1036" in job.output, job.output
