"""launch/mpirun.sh and launch/horovodrun.sh give each launcher the flags that it knows."""

import os
import re
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
    status, words = run(tmp_path, "mpirun.sh", version, "1", "doctor")
    assert status == 0
    assert words == ["-np", "1", *(["--bind-to", "none"] if version != MPICH else []), "hvdvae", "doctor"]


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


@pytest.mark.parametrize(
    "asked",
    ["--gloo", "--gloo --min-np 1", "--min-num-proc=1 --max-np 4", "--host-discovery-script hosts.sh", "--jsrun"],
)
def test_horovodrun_does_not_take_two_controllers(tmp_path: Path, asked: str) -> None:
    status, words = run(tmp_path, "horovodrun.sh", OPEN_MPI_5, "2", "evaluate", "run", HVDVAE_HOROVODRUN_FLAGS=asked)
    assert status == 0
    controller = [] if "--gloo" in asked or "--jsrun" in asked else ["--gloo"]
    assert words == ["-np", "2", *controller, *asked.split(), "hvdvae", "evaluate", "run"]


def test_horovodrun_keeps_its_options_of_mpi_beside_other_flags(tmp_path: Path) -> None:
    flags = "--mpi --network-interfaces lo"
    _, words = run(tmp_path, "horovodrun.sh", OPEN_MPI_5, "2", "doctor", HVDVAE_HOROVODRUN_FLAGS=flags)
    assert words[2:-2] == ["--mpi", "--binding-args=--bind-to none --map-by slot", *flags.split()]


def test_what_the_readme_calls_can_be_called() -> None:
    called = set(re.findall(r"launch/\w+\.sh", (LAUNCH.parent / "README.md").read_text()))
    assert "launch/mpirun.sh" in called
    assert [name for name in sorted(called) if not os.access(LAUNCH.parent / name, os.X_OK)] == []


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh"])
def test_without_a_number_of_ranks_they_say_how_they_are_used(tmp_path: Path, script: str) -> None:
    status, words = run(tmp_path, script, OPEN_MPI_5)
    assert status != 0
    assert not words


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh"])
@pytest.mark.parametrize("ranks", ["0", "two", "3x", "-2", ""])
def test_what_is_no_number_of_ranks_is_refused(tmp_path: Path, script: str, ranks: str) -> None:
    """Open MPI takes it for all that there is room for."""
    status, words = run(tmp_path, script, OPEN_MPI_5, ranks, "train")
    assert status != 0
    assert not words


@pytest.mark.parametrize(("more", "told"), [({}, True), ({"HOSTS": "a:999"}, False), ({"SLURM_JOB_ID": "7"}, False)])
def test_more_ranks_than_cores_take_turns_on_one_host_alone(tmp_path: Path, more: dict[str, str], told: bool) -> None:
    """Where a batch system or a list of hosts says where ranks go, more of them than cores are a mistake."""
    for name, text in {"mpirun": OPEN_MPI_5, "hvdvae": ""}.items():
        (tmp_path / name).write_text(f'#!/bin/bash\n[ "$1" != --version ] || echo "{text}"\nenv\n')
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **more}
    ended = subprocess.run(
        ["bash", str(LAUNCH / "mpirun.sh"), "999", "doctor"], env=env, capture_output=True, text=True, check=True
    )
    assert ("PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe" in ended.stdout) == told
    assert ("999 ranks take turns" in ended.stderr) == told
