"""Options of the subcommands other than train. Fields are flags; `folder` is positional."""

from dataclasses import dataclass
from typing import Literal

from hvdvae.config import TrainConfig, flag
from hvdvae.config_check import MOST_THREADS
from hvdvae.errors import ConfigError

DEADLINE = TrainConfig.deadline

_AT_LEAST = {"samples": 1, "count": 1, "threads": 1, "seed": 0, "restarts": 0, "nodes": 1, "ntasks_per_node": 1}
_AT_LEAST |= {"gpus_per_node": 0, "servers": 0, "cpus_per_task": 1, "array": 1, "ranks_per_host": 1}
_DURATIONS = ("deadline", "backoff", "silence", "grace")
_BELOW = {"seed": 2**63}


class Checked:
    """Refuses values that cannot work, before any work."""

    def __post_init__(self) -> None:
        """Raises ConfigError naming the flag."""
        for key, value in vars(self).items():
            if value is not None and key in _AT_LEAST and value < _AT_LEAST[key]:
                raise ConfigError(f"{flag(key)} is {value}, expected at least {_AT_LEAST[key]}")
            if key in _BELOW and value >= _BELOW[key]:
                raise ConfigError(f"--{key} is {value}, expected less than 2**63")
            if key == "threads" and value is not None and value > MOST_THREADS:
                raise ConfigError(f"--threads is {value}, expected at most {MOST_THREADS}")
            if key in _DURATIONS and not 0 < value < float("inf"):
                raise ConfigError(f"--{key} is {value}, expected a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Checked):
    """Test likelihood, rate and distortion, KL per latent dimension and active units of a trained model.

    Runs on all ranks of a launcher; the numbers are the same at every world size. Writes DIR/evaluation.json.
    """

    folder: str
    """--out of a training run."""
    checkpoint: str = "best"
    """best, last, or a file."""
    split: Literal["test", "validation", "train", "all"] | None = None
    """Which examples [test; all of --data, where that is other data and brings no test split]."""
    samples: int = 5000
    """Importance samples an example (k of the IWAE bound)."""
    data: str | None = None
    """Other data than it was trained on."""
    seed: int = 0
    """Seed of the samples."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    deadline: float = DEADLINE
    """Seconds that a rank waits for others before it says for whom, and ends the job."""
    threads: int | None = None
    """CPU threads a rank [the cores this rank has]."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Checked):
    """A grid of images drawn from a trained model's prior, or an array of such examples.

    As the model takes them: bytes of images divided by 255, other numbers as they are.
    """

    folder: str
    """--out of a training run."""
    checkpoint: str = "best"
    """best, last, or a file."""
    count: int = 64
    """Examples."""
    values: Literal["means", "draws"] = "means"
    """Means of p(x|z), or draws of x from it, with the noise that it has."""
    seed: int = 0
    """Seed of the draws."""
    output: str | None = None
    """A file: .png, a picture, or .npy, an array (count, *shape) of float32 [DIR/samples.png]."""
    deadline: float = DEADLINE
    """Seconds that a rank waits for others before it says for whom, and ends the job."""


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions(Checked):
    """A grid of images, each row of them above the row of their reconstructions, or an array of reconstructions.

    As the model gives them, means of p(x|z): bytes of images divided by 255, other numbers as they are.
    """

    folder: str
    """--out of a training run."""
    checkpoint: str = "best"
    """best, last, or a file."""
    count: int = 32
    """Examples, the first ones."""
    split: Literal["test", "validation", "train", "all"] | None = None
    """Which examples [test; all of --data, where that is other data and brings no test split]."""
    data: str | None = None
    """Other data than it was trained on."""
    output: str | None = None
    """A file: .png, a picture, or .npy, an array (count, *shape) of float32 [DIR/reconstructions.png]."""
    deadline: float = DEADLINE
    """Seconds that a rank waits for others before it says for whom, and ends the job."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Check this machine: MPI, Horovod, GPU, launcher, cores, and a real allreduce of two ranks."""


@dataclass(frozen=True, kw_only=True)
class SuperviseOptions(Checked):
    """Run a job, and start it again with --resume where it fails: hvdvae supervise -- mpirun -np 2 hvdvae train ...

    Ends a launcher that hangs. SIGTERM, SIGINT and SIGUSR1 make the job save and leave.
    """

    command: list[str]
    """The command that starts the job, behind `--`; it names its --out, and has done its work once its summary.json is
    there."""
    restarts: int = 3
    """How often it is started again."""
    backoff: float = 10.0
    """Seconds before the first restart; twice as long before each further one."""
    silence: float = 1800.0
    """Seconds without a word after which it is taken to hang."""
    grace: float = 90.0
    """Seconds that it has after a signal, to save and leave."""
    requeue: bool = False
    """Requeue the Slurm job after a SIGUSR1, so that it goes on later, where it has come further."""


@dataclass(frozen=True, kw_only=True)
class SlurmOptions(Checked):
    """Print a batch script for Slurm: hvdvae slurm --nodes 2 --ntasks-per-node 4 -- --data mnist --out DIR > job.sbatch

    It saves two minutes before its time is up, requeues itself, and goes on by itself. Or of a script of your own:
    hvdvae slurm --nodes 2 --partition gpu -- python train.py --out DIR > job.sbatch
    """

    train: list[str]
    """Options of hvdvae train, behind `--`, --out among them; or a command of your own, as python train.py."""
    nodes: int = 1
    """Hosts."""
    ntasks_per_node: int = 1
    """Ranks a host, servers among them. On GPU nodes as many as --gpus-per-node."""
    gpus_per_node: int = 0
    """GPUs a host."""
    cpus_per_task: int = 1
    """Cores a rank."""
    time: str = "01:00:00"
    """Limit of one stretch; the job goes on in the next."""
    partition: str | None = None
    """Partition, or several, as gpu,long [the site's default]."""
    account: str | None = None
    """Account that is charged [the user's default]."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that hosts must have, as a100|h100."""
    memory: str | None = None
    """Memory of a host, as 64G [the site's default]; `hvdvae memory` says what a run needs."""
    modules: str | None = None
    """Environment modules that the job loads first, as "gcc/12 openmpi/5" [none: as they are where it is submitted]."""
    servers: int = 0
    """Parameter servers, on ranks besides those that train; they spread over the hosts."""
    array: int = 1
    """Stretches in a job array, for sites that do not let jobs requeue themselves."""
    launcher: Literal["srun", "mpirun"] = "srun"
    """What starts the ranks in the job."""


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(Checked):
    """What a run needs on each rank and host, and whether it fits here, before anything is started.

    hvdvae memory --ranks 4 -- --model mlp --hidden 8000 8000 --pipeline 2. Status 1 where it does not fit.
    """

    train: list[str]
    """Options of hvdvae train, behind `--`."""
    ranks: int = 1
    """Ranks that would train; --servers of --strategy ps come on top."""
    ranks_per_host: int | None = None
    """Of all ranks, servers among them [all on one host]."""
    host_memory: str | None = None
    """Of a host, as 64G [what is available here: MemAvailable, and limits of control groups, as Slurm sets them]."""
    shape: list[int] | None = None
    """Of an example, as 1 28 28 [that of --data]."""


SUBCOMMANDS: dict[str, tuple[type, str]] = {
    "evaluate": (EvaluateOptions, "test NLL, rate, distortion, active units of a trained model"),
    "sample": (SampleOptions, "images or arrays from the prior"),
    "reconstruct": (ReconstructOptions, "test images above their reconstructions"),
    "supervise": (SuperviseOptions, "start a job again where it fails"),
    "slurm": (SlurmOptions, "print a batch script for Slurm"),
    "memory": (MemoryOptions, "predict what a run needs on each rank"),
    "doctor": (DoctorOptions, "check MPI, Horovod, GPU and cores"),
}
