"""launch/mpirun.sh and launch/horovodrun.sh give each launcher the flags that it knows."""

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
OPEN_MPI_5 = "mpirun (Open MPI) 5.0.11"
OPEN_MPI_4 = "mpirun (Open MPI) 4.1.4"
MPICH = "HYDRA build details:\\n    Version: 5.0.2"


def run(folder: Path, script: str, version: str, *words: str, **environment: str) -> tuple[int, list[str]]:
    """How the script ends, and the words that its launcher gets."""
    for name in ("mpirun", "horovodrun", "hvdvae"):
        program = folder / name
        program.write_text(
            f'#!/bin/bash\nif [ "${{1:-}}" = --version ]; then printf "{version}\\n"; exit; fi\nprintf "%s\\n" "$@"\n'
        )
        program.chmod(0o755)
    env = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **environment}
    ended = subprocess.run(
        ["bash", str(LAUNCH / script), *words], env=env, capture_output=True, text=True, check=False, timeout=20
    )
    return ended.returncode, ended.stdout.splitlines()


@pytest.mark.parametrize(
    ("version", "flags"),
    [
        (OPEN_MPI_5, ["--bind-to", "none", "--host", "a:2,b:2", "-x", "OMP_NUM_THREADS"]),
        (OPEN_MPI_4, ["--bind-to", "none", "--host", "a:2,b:2", "-x", "OMP_NUM_THREADS"]),
        (MPICH, ["-hosts", "a:2,b:2"]),
    ],
)
def test_mpirun(tmp_path: Path, version: str, flags: list[str]) -> None:
    more = {"HOSTS": "a:2,b:2", "OMP_NUM_THREADS": "2", "HVDVAE_MPIRUN_FLAGS": "--tag-output -v"}
    status, words = run(tmp_path, "mpirun.sh", version, "4", "train", "--out", "a folder", **more)
    assert status == 0
    supervised = ["supervise", "--restarts", "0", "--", "mpirun"]
    command = [*flags, "--tag-output", "-v", "hvdvae", "train", "--out", "a folder"]
    assert words == [*supervised, "-np", "4", *command]
    status, words = run(tmp_path, "mpirun.sh", version, "2", "doctor")
    assert status == 0
    assert words == ["-np", "2", *(["--bind-to", "none"] if version != MPICH else []), "hvdvae", "doctor"]


@pytest.mark.parametrize(
    ("version", "flags"),
    [
        (OPEN_MPI_5, ["--mpi", "--binding-args=--bind-to none --map-by slot"]),
        (OPEN_MPI_4, ["--mpi", "--binding-args=--bind-to none --map-by slot"]),
        (MPICH, ["--gloo"]),
    ],
)
def test_horovodrun(tmp_path: Path, version: str, flags: list[str]) -> None:
    status, words = run(tmp_path, "horovodrun.sh", version, "4", "train", "--out", "a folder", HOSTS="a:2,b:2")
    assert status == 0
    supervised = ["supervise", "--restarts", "0", "--", "horovodrun"]
    assert words == [*supervised, "-np", "4", *flags, "-H", "a:2,b:2", "hvdvae", "train", "--out", "a folder"]


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh"])
def test_without_a_number_of_ranks_they_say_how_they_are_used(tmp_path: Path, script: str) -> None:
    status, words = run(tmp_path, script, OPEN_MPI_5)
    assert status != 0
    assert not words
