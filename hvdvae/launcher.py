"""Who started this process: read from the environment that launchers set, before any MPI is imported.

A rank's own children inherit that environment, and are no ranks. So a rank marks it once it has met the others
(`mark_rank`): who finds another process's mark beside that process's place in the launch is a child. Wrappers between
a launcher and a rank (bash, numactl, a Python that starts the real one) make no World, and leave no mark; ranks of a
launch that a rank makes have a place in that launch, which is another.
"""

import json
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from typing import Literal

from hvdvae.errors import WorldError

Launcher = Literal["none", "mpirun", "srun", "horovodrun-gloo"]


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The rank whose child this process is, as it was when it started the child."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: Launcher


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
    parent: Parent | None = None
    """The rank that started this process, which is therefore none, whatever it inherits."""


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


MARK = "HVDVAE_RANK"
"""Environment variable that a rank leaves to its children: what it is, as JSON."""

_PLACE = (
    "PMIX_NAMESPACE PMIX_RANK OMPI_COMM_WORLD_RANK PMI_RANK PMI_FD PMI_PORT PMI_ID SLURM_JOB_ID SLURM_STEP_ID "
    "SLURM_PROCID HOROVOD_GLOO_RENDEZVOUS_ADDR HOROVOD_GLOO_RENDEZVOUS_PORT "
    f"{JOINS} {ENTERS}"
).split()
"""What tells a process's place in one launch from all others, in this launch and in others."""
_OF_LAUNCHERS = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_LOCAL")
_SITES_OWN = ("OMPI_MCA_", "OMPI_ALLOW_", "PMIX_MCA_", "PMIX_PREFIX", "PRTE_MCA_", "PRTE_PREFIX")
_SETTINGS_OF_RANKS = tuple(
    f"OMPI_MCA_{name}"
    for name in ("orte_", "ess", "pmix", "shmem_RUNTIME", "num_procs", "initial_wdir", "mpi_ft_enable")
)
_OF_HOROVODRUN = {
    f"HOROVOD_{name}"
    for name in (
        *("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "HOSTNAME", "CONTROLLER", "ELASTIC"),
        *("CPU_OPERATIONS", "GLOO_RENDEZVOUS_ADDR", "GLOO_RENDEZVOUS_PORT", "GLOO_IFACE", "SECRET_KEY"),
    )
}
_OF_SRUN = {
    f"SLURM_{name}"
    for name in (
        *("PROCID", "LOCALID", "NODEID", "NTASKS", "NPROCS", "JOB_NUM_NODES", "NNODES"),
        *("STEP_ID", "STEP_NUM_TASKS", "STEP_NUM_NODES", "STEP_TASKS_PER_NODE"),
    )
}


def mark_rank(environ: MutableMapping[str, str], parent: Parent) -> None:
    """Let children of this process, a rank, know that they are its children. Mutates `environ`."""
    environ[MARK] = json.dumps({"process": _this_process(), "place": _place(environ), "rank": asdict(parent)})


def parent_of(environ: Mapping[str, str]) -> Parent | None:
    """The rank that started this process, or one of those that did; None where this process may be a rank. Local."""
    try:
        mark = json.loads(environ[MARK])
        process, place, parent = mark["process"], mark["place"], Parent(**mark["rank"])
    except (KeyError, TypeError, ValueError):
        return None
    return parent if place == _place(environ) and process != _this_process() else None


def leave_launch(environ: MutableMapping[str, str]) -> None:
    """In a rank's child, forget what the launcher said of the rank: MPI and Horovod would take the child for it.

    Mutates `environ`; what users and sites set stays there. Does nothing in other processes.
    """
    if parent_of(environ) is None:
        return
    mark = json.loads(environ[MARK])
    gone = _OF_HOROVODRUN | _OF_SRUN | {JOINS, ENTERS}
    for name in list(environ):
        inherited = name.startswith(_OF_LAUNCHERS) and not name.startswith(_SITES_OWN)
        if name in gone or inherited or name.startswith(_SETTINGS_OF_RANKS):
            del environ[name]
    # The mark stays, and fits the place that is left: also this process's children are of that rank.
    environ[MARK] = json.dumps({**mark, "place": _place(environ)})


def _place(environ: Mapping[str, str]) -> list[str]:
    return [environ.get(name, "") for name in _PLACE]


def _this_process() -> list[int]:
    """Its number and when it began, as numbers come again, and are those of a container."""
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            began = int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        began = 0
    return [os.getpid(), began]


def detect(environ: Mapping[str, str]) -> Launch:
    """Read the launcher's variables. Pure but for this process's number.

    Raises WorldError on a value that is not a number.
    """
    if (parent := parent_of(environ)) is not None:
        return Launch(launcher="none", parent=parent)
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


def rank_variable(environ: Mapping[str, str]) -> str | None:
    """Where the launcher says which rank a process is; None where it does not. Pure."""
    return next((names[0] for _, names in _FAMILIES if names[0] in environ and names[1] in environ), None)


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
