"""A run that was stopped, however, and resumed ends with the weights of one that was never stopped."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvdvae.checkpoint import Folder, load
from tests.system.conftest import Command, Finished, Launch, Start, clean_environment, launcher_command

EPOCHS = 8
STEPS = 240
"""Steps of an epoch: two examples each."""


def words(images: Path, ranks: int, out: str = "run") -> list[str]:
    """A run that takes some seconds, with all kinds of state: moments, a moving average, a schedule."""
    sizes = ["--hidden", "10", "--latent", "3", "--threads", "1", "--batch-size", str(2 // ranks)]
    rates = ["--lr", "0.002", "--schedule", "cosine", "--ema", "0.99", "--clip-norm", "20"]
    run = ["--epochs", str(EPOCHS), "--nll-samples", "2", "--pictures-every", "0", "--out", out, "--engine", "mpi"]
    return ["train", "--data", str(images), *sizes, *rates, *run]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[int, Path]:
    """Folders of whole runs, by number of ranks."""
    folder = tmp_path_factory.mktemp("whole")
    for ranks in (1, 2):
        command = [*launcher_command("none" if ranks == 1 else "mpirun", ranks), sys.executable, "-m", "hvdvae"]
        job = Launch([*command, *words(images, ranks, f"np{ranks}")], clean_environment(), folder).finish()
        assert job.status == 0, job.output
    return {ranks: folder / f"np{ranks}" for ranks in (1, 2)}


def stop(job: Launch, number: signal.Signals) -> Finished:
    """Send a signal to the launcher alone where a run of `waits_midway` waits for it, and wait for the job's end."""
    waits = job.folder / "waits"
    give_up = time.monotonic() + 100
    while not waits.exists():
        assert time.monotonic() < give_up, "it did not come so far"
        assert job.process.poll() is None, job.finish(5).output
        time.sleep(0.01)
    waits.unlink()
    job.process.send_signal(number)
    return job.finish()


def midway(step: int | str) -> tuple[str, str]:
    """The command, whose rank 0 waits in this step, or at the final test."""
    return str(Path(__file__).with_name("waits_midway.py")), str(step)


MIDDLE = STEPS + 100


def newest(folder: Path) -> Path:
    return Folder(folder / "checkpoints", 3).steps()[0]


