"""Without Horovod and MPI one process trains, and a launcher's ranks are told what to install."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.conftest import Start, clean_environment

BLOCK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


def python_path(folder: Path, *names: str) -> str:
    """A PYTHONPATH under which these modules are not installed."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCK.format(names=set(names)))
    return f"{folder}:{clean_environment()['PYTHONPATH']}"


def test_one_process_needs_neither(tmp_path: Path, images: Path) -> None:
    code = f"""
import hvdvae
from hvdvae.cli import main
for missing in ("horovod", "mpi4py"):
    try:
        __import__(missing)
        raise SystemExit(f"{{missing}} is there")
    except ModuleNotFoundError:
        pass
few = ["--data", {str(images)!r}, "--epochs", "1", "--hidden", "4", "--nll-samples", "2"]
for name, options in (("local", ["--strategy", "local"]), ("default", []), ("auto", ["--engine", "auto"])):
    assert main(["train", "--out", name, *options, *few]) == 0, name
import os
os.environ |= {{"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "1"}}  # srun -n1
assert main(["train", "--out", "task", *few]) == 0
assert main(["evaluate", "local", "--samples", "2"]) == 0
assert main(["sample", "default"]) == 0
"""
    environment = clean_environment(PYTHONPATH=python_path(tmp_path / "block", "horovod", "mpi4py"))
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "default" / "summary.json").exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, ["mpirun with 2 ranks", "mpi4py", "install.sh"]),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, ["srun with 2 ranks", "mpi4py", "install.sh"]),
        (
            {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"},
            ["Horovod cannot be imported", "install.sh"],
        ),
    ],
    ids=["mpirun", "srun", "horovodrun"],
)
def test_a_launchers_rank_is_told_what_to_install(tmp_path: Path, variables: dict[str, str], words: list[str]) -> None:
    environment = clean_environment(PYTHONPATH=python_path(tmp_path / "block", "horovod", "mpi4py"), **variables)
    run = subprocess.run(
        [sys.executable, "-m", "hvdvae", "train", "--out", "run"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    for word in ("hvdvae: error", *words):
        assert word in run.stderr


def test_two_ranks_with_mpi_alone(start: Start, tmp_path: Path, images: Path) -> None:
    """Without Horovod the default engine says which one works, and that one works."""
    path = python_path(tmp_path / "block", "horovod")
    words = ("-m", "hvdvae", "train", "--data", str(images), "--epochs", "1", "--nll-samples", "2", "--out", "run")
    refused = start(2, *words, PYTHONPATH=path).finish(60)
    assert refused.status == 2, refused.output
    assert "Traceback" not in refused.output
    assert refused.output.count("Horovod cannot be imported") == 1
    assert "--engine mpi" in refused.output
    trained = start(2, *words, "--engine", "mpi", PYTHONPATH=path).finish(60)
    assert trained.status == 0, trained.output
    assert (tmp_path / "run" / "summary.json").exists()
