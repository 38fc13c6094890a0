"""hvdvae train --tensor and --mesh, as users start them: a model over several ranks is a run like any other."""

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import Command, Launch, Start, clean_environment
from tests.system.worker_jobs import strike

RUN = ("--hidden", "20", "20", "--latent", "5", "--threads", "1", "--nll-samples", "10")


def train(folder: Path, images: Path, ranks: int, *words: str) -> dict[str, Any]:
    launch = ["mpirun", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", "-n", str(ranks), sys.executable]
    command = [*launch, "-m", "hvdvae", "train", "--data", str(images), "--out", "run", *RUN, *words]
    job = Launch(command, clean_environment(), folder).finish(90)
    assert job.status == 0, job.output
    found: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    return found | {"output": job.output}


def test_a_run_goes_on_at_other_meshes_and_is_evaluated_by_one_process(
    command: Command, images: Path, tmp_path: Path
) -> None:
    first = train(tmp_path, images, 4, "--epochs", "2", "--mesh", "dp=2,tp=2", "--engine", "mpi")
    assert first["mesh"] == "dp=2,pp=1,tp=2"
    assert "4 ranks (mesh dp=2,pp=1,tp=2)" in str(first["output"])
    assert "hvdvae: ranks of slice 0: 0, 2; slice 1: 1, 3\n" in str(first["output"])
    for picture in ("samples.png", "reconstructions.png"):
        assert (tmp_path / "run" / picture).exists()
    second = train(tmp_path, images, 2, "--resume", "--epochs", "3", "--mesh", "dp=2,tp=1", "--strategy", "sharded")
    assert "resumed at step" in str(second["output"])
    assert "2 ranks (mesh dp=2,pp=1,tp=1)" in str(second["output"])
    third = train(tmp_path, images, 2, "--resume", "--epochs", "4", "--mesh", "pp=2", "--strategy", "allreduce")
    assert third["epochs"] == 4
    assert "hvdvae: ranks of stage 0: 0; stage 1: 1\n" in str(third["output"])
    stages = third["pipeline"]
    assert (stages["stages"], len(stages["stage_seconds"]), stages["first_steps"][0]) == (2, 2, 0)
    told = re.search(r"stages worked ([\d.]+), ([\d.]+) s .* idle ([\d.]+) .* bubble 0\.20", str(third["output"]))
    assert told, third["output"]
    assert float(told[3]) == pytest.approx(stages["idle"], abs=0.006)
    evaluated = command("evaluate", tmp_path / "run", "--samples", "10")
    assert evaluated.status == 0, evaluated.output
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["nll"] == pytest.approx(third["test_nll"], rel=1e-4)


@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "dp=2,pp=2"])
def test_horovod_averages_the_copies_of_a_split_model(images: Path, tmp_path: Path, mesh: str) -> None:
    pytest.importorskip("horovod.torch")
    words = ("--epochs", "2", "--mesh", mesh, "--engine")
    by_horovod = train(tmp_path, images, 4, *words, "horovod")
    (tmp_path / "mpi").mkdir()
    by_mpi = train(tmp_path / "mpi", images, 4, *words, "mpi")
    assert by_horovod["engine"] == "horovod"
    assert by_horovod["test_nll"] == pytest.approx(by_mpi["test_nll"], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mesh", "dp=2,tp=2"), "--mesh dp=2,tp=2 is of 4 ranks, but 2 train"),
        (("--tensor", "2", "--hidden", "20"), None),
        (("--tensor", "2", "--model", "conv", "--hidden", "4", "--batch-norm"), "found no two layers of one kind"),
    ],
)
def test_what_cannot_be_split_is_said_before_training(
    start: Start, images: Path, words: tuple[str, ...], message: str | None
) -> None:
    given = ("--epochs", "1", "--nll-samples", "2", "--threads", "1")
    job = start(2, "-m", "hvdvae", "train", "--data", str(images), *given, *words).finish(60)
    if message is None:
        assert job.status == 0, job.output
        return
    assert job.status != 0
    assert message in job.output


@pytest.mark.parametrize(
    ("words", "signal_sent", "message"),
    [
        ("--pipeline 2", signal.SIGKILL, r"(?s)rank 1 .*signal 9"),
        ("--pipeline 2", signal.SIGSTOP, r"rank 1 \(stage 1\) does not answer"),
        ("--tensor 2", signal.SIGSTOP, r"rank 1 \(slice 1\) does not answer"),
    ],
)
def test_a_rank_that_dies_or_stops_ends_the_job_by_its_name(
    tmp_path: Path, words: str, signal_sent: signal.Signals, message: str
) -> None:
    """Without ULFM; the first lines say which part it holds."""
    launch = f"mpirun --bind-to none --map-by :OVERSUBSCRIBE -n 2 {sys.executable} -m hvdvae train"
    run = f"--data digits --epochs 500 --batch-size 10 --threads 1 --deadline 4 --pictures-every 0 --out run {words}"
    job = Launch(f"{launch} {run}".split(), clean_environment(), tmp_path)
    ended = strike(job, tmp_path, 1, signal_sent)
    assert ended.status != 0
    assert re.search(message, ended.output), ended.output
    assert f"ranks of {'stage' if 'pipeline' in words else 'slice'} 0: 0; " in ended.output
