"""The ways of training that are broken, and how a job of each is launched: on this host, or on two that have a link."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study.namespaces import Network
from hvdvae.cli import mpirun

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = 3
RUN = "--data digits --epochs 60 --batch-size 10 --nll-samples 2 --pictures-every 0 --threads 1 --validate-every 10"
RUN += " --deadline 40 --checkpoint-every 1"


@dataclass(frozen=True)
class Way:
    """A way of training."""

    options: str
    extra: int = 0
    """Ranks that serve."""
    trainers: int = TRAINERS
    survives: bool = True
    """Started with ULFM; else under a supervisor."""

    @property
    def ranks(self) -> int:
        """Of a job."""
        return self.trainers + self.extra


WAYS = {
    "allreduce, mpi": Way("--strategy allreduce --engine mpi"),
    "allreduce, horovod": Way("--strategy allreduce --engine horovod"),
    "allreduce, supervised": Way("--strategy allreduce --engine mpi", survives=False),
    "stages of two copies": Way("--strategy allreduce --engine mpi --mesh dp=2,pp=2", trainers=4),
    "local-sgd, supervised": Way("--strategy local-sgd", survives=False),
    "diloco, supervised": Way("--strategy diloco --optimizer adamw", survives=False),
    "sharded, supervised": Way("--strategy sharded --engine mpi", survives=False),
    "ps": Way("--strategy ps", extra=1),
    "ps, a backup": Way("--strategy ps --replicas 1", extra=2),
}


def command(
    way: Way, folder: Path, *, nan_step: int = 0, resume: bool = False, ranks_have: Mapping[str, str] | None = None
) -> list[str]:
    """The launch of one job. `nan_step`: whose loss is not a number. `ranks_have`: variables of ranks alone."""
    program = _mpirun()
    launch = mpirun.command(program, mpirun.name(program), way.ranks, fault_tolerant=way.survives)
    variables = ["env", *(f"{key}={value}" for key, value in (ranks_have or {}).items())]
    return [*_before(way), *launch, *variables, *_job(way, nan_step), *_out(folder), *(["--resume"] if resume else [])]


def command_on(hosts: Network, way: Way, folder: Path) -> list[str]:
    """The launch of one job whose ranks are dealt over hosts."""
    each = -(-way.ranks // len(hosts.addresses))
    passed = [word for key in ("PYTHONPATH", "OMP_NUM_THREADS") for word in ("-x", key)]
    job = [*passed, *_job(way, 0)]
    launch = hosts.mpirun(_mpirun(), job, each=each, ranks=way.ranks, fault_tolerant=way.survives)
    # Its last word is a line for the shell of the first host; what follows, --resume too, is added to it.
    return [*_before(way), *launch, *_out(folder)]


def _before(way: Way) -> list[str]:
    supervisor = [sys.executable, "-m", "hvdvae", "supervise", "--backoff", "0.5", "--restarts", "1", "--"]
    return [] if way.survives else supervisor


def _job(way: Way, nan_step: int) -> list[str]:
    script = str(ROOT / "benchmarks" / "fault_job.py")
    return [sys.executable, script, str(nan_step), "1", "train", *f"{RUN} {way.options}".split()]


def _out(folder: Path) -> list[str]:
    return ["--out", str(folder / "run")]


def _mpirun() -> str:
    program = mpirun.find()
    if program is None:
        raise SystemExit("no mpirun: `hvdvae doctor` says more")
    return program
