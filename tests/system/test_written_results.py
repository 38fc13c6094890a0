"""What evaluate, sample and reconstruct write and score: as their flags and their help say."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hvdvae.checkpoint import load, save
from tests.system.conftest import Command

FEW = ("--epochs", "1", "--nll-samples", "0", "--hidden", "8", "--latent", "2", "--threads", "1")


@pytest.fixture
def run(command: Command, images: Path, tmp_path: Path) -> Path:
    """A run on data that brings all three splits."""
    assert command("train", "--data", images, *FEW, "--out", tmp_path / "run").status == 0
    return tmp_path / "run"


def examples_of(run: Path) -> tuple[str, int]:
    record = json.loads((run / "evaluation.json").read_text())
    return record["split"], record["examples"]


def test_other_data_is_scored_whole_unless_it_brings_a_test_split(
    command: Command, images: Path, run: Path, tmp_path: Path
) -> None:
    few = ("--samples", "2")
    arrays = dict(np.load(images))
    np.save(tmp_path / "new.npy", arrays["train"][::4] ^ 255)
    np.savez(tmp_path / "own.npz", train=arrays["train"] ^ 255, test=arrays["test"])
    np.savez(tmp_path / "held.npz", train=arrays["train"][:50] ^ 255, validation=arrays["validation"])
    for data, words, expected in (
        ("new.npy", (), ("all", 120)),
        ("new.npy", ("--split", "test"), ("test", 12)),
        ("own.npz", (), ("test", 41)),
        ("own.npz", ("--split", "all"), ("all", 521)),
        ("held.npz", (), ("all", 90)),
        # The data of the run: its training examples are not scored unasked.
        (images, (), ("test", 41)),
    ):
        job = command("evaluate", run, "--data", tmp_path / data, *words, *few)
        assert job.status == 0, job.output
        assert examples_of(run) == expected, data
        assert f"{expected[0]} of {Path(data).name}, {expected[1]} examples" in job.output
    assert command("evaluate", run, *few).status == 0
    assert examples_of(run) == ("test", 41)


def test_data_that_a_run_was_trained_on_is_not_scored_whole_unasked(
    command: Command, images: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "all.npy", np.load(images)["train"])
    out = tmp_path / "cut"
    assert command("train", "--data", tmp_path / "all.npy", *FEW, "--out", out, "--validation", "30").status == 0
    for data in ("all.npy", tmp_path / "all.npy"):
        assert command("evaluate", out, "--data", data, "--samples", "2").status == 0
        assert examples_of(out) == ("test", 48)


@pytest.mark.parametrize(("name", "count"), [("sample", 64), ("reconstruct", 32)])
def test_the_name_says_whether_it_is_a_picture_or_an_array(
    command: Command, run: Path, tmp_path: Path, name: str, count: int
) -> None:
    job = command(name, run, "--output", tmp_path / "s.npy")
    assert job.status == 0, job.output
    values = np.load(tmp_path / "s.npy", allow_pickle=False)
    assert (values.shape, values.dtype) == ((count, 1, 8, 8), np.float32)
    assert 0 <= values.min() < values.max() <= 1
    assert "means of p(x|z)" in job.output
    assert f"({count}, 1, 8, 8)" in job.output
    assert command(name, run, "--output", tmp_path / "s.png", "--count", "5").status == 0
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.format == "PNG"
    for other in ("s.jpg", "s"):
        job = command(name, run, "--output", tmp_path / other)
        assert job.status == 2
        assert ".png" in job.output
        assert not (tmp_path / other).exists()


def test_draws_have_the_noise_of_the_data_and_means_have_not(command: Command, run: Path, tmp_path: Path) -> None:
    for values in ("means", "draws"):
        assert command("sample", run, "--values", values, "--output", tmp_path / f"{values}.npy").status == 0
    assert set(np.unique(np.load(tmp_path / "draws.npy"))) == {0.0, 1.0}
    assert len(np.unique(np.load(tmp_path / "means.npy"))) > 2


@pytest.mark.parametrize("name", ["sample", "reconstruct"])
def test_a_model_that_has_diverged_gives_no_picture(command: Command, run: Path, tmp_path: Path, name: str) -> None:
    best = run / "checkpoints" / "best.safetensors"
    found = load(best)
    tensors = {key: value * float("nan") if "decoder" in key else value for key, value in found.tensors.items()}
    save(best, type(found)(tensors, found.record))
    job = command(name, run, "--output", tmp_path / "s.png")
    assert job.status == 2, job.output
    assert "not finite" in job.output
    assert not (tmp_path / "s.png").exists()


def test_values_that_are_no_picture_are_written_as_an_array(command: Command, tmp_path: Path) -> None:
    spectra = np.random.default_rng(0).normal(size=(60, 7)).astype(np.float32)
    np.save(tmp_path / "spectra.npy", spectra)
    out = tmp_path / "run"
    trained = command("train", "--data", tmp_path / "spectra.npy", "--likelihood", "gaussian", *FEW, "--out", out)
    assert trained.status == 0, trained.output
    job = command("sample", out)
    assert job.status == 2
    assert "--output FILE.npy" in job.output
    assert command("sample", out, "--output", tmp_path / "s.npy", "--values", "draws").status == 0
    assert np.load(tmp_path / "s.npy").shape == (64, 7)
