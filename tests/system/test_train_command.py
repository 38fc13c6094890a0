"""hvdvae train, evaluate, sample and reconstruct, as users start them: what a run leaves, and every option once."""

import itertools
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvdvae.checkpoint import Folder, load
from hvdvae.cli.parser import parse
from hvdvae.config import TrainConfig, meaningful_values
from tests.system.conftest import Command, Launch, Start, clean_environment, launcher_command

EPOCHS, RANK_BATCH = 12, 20
SMALL = ("--hidden", "20", "--latent", "5", "--threads", "1")
OF_THE_ISSUE = (
    *("strategy", "engine", "world_size", "epochs", "examples_per_second", "elbo", "rate", "distortion"),
    *("test_nll", "nll_samples", "seconds", "versions", "host"),
)
"""Keys that users of summary.json rely on."""


class Run(NamedTuple):
    folder: Path
    output: str
    launcher: str
    ranks: int

    @property
    def summary(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return record


@pytest.fixture(
    scope="module", params=[("none", 1), ("mpirun", 2), ("horovodrun-gloo", 2), ("horovodrun-mpi", 2)], ids=str
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, images: Path) -> Run:
    """One training run of each launcher, on the same data; the global batch is that of two ranks."""
    launcher, ranks = request.param
    folder = tmp_path_factory.mktemp(launcher)
    batch = RANK_BATCH * 2 // ranks
    words = ("-m", "hvdvae", "train", "--data", str(images), "--out", "run", "--nll-samples", "10", *SMALL)
    words += ("--epochs", str(EPOCHS), "--batch-size", str(batch), "--lr", "0.01", "--pictures-every", "5")
    job = Launch([*launcher_command(launcher, ranks), sys.executable, *words], clean_environment(), folder).finish(60)
    assert job.status == 0, job.output
    return Run(folder / "run", job.output, launcher, ranks)


def test_the_summary_has_every_key_with_a_plausible_value(run: Run) -> None:
    found = run.summary
    assert set(OF_THE_ISSUE) <= set(found)
    assert found["strategy"] == "allreduce"
    assert found["engine"] == ("none" if run.launcher == "none" else "horovod")
    assert (found["world_size"], found["epochs"], found["nll_samples"]) == (run.ranks, EPOCHS, 10)
    assert found["steps"] == EPOCHS * (480 // (2 * RANK_BATCH))
    assert found["skipped_steps"] == 0
    assert 0 < found["training_seconds"] < found["seconds"]
    assert found["examples_per_second"] == pytest.approx(EPOCHS * 480 / found["training_seconds"])
    assert found["elbo"] == pytest.approx(-(found["rate"] + found["distortion"]))
    assert 0 < found["rate"] < 30
    # 64 pixels, one in ten of them random: below it no model comes, and one that learned nothing needs 64 log 2 = 44.4.
    assert 64 * 0.325 < found["test_nll"] < min(40, -found["elbo"] + 1)
    assert {"python", "torch", "numpy", "hvdvae"} <= set(found["versions"])
    assert len(found["peak_rss_bytes"]) == run.ranks
    assert all(50e6 < peak < 2e9 for peak in found["peak_rss_bytes"])
    assert found["host"]


def test_the_end_of_the_output_says_where_everything_is(run: Run) -> None:
    said = "\n".join(line.partition("<stdout>:")[2] or line for line in run.output.splitlines())
    for name in ("samples.png", "reconstructions.png", "checkpoints", "tensorboard", "summary.json", "metrics.jsonl"):
        assert f"run/{name}" in said
    assert said.count("test NLL ") >= 1
    assert said.count("results go to") == 1, "one rank speaks"
    assert f"{run.summary['test_nll']:.2f} nats" in said


def test_metrics_are_whole_lines_that_improve(run: Run) -> None:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert Counter(line["kind"] for line in lines)["epoch"] == EPOCHS
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == list(range(1, EPOCHS + 1))
    assert epochs[-1]["elbo"] > epochs[0]["elbo"] + 5
    assert epochs[-1]["validation_elbo"] > epochs[0]["validation_elbo"] + 2
    assert any(len(line["step_seconds"]) == run.ranks for line in lines if line["kind"] == "step")


def test_the_last_checkpoints_and_the_best_are_whole(run: Run) -> None:
    kept = Folder(run.folder / "checkpoints", 3)
    assert [load(path).record["position"]["epoch"] for path in kept.steps()] == [EPOCHS, EPOCHS - 1, EPOCHS - 2]
    assert load(kept.best).record["world_size"] == run.ranks
    assert not [path.name for path in kept.folder.iterdir() if path.suffix != ".safetensors"]


def test_the_saved_configuration_is_the_whole_one(run: Run) -> None:
    saved = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert (saved["epochs"], saved["hidden"], saved["lr"]) == (EPOCHS, [20], 0.01)
    assert (saved["optimizer"], saved["activation"], saved["binarization"]) == ("adam", "tanh", "dynamic")
    assert saved.get("engine") == (None if run.ranks == 1 else run.summary["engine"])
    assert None not in saved.values()
    # What has no meaning in this run is not there, and what is there is all that a run needs.
    assert not {"resume", "overwrite", "momentum", "gamma", "servers", "cuts", "sigma"} & set(saved)
    again = parse(["train", "--config", str(run.folder / "config.yaml")])[1].config()
    assert meaningful_values(again) == meaningful_values(TrainConfig(**saved))


def test_the_pictures_show_something(run: Run) -> None:
    for name in ("samples.png", "reconstructions.png"):
        with Image.open(run.folder / name) as picture:
            picture.load()
            pixels = np.asarray(picture)
        assert min(pixels.shape[:2]) > 100
        assert len(np.unique(pixels)) > 20, "a blank picture"
        assert pixels.std() > 20


def test_tensorboard_has_curves_and_images(run: Run) -> None:
    events = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    scalars = set(events.Tags()["scalars"])
    epoch = {f"epoch/{name}" for name in ("rate", "distortion", "lr", "examples_per_second", "validation_elbo")}
    split = {f"time/{name}" for name in ("data", "compute", "communication")}
    ranks = {f"step_seconds/rank_{rank}" for rank in range(run.ranks)}
    assert epoch | split | ranks | {"train/rate", "train/learning_rate", "speed/examples_per_second"} <= scalars
    steps = run.summary["steps"]
    assert [point.step for point in events.Scalars("epoch/elbo")] == list(range(steps // EPOCHS, steps + 1, 12))
    for name in ("samples", "reconstructions"):
        assert [point.step for point in events.Images(name)] == [5 * 12, 10 * 12, steps]


@pytest.fixture
def copied(run: Run, tmp_path: Path) -> Run:
    """The run in a folder that the test may write to."""
    return run._replace(folder=Path(shutil.copytree(run.folder, tmp_path / "copy")))


def test_evaluate_sample_and_reconstruct_open_the_run(copied: Run, command: Command, images: Path) -> None:
    """Whatever launched the training, one process finds the same numbers."""
    assert command("evaluate", copied.folder, "--samples", 10).status == 0
    found, summary = json.loads((copied.folder / "evaluation.json").read_text()), copied.summary
    for key, name in (("nll", "test_nll"), ("elbo", "elbo"), ("rate", "rate"), ("distortion", "distortion")):
        assert found[key] == pytest.approx(summary[name], rel=1e-5), key
    assert [layer["active_units"] for layer in found["layers"]] == summary["active_units"]
    assert [len(layer["kl_per_dimension"]) for layer in found["layers"]] == [5]
    assert sum(found["layers"][0]["kl_per_dimension"]) == pytest.approx(found["rate"], rel=1e-4)
    for words in (("sample", "--count", 9), ("reconstruct", "--count", 8, "--split", "train")):
        name, *options = words
        assert command(name, copied.folder, *options, "--output", "picture.png").status == 0
        with Image.open("picture.png") as picture:
            assert len(np.unique(np.asarray(picture))) > 10
    # The same path holds something else now.
    with np.load(images) as arrays:
        np.savez("others.npz", **{name: 255 - array for name, array in arrays.items()})
    config = copied.folder / "config.yaml"
    config.write_text(config.read_text().replace(str(images), str(Path("others.npz").absolute())))
    refused = command("evaluate", copied.folder, "--samples", 2)
    assert refused.status == 2
    assert "found other examples than" in refused.output
    assert command("evaluate", copied.folder, "--samples", 2, "--data", "others.npz").status == 0
    # Samples need no data.
    Path("others.npz").unlink()
    assert command("sample", copied.folder).status == 0
    (copied.folder / "samples.png").unlink()
    (copied.folder / "samples.png").symlink_to(Path("elsewhere").absolute())
    assert command("sample", copied.folder).status == 2
    assert not Path("elsewhere").exists()


def test_evaluate_gives_the_same_numbers_over_two_ranks(
    tmp_path: Path, start: Start, command: Command, images: Path
) -> None:
    words = ("--data", images, "--out", "run", "--epochs", 2, "--nll-samples", 0, "--ema", 0.9, *SMALL)
    assert command("train", *words).status == 0
    found = {}
    for split in ("test", "train"):
        assert command("evaluate", "run", "--samples", 30, "--split", split).status == 0
        found[split] = json.loads(Path("run/evaluation.json").read_text())
    assert found["test"]["nll"] != found["train"]["nll"]
    assert (found["test"]["examples"], found["train"]["examples"]) == (41, 480)
    job = start(2, "-m", "hvdvae", "evaluate", "run", "--samples", "30", "--split", "train").finish(60)
    assert job.status == 0, job.output
    both = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (both["world_size"], found["train"]["world_size"]) == (2, 1)
    for key in ("nll", "nll_standard_error", "elbo", "rate", "distortion"):
        assert both[key] == pytest.approx(found["train"][key], rel=1e-6), key


OBJECTIVES = {
    "elbo": (),
    "warm-up": ("--beta", "2", "--beta-warmup", "1"),
    "free bits": ("--free-bits", "0.1"),
    "iwae": ("--objective", "iwae", "--samples", "3"),
}
SIZES = {"mlp": ("10",), "mlp2": ("10", "10"), "conv": ("4", "8")}


@pytest.mark.parametrize(
    ("model", "objective", "likelihood"),
    list(itertools.product(SIZES, OBJECTIVES, ("bernoulli", "gaussian", "discretized-logistic"))),
)
def test_every_model_objective_and_likelihood_trains(
    command: Command, images: Path, model: str, objective: str, likelihood: str
) -> None:
    words = ("--model", model, "--hidden", *SIZES[model], "--likelihood", likelihood, *OBJECTIVES[objective])
    few = ("--epochs", "3", "--lr", "0.01", "--batch-size", "48", "--nll-samples", "2", "--threads", "1")
    job = command("train", "--data", images, "--out", "run", *words, *few)
    assert job.status == 0, job.output
    first, *_, last = _epochs(Path("run"))
    assert last["validation_distortion"] < first["validation_distortion"], "it learns"
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["skipped_steps"] == 0
    assert np.isfinite(summary["test_nll"])


OPTIONS = {
    "bf16": ("--precision", "bf16"),
    "fp16": ("--precision", "fp16"),
    "clip": ("--clip-norm", "0.5"),
    "ema": ("--ema", "0.9"),
    "accumulate": ("--accumulate", "3"),
    "a remainder": ("--accumulate", "3", "--batch-size", "7"),
    "static": ("--binarization", "static"),
    "probabilities": ("--binarization", "none"),
    "channels-last": ("--model", "conv", "--hidden", "4", "8", "--channels-last"),
    "batch-norm": ("--model", "conv", "--hidden", "4", "8", "--batch-norm", "--sync-batch-norm", "--ema", "0.5"),
    "local": ("--strategy", "local"),
    "sgd": ("--optimizer", "sgd", "--momentum", "0.9", "--lr", "0.001"),
    "rmsprop": ("--optimizer", "rmsprop"),
    "adagrad": ("--optimizer", "adagrad"),
    "adamw": ("--optimizer", "adamw", "--weight-decay", "0.1"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains(command: Command, images: Path, option: str) -> None:
    given = OPTIONS[option]
    few = ("--epochs", "3", "--lr", "0.01", "--batch-size", "24", "--nll-samples", "2", "--threads", "1")
    sizes = () if "--hidden" in given else ("--hidden", "20")
    job = command("train", "--data", images, "--out", "run", *sizes, *few, *given)
    assert job.status == 0, job.output
    first, *_, last = _epochs(Path("run"))
    assert last["validation_elbo"] > first["validation_elbo"], "it learns"
    batch, passes = int((*given, "7")[-1]) if "remainder" in option else 24, 3 if "--accumulate" in given else 1
    assert last["step"] == 3 * (480 // (batch * passes))
    if option == "clip":
        assert last["gradient_norm"] > 0.5, "the norm before clipping is told"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compile_changes_no_number_by_much(command: Command, images: Path) -> None:
    nll = {}
    for name, given in (("plain", ()), ("compiled", ("--compile",))):
        words = ("--data", images, "--out", name, "--epochs", 1, "--nll-samples", 5, "--hidden", 20, *given)
        job = command("train", *words)
        assert job.status == 0, job.output
        nll[name] = json.loads(Path(name, "summary.json").read_text())["test_nll"]
    assert nll["compiled"] == pytest.approx(nll["plain"], rel=1e-2)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (("--schedule", "cosine"), [0.5 * (1 + np.cos(np.pi * epoch / 4)) for epoch in (0.95, 1.95, 2.95, 3.95)]),
        (("--schedule", "step", "--step-epochs", "2", "--gamma", "0.5"), [1, 1, 0.5, 0.5]),
        (("--warmup", "2"), [0.95 / 2, 1.95 / 2, 1, 1]),
        (("--schedule", "constant"), [1, 1, 1, 1]),
    ],
    ids=str,
)
def test_the_learning_rate_follows_the_schedule(
    command: Command, images: Path, schedule: tuple[str, ...], expected: list[float]
) -> None:
    """Rates of the last step of each of four epochs; the rate of a step is that of its middle."""
    words = ("--data", images, "--out", "run", "--epochs", 4, "--batch-size", 48, "--lr", 0.01, "--nll-samples", 0)
    assert command("train", *words, *SMALL, *schedule).status == 0
    assert [line["lr"] for line in _epochs(Path("run"))] == pytest.approx([0.01 * factor for factor in expected])


def test_options_of_two_ranks(start: Start, tmp_path: Path, images: Path) -> None:
    """One launch, a run an option: --engine auto, compression, Adasum, SyncBatchNorm, scaled rates."""
    case = str(Path(__file__).parent / "several_commands.py")
    base = ["train", "--data", str(images), "--epochs", "3", "--batch-size", "24", "--lr", "0.01", "--nll-samples", "2"]
    options = {
        "auto": ["--engine", "auto"],
        "mpi": ["--engine", "mpi"],
        "horovod": ["--engine", "horovod"],
        "fp16 on the wire": ["--compression", "fp16"],
        "auto fp16": ["--engine", "auto", "--compression", "fp16"],
        "adasum": ["--reduce-op", "adasum"],
        "fp16": ["--precision", "fp16", "--engine", "mpi"],
        "linear": ["--lr-scaling", "linear", "--engine", "mpi"],
        "sqrt": ["--lr-scaling", "sqrt", "--engine", "mpi"],
        "sync": ["--model", "conv", "--hidden", "4", "8", "--batch-norm", "--sync-batch-norm", "--engine", "mpi"],
    }
    runs = [
        [*base, "--out", name, *([] if "--hidden" in words else ["--hidden", "20"]), *words]
        for name, words in options.items()
    ]
    job = start(2, case, json.dumps(runs)).finish(120)
    assert job.status == 0, job.output
    assert "with engine mpi (on CPU ranks one MPI allreduce leaves the core to the computation" in job.output
    assert "with engine horovod (fp16 compression, Adasum and process sets are Horovod's)" in job.output
    for name in options:
        first, *_, last = _epochs(tmp_path / name)
        assert last["validation_elbo"] > first["validation_elbo"], name
        # fp16 finds its loss scale by steps that overflow.
        assert last["skipped_steps"] <= (10 if name == "fp16" else 0), name
    nll = {name: json.loads((tmp_path / name / "summary.json").read_text())["test_nll"] for name in options}
    assert nll["mpi"] == nll["auto"]
    assert nll["mpi"] == pytest.approx(nll["horovod"], rel=1e-4), "engines give the same numbers"
    assert nll["fp16 on the wire"] == pytest.approx(nll["horovod"], rel=1e-2)
    assert nll["fp16 on the wire"] != nll["horovod"]
    assert nll["adasum"] != nll["horovod"]
    rates = {name: _epochs(tmp_path / name)[-1]["lr"] for name in ("mpi", "linear", "sqrt")}
    assert rates == pytest.approx({"mpi": 0.01, "linear": 0.02, "sqrt": 0.01 * 2**0.5})


def test_fewer_bytes_of_two_ranks(start: Start, tmp_path: Path, images: Path) -> None:
    """One launch, a run a codec or strategy: it learns, and says what it sent and left out."""
    case = str(Path(__file__).parent / "several_commands.py")
    base = ["train", "--data", str(images), "--epochs", "3", "--batch-size", "12", "--lr", "0.01", "--hidden", "20"]
    options = {
        "none": ["--engine", "mpi"],
        "horovod": ["--engine", "horovod", "--compression", "fp16"],
        "fp16": ["--compression", "fp16", "--engine", "mpi"],
        "bf16": ["--compression", "bf16"],
        "int8": ["--compression", "int8"],
        "sign": ["--compression", "sign"],
        "topk": ["--compression", "topk", "--compression-share", "0.1"],
        "momentum": ["--compression", "topk", "--compression-momentum", "0.5", "--optimizer", "sgd", "--lr", "0.001"],
        "randomk": ["--compression", "randomk", "--compression-share", "0.1"],
        "powersgd": ["--compression", "powersgd", "--compression-rank", "1"],
        "local-sgd": ["--strategy", "local-sgd", "--sync-every", "4"],
        "adaptive": ["--strategy", "local-sgd", "--sync-every", "4", "--adaptive-sync"],
        "diloco": [
            *("--strategy", "diloco", "--sync-every", "5", "--optimizer", "adamw", "--lr", "0.002"),
            *("--outer-lr", "0.6", "--outer-momentum", "0.5", "--compression", "int8"),
        ],
    }
    runs = [[*base, "--nll-samples", "2", "--out", name, *words] for name, words in options.items()]
    job = start(2, case, json.dumps(runs)).finish(150)
    assert job.status == 0, job.output
    assert "--compression int8 is ours, its messages are carried by MPI" in job.output
    sent = {}
    for name in options:
        first, *_, last = _epochs(tmp_path / name)
        assert last["validation_elbo"] > first["validation_elbo"], name
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        steps = summary["steps"]
        for way in ("sent", "received"):
            assert summary[f"bytes_{way}_per_step"] == pytest.approx(summary[f"bytes_{way}"] / steps)
        assert 0 < last["bytes_sent"] <= summary["bytes_sent"]
        if name not in ("none", "horovod"):
            assert last["compression_error"] == pytest.approx(summary["compression_error"], abs=0.2)
            assert (summary["compression_error"] > 0) == (name not in ("local-sgd", "adaptive"))
        events = EventAccumulator(str(tmp_path / name / "tensorboard"))
        events.Reload()
        told = {name for name in last if name.startswith(("bytes_", "compression_"))}
        assert {f"epoch/{name}" for name in told} <= set(events.Tags()["scalars"])
        sent[name] = summary["bytes_sent_per_step"]
    assert sent["none"] == pytest.approx(2 * sent["horovod"], abs=4)
    # Horovod sends the vector as it lies, with up to 15 zeros of 2 bytes before each of some ten parameters.
    assert 0 <= sent["horovod"] - sent["fp16"] < 10 * 15 * 2
    # Three epochs of 20 steps, each saved before its validation and after it: six times two vectors are averaged whole,
    # what `sign` remembers of gradients, and Adam's beside weights.
    saves = sent["none"] * 6 * 2 / 60
    assert sent["fp16"] == sent["bf16"] > 1.9 * sent["int8"] > 3 * (sent["sign"] - saves) > 0
    assert sent["local-sgd"] == pytest.approx(sent["none"] / 4 + saves, rel=0.02)
    assert sent["diloco"] == pytest.approx(sent["none"] / 5 / 4 + saves, rel=0.1)


def _epochs(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "epoch"]


def test_a_folder_whose_name_is_not_utf_8(command: Command, tmp_path: Path) -> None:
    """As on disks of before: a run is written there, resumed, and opened again."""
    folder = os.fsdecode(b"caf\xe9")
    few = ("--data", "digits", "--hidden", 4, "--latent", 2, "--nll-samples", 2, "--strategy", "local")
    assert command("train", *few, "--epochs", 1, "--out", folder).status == 0
    resumed = command("train", "--epochs", 2, "--resume", "--out", folder)
    assert resumed.status == 0, resumed.output
    for words in (("evaluate", folder, "--samples", 2), ("sample", folder), ("reconstruct", folder)):
        assert command(*words).status == 0
    written = {path.name.partition(".")[0] for path in (tmp_path / folder / "tensorboard").iterdir()}
    assert written == {"events"}
