"""What a user gets wrong ends with status 2 and one line: the flag, key or file, what was found, what was expected."""

import gzip
import os
import pickle
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdvae.checkpoint import Checkpoint, Folder, load, save
from tests.system.conftest import Command, Finished, Start

FEW = ("--epochs", "1", "--nll-samples", "0", "--hidden", "4", "--threads", "1")


def assert_refused(job: Finished, *words: str, ranks: int = 1) -> None:
    """One line on the whole output that begins as errors do and holds all words."""
    assert job.status == 2, job.output
    assert "Traceback" not in job.output
    # mpirun's own words may stand before ours on a line.
    said = ["hvdvae: error" + line for line in job.output.split("hvdvae: error")[1:]]
    assert len(said) == 1, job.output
    assert said[0].startswith(f"hvdvae: error (rank 0 of {ranks}): " if ranks > 1 else "hvdvae: error: ")
    for word in words:
        assert word in said[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", ["no command", "train, evaluate"]),
        ("trian", ["'trian' is no command", "did you mean train?"]),
        ("train --bach-size 3", ["--bach-size is no flag of hvdvae train", "did you mean --batch-size?"]),
        ("train --batch 3", ["--batch is no flag"]),
        ("train --zzz=3", ["--zzz is no flag", "`hvdvae train --help`"]),
        ("train 17", ["unexpected '17'"]),
        ("train --lr abc", ["--lr is 'abc', expected a number"]),
        ("train --clip-norm=abc", ["--clip-norm is 'abc', expected a number"]),
        ("train --lr nan", ["--lr is nan, expected a finite number above 0"]),
        ("train --epochs 2.5", ["--epochs is 2.5, expected a whole number"]),
        ("train --threads two", ["--threads is 'two', expected a whole number"]),
        ("train --hidden 10 ten", ["--hidden is 'ten', expected whole numbers"]),
        ("train --hidden", ["--hidden has no value, expected whole numbers"]),
        ("train --lr", ["--lr has no value, expected a number"]),
        ("train --model foo", ["--model is 'foo', expected one of mlp, mlp2, conv"]),
        ("train --activation elu", ["--activation is 'elu', expected one of tanh, relu"]),
        ("train --batch-norm=yes", ["--batch-norm is a switch and takes no value"]),
        ("train --lr 0", ["--lr is 0.0, expected a finite number above 0"]),
        ("train --config none.yaml", ["--config none.yaml", "No such file"]),
        ("train --resume", ["--resume needs --out"]),
        ("train --device abacus --out run", ["--device", "abacus"]),
        ("train --model mlp2 --hidden 10 --out run", ["--hidden", "[10]", "even number"]),
        ("train --latent 3 4 --out run", ["--latent", "[3, 4]", "expected 1"]),
        ("train --data missing.npy", ["missing.npy", "no such file", "--data", "digits, mnist"]),
        ("train --out /proc/version/run", ["--out /proc/version/run", "cannot be made a folder"]),
        ("evaluate", ["DIR is missing", "--out of a training run"]),
        ("evaluate none", ["none", "--out of a training run"]),
        ("evaluate .", ["config.yaml", "--out of a training run"]),
        ("evaluate . --split most", ["--split is 'most', expected one of test, validation, train, all"]),
        ("sample . --output s.jpg", ["--output s.jpg", ".png", ".npy"]),
        ("reconstruct . --output s", ["--output s", ".png", ".npy"]),
        ("evaluate . --samples 0", ["--samples is 0, expected at least 1"]),
        ("evaluate . --threads -1", ["--threads is -1, expected at least 1"]),
        ("evaluate . --seed 10000000000000000000", ["--seed", "2**63"]),
        ("sample . --count 0", ["--count is 0, expected at least 1"]),
        ("reconstruct", ["DIR is missing"]),
        ("memory", ["memory has no options of a run", "behind `--`"]),
        ("memory --ranks 4 --", ["memory has no options of a run", "behind `--`"]),
        ("slurm --nodes 2", ["slurm has nothing to start", "python train.py"]),
        ("slurm --", ["slurm has nothing to start", "python train.py"]),
        ("supervise", ["supervise has no command", "behind `--`"]),
        ("train --config", ["--config has no value, expected a file"]),
        ("doctor now", ["unexpected 'now'"]),
    ],
    ids=str,
)
def test_command_lines(command: Command, line: str, words: list[str]) -> None:
    assert_refused(command(*line.split()), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bach-size: 3", ["unknown key 'bach_size'", "did you mean batch_size?"]),
        ("lr: fast", ["lr is 'fast', expected a number"]),
        ("lr:", ["lr is null, expected a number"]),
        ("lr: [0.1]", ["lr is [0.1], expected a number"]),
        ("epochs: 2.5", ["epochs is 2.5, expected a whole number"]),
        ("epochs: true", ["epochs is true, expected a whole number"]),
        ("hidden: 3", ["hidden is 3, expected whole numbers"]),
        ("model: foo", ["model is 'foo', expected one of mlp, mlp2, conv"]),
        ("batch_norm: 3", ["batch_norm is 3, expected true or false"]),
        ("lr: [", ["found no YAML"]),
        ("lr: 0.1\nepochs: 2\nlr: 0.2", ["line 3: the key 'lr' stands twice"]),
        ("\0", ["found no YAML"]),
        ("- 1", ["found a list, expected lines of `key: value`"]),
    ],
    ids=repr,
)
def test_configuration_files(command: Command, tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "bad.yaml").write_text(text + "\n")
    assert_refused(command("train", "--config", "bad.yaml"), "--config bad.yaml", *words)
    # The same in the folder of a run, whoever reads it.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text + "\n")
    assert_refused(command("train", "--resume", "--out", "run"), "run/config.yaml", *words)
    assert_refused(command("evaluate", "run"), "run/config.yaml", *words)


