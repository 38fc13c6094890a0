"""Which launcher started a process, from the variables that each really sets."""

import json

import pytest

from hvdvae.errors import WorldError
from hvdvae.launcher import MARK, Launch, Parent, detect, leave_launch, mark_rank

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


RANK = Parent(rank=5, size=8, local_rank=1, local_size=4, launcher="mpirun")


def inherited(environment: dict[str, str]) -> dict[str, str]:
    """What a child of a rank with this environment finds."""
    found = dict(environment)
    mark_rank(found, RANK)
    mark = json.loads(found[MARK])
    mark["process"] = [mark["process"][0] + 1, mark["process"][1]]  # The rank is another process.
    return {**found, MARK: json.dumps(mark)}


@pytest.mark.parametrize("environment", [OPEN_MPI, HYDRA, SRUN | {"PMIX_RANK": "5"}, OPEN_MPI | SBATCH, GLOO])
def test_a_child_of_a_rank_is_none(environment: dict[str, str]) -> None:
    assert detect(inherited(environment)) == Launch(launcher="none", parent=RANK)


@pytest.mark.parametrize("environment", [OPEN_MPI, HYDRA, SRUN, GLOO])
def test_a_rank_that_has_made_its_world_is_still_one(environment: dict[str, str]) -> None:
    marked = dict(environment)
    mark_rank(marked, RANK)
    assert detect(marked) == detect(environment)


def test_ranks_of_a_launch_that_a_rank_makes_are_ranks() -> None:
    """They inherit the mark, and have a place in another launch."""
    outer = inherited(OPEN_MPI | {"PMIX_NAMESPACE": "outer", "PMIX_RANK": "5"})
    inner = outer | OPEN_MPI | {"PMIX_NAMESPACE": "inner", "PMIX_RANK": "5"}
    assert detect(inner).parent is None
    assert detect(inner).rank == 5
    assert detect(inherited(SRUN) | {"SLURM_STEP_ID": "1"}).launcher == "srun"
    assert detect(inherited(OPEN_MPI) | GLOO).launcher == "horovodrun-gloo"


def test_a_child_leaves_the_launch_and_keeps_what_its_user_set() -> None:
    settings = {
        "OMPI_MCA_btl": "self,tcp",
        "PMIX_MCA_psec": "native",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "HOROVOD_CYCLE_TIME": "1",
        "SLURM_CPUS_PER_TASK": "3",
    }
    for launch in (OPEN_MPI | SBATCH, HYDRA, SRUN, GLOO):
        environment = inherited(launch | settings)
        leave_launch(environment)
        rest = {name: text for name, text in environment.items() if name != MARK}
        left = {name for name in rest if name not in settings}
        assert left <= {"SLURM_JOB_ID", "SLURM_TASKS_PER_NODE"}
        assert rest.items() >= settings.items()
        assert detect(environment) == Launch(launcher="none", parent=RANK), "its children find the rank, too"


def test_others_leave_nothing() -> None:
    for environment in ({}, OPEN_MPI, {**OPEN_MPI, MARK: "no JSON"}, {**OPEN_MPI, MARK: "[]"}):
        before = dict(environment)
        leave_launch(environment)
        assert environment == before
        assert detect(environment).parent is None
