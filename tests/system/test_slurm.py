"""Batch jobs on a real Slurm of two hosts: sbatch with mpirun and srun, warnings before the end, requeueing, arrays."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvdvae.cli.options import SlurmOptions
from hvdvae.cli.slurm import script
from tests.system.slurm_cluster import Cluster, cluster, missing

SHORT = ("--data", "digits", "--batch-size", "20", "--nll-samples", "2", "--pictures-every", "0")
ROOT = Path(__file__).parents[2]
STUDY = """
title: A study in a batch job
data: digits
train: {model: mlp, hidden: [20], batch_size: 20}
world_sizes: [2]
seeds: [0]
target: {contender: allreduce, epochs: 1}
budget: {epochs: 2, seconds: 60}
contenders:
  allreduce: {strategy: allreduce, engine: mpi}
  ddp: {peer: ddp}
scenarios:
  uniform:
"""
LONG = (*SHORT, "--hidden", "1000", "1000")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    why = missing()
    if why:
        pytest.skip(why)
    # Where every user may go: munge looks at the folders above its socket.
    folder = Path("/tmp/hvdvae-slurm")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        with cluster(folder) as made:
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def batch(slurm: Cluster, name: str, **options: object) -> Path:
    """A batch script for two hosts."""
    values = {"nodes": 2, "ntasks_per_node": 1, **options}
    path = slurm.folder / f"{name}.sbatch"
    path.write_text(script(SlurmOptions(train=[], **values), '"$@"'))  # type: ignore[arg-type]
    return path


def summary(slurm: Cluster, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((slurm.folder / name / "summary.json").read_text())
    return found


@pytest.fixture(autouse=True)
def needs_pmix(request: pytest.FixtureRequest, slurm: Cluster) -> None:
    if "mpirun" not in request.node.name and not slurm.has_pmix():
        pytest.skip("this Slurm has no PMIx: srun cannot start Open MPI's ranks")


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_training_in_step_on_two_hosts(slurm: Cluster, launcher: str) -> None:
    job = slurm.submit("", batch(slurm, launcher, launcher=launcher), *SHORT, "--epochs", 2, "--out", launcher)
    assert slurm.await_end(job) == "COMPLETED", slurm.output(job) + slurm.logs()
    said = slurm.output(job)
    assert "hvdvae1  0      trains" in said
    assert "hvdvae2  1      trains" in said
    assert summary(slurm, launcher)["world_size"] == 2


def test_a_parameter_server_beside_two_workers(slurm: Cluster) -> None:
    path = batch(slurm, "server", ntasks_per_node=2, servers=2, launcher="mpirun")
    job = slurm.submit("", path, *SHORT, "--epochs", 2, "--out", "server")
    assert slurm.await_end(job) == "COMPLETED", slurm.output(job) + slurm.logs()
    said = slurm.output(job)
    for line in (
        "hvdvae1  0      trains",
        "hvdvae1  3      serves",
        "hvdvae2  1      trains",
        "hvdvae2  2      serves",
    ):
        assert line in said
    assert summary(slurm, "server")["servers"] == 2


def test_a_job_that_is_warned_saves_is_requeued_and_goes_on(slurm: Cluster) -> None:
    job = slurm.submit("", batch(slurm, "requeue"), *LONG, "--epochs", 60, "--out", "requeue")
    slurm.await_output(job, "epoch 3/60")
    slurm.run(f"scancel --batch --signal=USR1 {job}")
    slurm.await_output(job, f"requeueing Slurm job {job}")
    slurm.await_output(job, "resumed at step")
    assert "USR1: saved at step" in slurm.output(job)
    # A job that goes before it: Slurm itself asks the ranks to leave, and requeues it.
    slurm.await_output(job, "validation elbo", after="resumed at step")
    urgent = slurm.folder / "urgent.sbatch"
    urgent.write_text("#!/bin/bash\n")
    slurm.submit("--partition=urgent --nodes=2 --exclusive", urgent)
    slurm.await_output(job, "DUE TO PREEMPTION")
    slurm.await_output(job, "resumed at step", after="DUE TO PREEMPTION")
    assert "SIGTERM: saved at step" in slurm.output(job)
    # Who wants it to end for good can have that, too.
    slurm.run(f"scancel {job}")
    assert slurm.await_end(job) == "CANCELLED"


def test_a_job_array_of_stretches_ends_with_the_epochs(slurm: Cluster) -> None:
    path = batch(slurm, "stretches", array=3)
    array = slurm.submit("", path, *LONG, "--epochs", 12, "--out", "stretches")
    slurm.await_output(array, "epoch 3/12")
    # Slurm 22.05 signals the element of an array, and ends with 1.
    slurm.run(f"scancel --batch --signal=USR1 {slurm.id(f'{array}_1')}", check=False)
    slurm.await_output(array, "resumed at step")
    slurm.await_output(array, "test NLL", 150)
    assert summary(slurm, "stretches")["epochs"] == 12
    # The third was not needed any more.
    assert slurm.await_end(f"{array}_3") == "CANCELLED"
    assert slurm.output(array).count("results go to") == 2


def test_the_cells_of_a_study_are_dealt_over_the_jobs_of_an_array(slurm: Cluster) -> None:
    """With srun as its launcher, on both hosts."""
    study = slurm.folder / "study.yaml"
    study.write_text(STUDY)
    flags = f"--chdir={ROOT} --nodes=2 --ntasks-per-node=1 --oversubscribe --array=1-2%1"
    array = slurm.submit(flags, ROOT / "launch/slurm/study.sbatch", study, "--output", slurm.folder / "studied")
    for number in (1, 2):
        assert slurm.await_end(f"{array}_{number}") == "COMPLETED", slurm.output(array) + slurm.logs()
    cells = [json.loads(file.read_text()) for file in (slurm.folder / "studied" / "cells").iterdir()]
    assert {cell["contender"] for cell in cells} == {"allreduce", "ddp"}
    assert not [cell["log"] for cell in cells if cell["failed"]]
    assert "part 2/2 is done: 2 of 2 cells" in slurm.output(array)


def test_a_launcher_of_another_pmi_is_refused(slurm: Cluster) -> None:
    """Each task would be a job of size 1, and all would write to the same folder."""
    command = f"hvdvae train {' '.join(SHORT)} --epochs 1 --out alone"
    said = slurm.run(f"srun --mpi=none -N2 -n2 --export=ALL {command}", check=False)
    assert "the launcher belongs to another MPI" in said
    assert "srun: error" in said
    assert not (slurm.folder / "alone" / "summary.json").exists()


@pytest.mark.parametrize(
    ("flags", "found"), [("-N2 -n2", "2 tasks (SLURM_NTASKS)"), ("-N2", "2 hosts (SLURM_JOB_NUM_NODES)")]
)
def test_a_job_of_several_tasks_or_hosts_without_a_launcher_is_refused(slurm: Cluster, flags: str, found: str) -> None:
    path = slurm.folder / "no-launcher.sbatch"
    path.write_text('#!/bin/bash\nexec hvdvae train "$@"\n')
    job = slurm.submit(flags, path, *SHORT, "--epochs", 1, "--out", "no-launcher")
    assert slurm.await_end(job) == "FAILED"
    assert f"this Slurm job has {found}" in slurm.output(job)
