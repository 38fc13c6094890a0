"""Who started this process: read from the environment that launchers set, before any MPI is imported."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hvdvae.errors import WorldError

Launcher = Literal["none", "mpirun", "srun", "horovodrun-gloo"]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the launcher says of this process. Counts are of processes."""

    launcher: Launcher
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    joins: bool = False
    """Whether a server of a running job started this process, to take the place of a trainer that died."""
    enters: bool = False
    """Whether ranks in step did, which wait for it."""


JOINS = "HVDVAE_JOINS"
"""Environment variable of such a process: its rank among trainers, a stroke, their number."""

ENTERS = "HVDVAE_ENTERS"
"""Environment variable of processes that ranks in step have started in the place of dead ones: their number."""

# Rank, size, local rank, local size; the first family whose first two are set wins. Open MPI and MPICH stand before
# Slurm because mpirun inside sbatch hands Slurm's variables of its own daemons on to the ranks.
_FAMILIES: tuple[tuple[Launcher, tuple[str, str, str, str]], ...] = (
    (
        "mpirun",
        (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ),
    ),
    ("mpirun", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
    ("srun", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")),
)


def detect(environ: Mapping[str, str]) -> Launch:
    """Read the launcher's variables. Pure; raises WorldError on a value that is not a number."""
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in environ:
        return _read(
            "horovodrun-gloo",
            ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
            environ,
        )
    if JOINS in environ:
        rank, size = (int(number) for number in environ[JOINS].split("/"))
        # Its place on its host is not known; trainers come first, so that on one host it is its rank.
        return Launch(launcher="mpirun", rank=rank, size=size, local_rank=rank, local_size=size, joins=True)
    if ENTERS in environ:
        # Its rank is only known once it has met the others; it is not the first.
        return Launch(launcher="mpirun", rank=1, size=2, enters=True)
    for launcher, names in _FAMILIES:
        # PMI_* beside SLURM_* are srun's own (pmi2), unless MPICH's mpirun, whose daemons run in a step, set them.
        if names[0] == "PMI_RANK" and "SLURM_STEP_ID" in environ and names[2] not in environ:
            continue
        if names[0] in environ and names[1] in environ:
            return _read(launcher, names, environ)
    return Launch(launcher="none")


def survives_deaths(environ: Mapping[str, str]) -> bool:
    """Whether MPI lets the others go on when a rank dies (mpirun --with-ft ulfm). Pure."""
    return environ.get("OMPI_MCA_mpi_ft_enable") == "1"


def is_elastic(environ: Mapping[str, str]) -> bool:
    """Whether horovodrun replaces ranks that die, and starts more where hosts are added (--min-np). Pure."""
    return environ.get("HOROVOD_ELASTIC") == "1"


def _read(launcher: Launcher, names: tuple[str, str, str, str], environ: Mapping[str, str]) -> Launch:
    rank, size, local_rank, local_size = (_number(name, environ) for name in names)
    return Launch(launcher=launcher, rank=rank, size=max(size, 1), local_rank=local_rank, local_size=max(local_size, 1))


def _number(name: str, environ: Mapping[str, str]) -> int:
    text = environ.get(name, "0")
    # Slurm writes tasks a node as "2(x3),1": the first number is right for equal nodes and only informs.
    head = text.split(",")[0].split("(")[0]
    try:
        return int(head)
    except ValueError:
        raise WorldError(
            f"environment variable {name} is {text!r}, expected a number: unset it, or start the job with "
            "mpirun, srun or horovodrun, which set it"
        ) from None
