"""Which launcher started a process, from the variables that each really sets."""

import pytest

from hvdvae.errors import WorldError
from hvdvae.launcher import Launch, detect

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_FD": "9", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SBATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}
SRUN = SBATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
# The step in which Slurm runs the daemons of an mpirun: one task a node.
DAEMONS = SBATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
GLOO = {
    "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1",
    "HOROVOD_RANK": "5",
    "HOROVOD_SIZE": "8",
    "HOROVOD_LOCAL_RANK": "1",
    "HOROVOD_LOCAL_SIZE": "4",
}


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        (OPEN_MPI, "mpirun"),
        (HYDRA, "mpirun"),
        (SRUN | {"PMIX_RANK": "5"}, "srun"),
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}, "srun"),
        (OPEN_MPI | SBATCH, "mpirun"),
        (OPEN_MPI | DAEMONS, "mpirun"),
        (HYDRA | SBATCH, "mpirun"),
        (HYDRA | DAEMONS, "mpirun"),
        (GLOO, "horovodrun-gloo"),
        (GLOO | SBATCH, "horovodrun-gloo"),
        (GLOO | DAEMONS, "horovodrun-gloo"),
    ],
    ids=[
        "mpirun of Open MPI",
        "mpirun of MPICH",
        "srun --mpi=pmix",
        "srun --mpi=pmi2",
        "mpirun of Open MPI in sbatch",
        "mpirun of Open MPI over srun's daemons",
        "mpirun of MPICH in sbatch",
        "mpirun of MPICH over srun's daemons",
        "horovodrun --gloo",
        "horovodrun --gloo in sbatch",
        "horovodrun --gloo within a step",
    ],
)
def test_each_launcher_is_known_by_its_variables(environment: dict[str, str], launcher: str) -> None:
    found = detect(environment)
    assert found == Launch(launcher=launcher, rank=5, size=8, local_rank=1, local_size=4)  # type: ignore[arg-type]


def test_no_launcher_and_sbatch_without_srun_are_one_process() -> None:
    alone = Launch(launcher="none", rank=0, size=1, local_rank=0, local_size=1)
    for environment in ({}, SBATCH, {"PATH": "/bin", "OMPI_MCA_btl": "self"}, {"PMIX_RANK": "0"}):
        assert detect(environment) == alone


def test_tasks_of_unequal_nodes_are_read() -> None:
    assert detect(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),2"}).local_size == 3
    assert detect(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "5,3"}).local_size == 5


@pytest.mark.parametrize(
    ("environment", "name"),
    [(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), (HYDRA, "PMI_RANK"), (SRUN, "SLURM_LOCALID"), (GLOO, "HOROVOD_RANK")],
)
def test_a_bad_number_is_refused_by_name(environment: dict[str, str], name: str) -> None:
    for text in ("many", ""):
        with pytest.raises(WorldError, match=f"{name} is '{text}', expected a number"):
            detect(environment | {name: text})


def test_missing_local_numbers_are_those_of_one_process() -> None:
    found = detect({"PMI_RANK": "1", "PMI_SIZE": "2"})
    assert (found.rank, found.size, found.local_rank, found.local_size) == (1, 2, 0, 1)


def test_a_process_that_a_running_job_started_is_the_rank_whose_place_it_takes() -> None:
    spawned = {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "HVDVAE_JOINS": "2/3"}
    assert detect(spawned) == Launch(launcher="mpirun", rank=2, size=3, local_rank=2, local_size=3, joins=True)