def test_a_binary_configuration_file(command: Command, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(bytes(range(128, 256)))
    assert_refused(command("train", "--config", "bad.yaml"), "bad.yaml", "no UTF-8 text, expected YAML")


def idx(images: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    return struct.pack(">4B3I", 0, 0, 8, 3, *images.shape) + images.tobytes()


def with_nan() -> np.ndarray[Any, Any]:
    found = np.full((60, 8, 8), 0.5, np.float32)
    found[7, 1, 1] = np.nan
    return found


ARRAYS: dict[str, tuple[np.ndarray[Any, Any], list[str]]] = {
    "nan": (with_nan(), ["NaN", "example 7"]),
    "infinite": (np.full((60, 4), np.inf), ["infinity", "example 0"]),
    "labels": (np.arange(60), ["rank 1", "shape (60,)", "(N, D)"]),
    "rank five": (np.zeros((60, 2, 2, 2, 2), np.uint8), ["rank 5", "(N, C, H, W)"]),
    "empty": (np.zeros((0, 8, 8), np.uint8), ["(0, 8, 8)"]),
    "above one": (np.full((60, 8, 8), 1.5), ["1.5", "[0, 1]", "--likelihood"]),
    "below zero": (np.full((60, 8, 8), -0.5), ["-0.5", "[0, 1]", "--likelihood"]),
    "too few": (np.zeros((2, 8, 8), np.uint8), ["found 2 examples"]),
    "text": (np.array([["a", "b"]] * 60), ["dtype"]),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays(command: Command, tmp_path: Path, case: str) -> None:
    array, words = ARRAYS[case]
    np.save(tmp_path / "bad.npy", array)
    assert_refused(command("train", "--data", "bad.npy", "--out", "run", *FEW), "bad.npy", "expected", *words)
    assert not (tmp_path / "run").exists(), "refused before anything is made"


def test_torn_and_foreign_files(command: Command, tmp_path: Path) -> None:
    packed = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)))
    contents = {
        "torn-images-idx3-ubyte.gz": packed[: len(packed) // 2],
        "torn.npy": b"\x93NUMPY",
        "torn.npz": b"PK\3\4",
        "torn.h5": b"\x89HDF",
        "empty.npy": b"",
        "labels-idx1-ubyte": struct.pack(">4BI", 0, 0, 8, 1, 60) + bytes(60),
        "notes.txt": b"hello",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert_refused(command("train", "--data", name, *FEW), name, "found", "expected")


def test_convolutions_need_sizes_that_divide(command: Command, tmp_path: Path) -> None:
    np.save(tmp_path / "ten.npy", np.zeros((60, 10, 10), np.uint8))
    np.save(tmp_path / "vectors.npy", np.zeros((60, 10), np.uint8))
    conv = ("--model", "conv", *FEW[:4])
    words = ("height is 10", "multiple of 4", "8 or 12", "--hidden")
    assert_refused(command("train", "--data", "ten.npy", *conv), *words)
    assert_refused(command("train", "--data", "vectors.npy", *conv), "(10,)", "--model mlp")


def test_vectors_that_are_no_images_train_without_pictures(command: Command, tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).random((60, 10)).astype(np.float32))
    job = command("train", "--data", "vectors.npy", "--out", "run", *FEW)
    assert job.status == 0, job.output
    assert "none: the data is no image" in job.output
    assert not list((tmp_path / "run").glob("*.png"))
    assert_refused(command("sample", "run"), "vectors of 10 numbers")
    assert command("evaluate", "run", "--samples", "2").status == 0


@pytest.fixture
def trained(command: Command, images: Path, tmp_path: Path) -> Path:
    """A run of one epoch; its folder is `run`."""
    assert command("train", "--data", images, "--out", "run", *FEW).status == 0
    return tmp_path / "run"


def test_checkpoints_that_do_not_fit(command: Command, trained: Path, images: Path, tmp_path: Path) -> None:
    other = ("--data", images, "--out", "other", *FEW, "--hidden", "9", "9")
    assert command("train", *other).status == 0
    best = "other/checkpoints/best.safetensors"
    assert_refused(command("evaluate", "run", "--checkpoint", best), best, "another model")
    resumed = command("train", "--resume", "--out", "run", "--hidden", "9")
    assert_refused(resumed, f"run/checkpoints/{newest(trained).name}", "--hidden")
    assert_refused(command("evaluate", "run", "--checkpoint", "first"), "first", "No such file")
    assert_refused(command("sample", "run", "--output", "none/picture.png"), "none/picture.png")
    assert_refused(command("evaluate", "run", "--data", "digits.npy"), "digits.npy")
    shutil.rmtree(trained / "checkpoints")
    assert_refused(command("sample", "run"), "run has no checkpoint 'best'")


def newest(folder: Path) -> Path:
    return Folder(folder / "checkpoints", 3).steps()[0]


class Trap:
    """Unpickling it makes a folder."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("sprung",)


def test_a_pickle_is_never_opened(command: Command, trained: Path, tmp_path: Path) -> None:
    for content in (pickle.dumps(Trap()), b""):
        for path in (trained / "checkpoints").iterdir():
            path.write_bytes(content)
        refused = command("evaluate", "run")
        assert_refused(refused, "run/checkpoints/best.safetensors", "torn or not a checkpoint")
        resumed = command("train", "--resume", "--out", "run")
        assert resumed.status == 2, "whoever has checkpoints does not want to start anew"
        for name in (newest(trained).name, "best.safetensors"):
            assert f"refused: run/checkpoints/{name}" in resumed.output
        assert "no checkpoint in run/checkpoints is whole: delete them to start anew" in resumed.output
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "sprung").exists(), "the trap works"


def test_a_changed_checkpoint_is_refused(command: Command, trained: Path) -> None:
    best, foreign = trained / "checkpoints" / "best.safetensors", load(newest(trained))
    content = bytearray(best.read_bytes())
    content[-5] ^= 1
    best.write_bytes(content)
    assert_refused(command("evaluate", "run"), "run/checkpoints/best.safetensors", "digest")
    save(best, Checkpoint({"weights": foreign.tensors["buffers"]}, {"step": 1, "config": foreign.record["config"]}))
    assert_refused(command("evaluate", "run"), "run/checkpoints/best.safetensors", "another model")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder for one MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root and CAP_SYS_ADMIN")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_in_a_checkpoint(command: Command, full_disk: Path, images: Path) -> None:
    wide = ("--data", images, "--hidden", 60, "--batch-size", 48, "--nll-samples", 0, "--threads", 1)
    job = command("train", *wide, "--out", "small/run", "--epochs", 30, "--keep", 30)
    assert_refused(job, "small/run/checkpoints/step-", "No space left on device", "--resume")
    steps = [load(path).record["step"] for path in Folder(full_disk / "run" / "checkpoints", 30).steps()]
    assert steps == list(range(10 * len(steps), 0, -10)), "every earlier checkpoint is whole"
    assert 2 <= len(steps) < 10
    assert not list((full_disk / "run" / "checkpoints").glob("*.tmp"))
    # With fewer kept there is room again, and the run goes on.
    for step in steps[1:]:
        newest(full_disk / "run").with_name(f"step-{step:09}.safetensors").unlink()
    job = command("train", "--resume", "--out", "small/run", "--epochs", len(steps) + 2, "--keep", 1)
    assert job.status == 0, job.output


# TensorBoard writes in a thread, whose exception comes to the run with its next point.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_fills_up_between_checkpoints(command: Command, full_disk: Path, images: Path) -> None:
    """Curves and metrics grow without a checkpoint to notice it; whichever file does not fit is named."""
    few = ("--data", images, "--hidden", 4, "--latent", 2, "--batch-size", 240, "--nll-samples", 0, "--threads", 1)
    rare = ("--epochs", 1000, "--checkpoint-every", 1000, "--validate-every", 1000)
    for room in (20_000, 60_000):
        (full_disk / "filler").write_bytes(bytes((1 << 20) - room))
        job = command("train", *few, *rare, "--out", f"small/{room}")
        assert_refused(job, f"small/{room}", "No space left on device", "--resume")
        assert f"small/{room}/checkpoints" not in job.output
        shutil.rmtree(full_disk / str(room))


@pytest.mark.parametrize(
    ("launcher", "ranks", "line", "words"),
    [
        ("mpirun", 2, "train --lr abc", ["--lr is 'abc', expected a number"]),
        ("mpirun", 2, "train --data missing.npy", ["missing.npy", "no such file"]),
        ("mpirun", 3, "train --data three.npy", ["three.npy", "found 2 training examples", "3 ranks"]),
        ("mpirun", 3, "train --reduce-op adasum", ["--reduce-op adasum", "power of two", "found 3"]),
        ("mpirun", 2, "train --strategy local --overwrite", ["--strategy", "2 ranks", "allreduce"]),
        ("horovodrun-gloo", 2, "train --engine mpi", ["--engine mpi", "horovodrun --gloo", "--engine horovod"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_several_ranks_end_and_one_of_them_says_why(
    start: Start, tmp_path: Path, launcher: str, ranks: int, line: str, words: list[str]
) -> None:
    np.save(tmp_path / "three.npy", np.zeros((4, 8, 8), np.uint8))
    earlier = tmp_path / "run" / "metrics.jsonl"
    earlier.parent.mkdir()
    earlier.write_text("the results of an earlier run")
    options = [] if "--data" in line else ["--data", "digits"]
    out = ["--out", "run" if "--overwrite" in line else "new"]
    job = start(ranks, "-m", "hvdvae", *line.split(), *options, *out, launcher=launcher).finish(60)
    if launcher == "horovodrun-gloo":
        # horovodrun has a status and a traceback of its own; each line says which rank it is from.
        assert job.status != 0
        ours = [line.partition("<stderr>:")[2] for line in job.output.splitlines() if "<stderr>:hvdvae: " in line]
        job = Finished(2, "\n".join(ours), job.seconds)
    assert_refused(job, *words, ranks=ranks)
    assert earlier.exists(), "what cannot be run deletes nothing"
