"""Words that cannot be written cost no training, and no command says that all went well."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.conftest import clean_environment

FEW = "--epochs 2 --hidden 4 --latent 2 --nll-samples 2 --threads 1 --pictures-every 0"


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of a shell, in which $HVDVAE is the command."""
    environment = clean_environment(HVDVAE=f"{sys.executable} -m hvdvae")
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("before", "where", "reason"),
    [
        ("", "> /dev/full", "No space left on device"),
        ("PYTHONUNBUFFERED=1", "> /dev/full", "No space left on device"),
        ("", "| head -n 1", "Broken pipe"),
    ],
)
def test_training_ends_for_nobody_who_does_not_listen(
    tmp_path: Path, images: Path, before: str, where: str, reason: str
) -> None:
    done = shell(f"{before} $HVDVAE train --data {images} --out run {FEW} {where}", tmp_path)
    assert done.returncode == 1
    assert done.stderr.count(f"hvdvae: error: standard output: {reason}") == 1
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "summary.json").exists()
    assert "epoch 2/2" in done.stderr


def test_progress_may_be_lost_too(tmp_path: Path, images: Path) -> None:
    done = shell(f"$HVDVAE train --data {images} --out run {FEW} 2> /dev/full", tmp_path)
    assert done.returncode == 0
    assert "test NLL" in done.stdout


def test_a_closed_output_is_none(tmp_path: Path) -> None:
    assert shell("$HVDVAE train --help >&-", tmp_path).returncode == 0


@pytest.mark.parametrize("words", ["--help", "slurm -- --data digits --out run"])
def test_what_was_to_be_read_is_missed(tmp_path: Path, words: str) -> None:
    done = shell(f"$HVDVAE {words} > /dev/full", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