def assert_same_end(found: Path, expected: Path, *, exactly: bool = True) -> None:
    """Weights, moments and moving average are equal, bit for bit if `exactly`, and so is what was made of them."""
    ours, theirs = load(newest(found)), load(newest(expected))
    assert (
        ours.record["position"] == theirs.record["position"] == {"epoch": EPOCHS, "examples": 0, "step": EPOCHS * STEPS}
    )
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert {name.partition("/")[0] for name in ours.tensors} == {"model", "optimizer", "ema", "buffers"}
    near = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-3, "atol": 1e-4}
    for name, tensor in ours.tensors.items():
        torch.testing.assert_close(tensor, theirs.tensors[name], **near, msg=lambda text, name=name: f"{name}: {text}")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (found, expected)]
    assert summaries[0]["test_nll"] == pytest.approx(summaries[1]["test_nll"], rel=0.0 if exactly else 1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_saves_and_resume_goes_on_bit_for_bit(
    start: Start, command: Command, tmp_path: Path, images: Path, never_stopped: dict[int, Path], number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    job = stop(start(1, *midway(MIDDLE), *words(images, 1), launcher="none"), number)
    assert job.status == 128 + number
    assert "Traceback" not in job.output
    said = re.search(rf"{number.name}: saved at step (\d+) in run/checkpoints; continue with --resume", job.output)
    assert said, job.output
    step = int(said[1])
    assert load(newest(folder)).record["step"] == step
    assert step == MIDDLE + 1, "in the middle of an epoch"
    assert not (folder / "summary.json").exists()
    resumed = command("train", "--resume", "--out", "run")
    assert resumed.status == 0, resumed.output
    assert f"resumed at step {step}" in resumed.output
    assert_same_end(folder, never_stopped[1])


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Where tests run in the background of a shell, SIGINT is ignored, and what they start inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_interrupted_in_the_final_test_it_says_that_training_is_saved(
    start: Start, command: Command, tmp_path: Path, images: Path, number: signal.Signals
) -> None:
    few = ("--epochs", "1", "--hidden", "10", "--batch-size", "48", "--pictures-every", "0", "--out", "run")
    run = (*midway("test"), "train", "--data", str(images), *few, "--nll-samples", "1000000")
    # Alone: what a rank says after mpirun was told to end, mpirun does not pass on.
    ended = stop(start(1, *run, launcher="none"), number)
    assert ended.status == 128 + number
    assert "interrupted in the final test; training is saved: --resume --out run makes up for it" in ended.output, (
        ended.output
    )
    assert "Traceback" not in ended.output
    resumed = command("train", "--resume", "--out", "run", "--nll-samples", "2")
    assert resumed.status == 0, resumed.output
    assert (tmp_path / "run" / "summary.json").exists()


def test_sigkill_leaves_whole_checkpoints_to_resume_from(
    start: Start, command: Command, tmp_path: Path, images: Path, never_stopped: dict[int, Path]
) -> None:
    folder = tmp_path / "run"
    job = stop(start(1, *midway(MIDDLE), *words(images, 1), launcher="none"), signal.SIGKILL)
    assert job.status == -signal.SIGKILL
    resumed = command("train", "--resume", "--out", "run")
    assert resumed.status == 0, resumed.output
    assert "refused" not in resumed.output
    assert_same_end(folder, never_stopped[1])


@pytest.fixture(scope="module")
def stopped_at_two_ranks(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The folder of a run of two ranks whose mpirun got SIGUSR1, which it forwards."""
    folder = tmp_path_factory.mktemp("stopped")
    command = [*launcher_command("mpirun", 2), sys.executable, *midway(MIDDLE), *words(images, 2)]
    job = stop(Launch(command, clean_environment(), folder), signal.SIGUSR1)
    assert job.status != 0
    assert job.output.count("SIGUSR1: saved at step") == 1, job.output
    assert load(newest(folder / "run")).record["step"] % STEPS
    return folder / "run"


def test_two_ranks_stop_and_go_on_again_and_again(
    start: Start, tmp_path: Path, stopped_at_two_ranks: Path, never_stopped: dict[int, Path]
) -> None:
    """Each launcher gets a signal alone and ends its ranks; Open MPI's mpirun gives them half a second to save.

    It is the same run, bit for bit, and within the rounding of a norm and of a step where another engine takes over.
    """
    folder = Path(shutil.copytree(stopped_at_two_ranks, tmp_path / "run"))
    again = ("train", "--resume", "--out", "run")
    for epoch, launcher, number in ((2, "mpirun", signal.SIGTERM), (3, "horovodrun-gloo", signal.SIGINT)):
        engine = ("--engine", "mpi" if launcher == "mpirun" else "horovod")
        job = stop(start(2, *midway(epoch * STEPS + 100), *again, *engine, launcher=launcher), number)
        assert job.status != 0
        assert "resumed at step" in job.output
        assert "uncaught exception" not in job.output
        last = shutil.copytree(folder, tmp_path / launcher)
        resumed = start(2, "-m", "hvdvae", *again[:-1], launcher, "--engine", "mpi").finish()
        assert resumed.status == 0, resumed.output
        assert_same_end(last, never_stopped[2], exactly=launcher == "mpirun")


def test_one_rank_continues_the_run_of_two(
    command: Command, tmp_path: Path, stopped_at_two_ranks: Path, never_stopped: dict[int, Path]
) -> None:
    """The same examples are left to see, in the same global batches; only the noise is another."""
    folder = Path(shutil.copytree(stopped_at_two_ranks, tmp_path / "run"))
    step = load(newest(folder)).record["step"]
    resumed = command("train", "--resume", "--out", "run", "--batch-size", 2)
    assert resumed.status == 0, resumed.output
    assert f"resumed at step {step}" in resumed.output
    last = load(newest(folder)).record
    assert last["position"] == {"epoch": EPOCHS, "examples": 0, "step": EPOCHS * STEPS}
    assert last["world_size"] == 1
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (folder, never_stopped[2]))
    assert ours["world_size"] == 1
    assert ours["test_nll"] == pytest.approx(theirs["test_nll"], rel=0.05)


def test_a_torn_checkpoint_is_named_and_the_one_before_is_taken(
    command: Command, tmp_path: Path, never_stopped: dict[int, Path]
) -> None:
    folder = Path(shutil.copytree(never_stopped[1], tmp_path / "run"))
    torn = newest(folder)
    torn.write_bytes(torn.read_bytes()[:-100])
    resumed = command("train", "--resume", "--out", "run")
    assert resumed.status == 0, resumed.output
    assert f"refused: run/checkpoints/{torn.name}" in resumed.output
    assert f"resumed at step {(EPOCHS - 1) * STEPS}" in resumed.output
    assert_same_end(folder, never_stopped[1])


def test_an_earlier_run_is_not_touched_unless_asked(
    command: Command, tmp_path: Path, images: Path, never_stopped: dict[int, Path]
) -> None:
    folder = Path(shutil.copytree(never_stopped[1], tmp_path / "run"))
    mine = folder / "notes.txt"
    mine.write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    refused = command("train", "--data", images, "--out", "run")
    assert refused.status == 2
    for word in ("--out run", "earlier run", "--resume", "--overwrite"):
        assert word in refused.output
    # What cannot be run deletes nothing either.
    impossible = ("--overwrite", "--model", "conv", "--hidden", 1, 1, 1, 1)
    assert command("train", "--data", images, "--out", "run", *impossible).status == 2
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    few = ("--epochs", 1, "--nll-samples", 0, "--hidden", 10, "--batch-size", 48)
    assert command("train", "--data", images, "--out", "run", "--overwrite", *few).status == 0
    assert [load(path).record["step"] for path in Folder(folder / "checkpoints", 3).steps()] == [10]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) < 10
    assert mine.read_text() == "mine"


def test_resume_of_nothing_starts_anew_and_of_a_whole_run_changes_nothing(
    command: Command, tmp_path: Path, images: Path
) -> None:
    """So that one command line serves the first start and every restart of a job."""
    few = ("--epochs", 2, "--nll-samples", 2, "--hidden", 10, "--batch-size", 48)
    again = ("train", "--data", images, "--out", "new/run", "--resume", *few)
    first = command(*again)
    assert first.status == 0, first.output
    assert "no checkpoint in new/run/checkpoints yet, starting anew" in first.output
    weights = newest(tmp_path / "new" / "run").read_bytes()
    second = command(*again)
    assert second.status == 0, second.output
    assert "resumed at step 20" in second.output
    assert newest(tmp_path / "new" / "run").read_bytes() == weights
    summary = json.loads((tmp_path / "new" / "run" / "summary.json").read_text())
    assert (summary["epochs"], summary["steps"]) == (2, 20)
    longer = command(*again[:-6], "--epochs", 3, "--nll-samples", 2)
    assert longer.status == 0, longer.output
    assert load(newest(tmp_path / "new" / "run")).record["step"] == 30


def test_a_resume_keeps_the_points_of_what_was_done(command: Command, images: Path) -> None:
    """Those of the last epoch, too; and a relative path of data is found from anywhere."""
    shutil.copy(images, "data.npz")
    run = ("train", "--data", "data.npz", "--hidden", 8, "--latent", 2, "--nll-samples", 2, "--out", "run")
    for epochs, resume in ((2, ()), (4, ("--resume",))):
        assert command(*run, "--epochs", epochs, *resume).status == 0
    events = EventAccumulator("run/tensorboard", size_guidance={"scalars": 0})
    events.Reload()
    steps = [point.step for point in events.Scalars("epoch/validation_elbo")]
    assert steps == [steps[0] * epoch for epoch in (1, 2, 3, 4)]
    folder = Path("run").absolute()
    Path("elsewhere").mkdir()
    os.chdir("elsewhere")
    ended = command("evaluate", folder, "--samples", 2)
    assert ended.status == 0, ended.output


def test_results_do_not_go_among_the_images(command: Command) -> None:
    """The next run would train on its pictures."""
    for number in range(4):
        Path("images").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), 60 * number, np.uint8)).save(f"images/{number}.png")
    ended = command("train", "--data", "images", "--epochs", 1, "--batch-size", 1, "--out", "images/run")
    assert ended.status == 2
    assert "lies among the images" in ended.output
    assert not Path("images/run").exists()


def test_neither_flags_nor_a_swapped_file_make_another_function_of_the_weights(command: Command, images: Path) -> None:
    """Weights that were trained with tanh fit a network with relu, and are worth other numbers in it."""
    few = ("--data", images, "--epochs", 1, "--hidden", 8, "--latent", 2, "--nll-samples", 0, "--pictures-every", 0)
    for out, activation in (("a", "tanh"), ("b", "relu")):
        assert command("train", *few, "--out", out, "--activation", activation).status == 0
    resumed = command("train", "--out", "a", "--resume", "--activation", "relu", "--epochs", 2)
    assert resumed.status == 2, resumed.output
    assert "was trained with activation tanh (here relu): resume with --activation tanh" in resumed.output
    assert "activation: relu" not in Path("a/config.yaml").read_text(), "a refused resume changes nothing"
    longer = command("train", "--out", "a", "--resume", "--activation", "tanh", "--epochs", 2, "--lr", 0.002)
    assert longer.status == 0, longer.output
    assert "hvdvae: goes on with epochs 2 (was 1), lr 0.002 (was 0.001)" in longer.output
    shutil.copy("b/config.yaml", "a/config.yaml")
    for words in (("evaluate", "a", "--samples", 2), ("sample", "a"), ("reconstruct", "a")):
        refused = command(*words)
        assert refused.status == 2, refused.output
        assert "a/config.yaml says otherwise" in refused.output
        assert "activation tanh (not relu)" in refused.output
    resumed = command("train", "--out", "a", "--resume", "--epochs", 3)
    assert resumed.status == 2, resumed.output
    assert "activation tanh (here relu)" in resumed.output
