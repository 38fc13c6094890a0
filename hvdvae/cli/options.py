"""Options of the subcommands other than train. Fields are flags; `folder` is positional."""

from dataclasses import dataclass
from typing import Literal

from hvdvae.config import TrainConfig
from hvdvae.errors import ConfigError

DEADLINE = TrainConfig.deadline

_AT_LEAST = {"samples": 1, "count": 1, "threads": 1, "seed": 0}
_BELOW = {"seed": 2**63}


class Checked:
    """Refuses values that cannot work, before any work."""

    def __post_init__(self) -> None:
        """Raises ConfigError naming the flag."""
        for key, value in vars(self).items():
            if value is not None and key in _AT_LEAST and value < _AT_LEAST[key]:
                raise ConfigError(f"--{key} is {value}, expected at least {_AT_LEAST[key]}")
            if key in _BELOW and value >= _BELOW[key]:
                raise ConfigError(f"--{key} is {value}, expected less than 2**63")
            if key == "deadline" and not 0 < value < float("inf"):
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
    split: Literal["test", "validation", "train"] = "test"
    """Which examples."""
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
    """A grid of images drawn from a trained model's prior."""

    folder: str
    """--out of a training run."""
    checkpoint: str = "best"
    """best, last, or a file."""
    count: int = 64
    """Images."""
    seed: int = 0
    """Seed of the draws."""
    data: str | None = None
    """Where the data is now, if it was moved since: its shape is needed."""
    output: str | None = None
    """PNG file [DIR/samples.png]."""
    deadline: float = DEADLINE
    """Seconds that a rank waits for others before it says for whom, and ends the job."""


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions(Checked):
    """A grid of test images, each beside its reconstruction."""

    folder: str
    """--out of a training run."""
    checkpoint: str = "best"
    """best, last, or a file."""
    count: int = 32
    """Images."""
    split: Literal["test", "validation", "train"] = "test"
    """Which examples."""
    data: str | None = None
    """Other data than it was trained on."""
    output: str | None = None
    """PNG file [DIR/reconstructions.png]."""
    deadline: float = DEADLINE
    """Seconds that a rank waits for others before it says for whom, and ends the job."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Check this machine: MPI, Horovod, GPU, launcher, cores, and a real allreduce of two ranks."""


SUBCOMMANDS: dict[str, tuple[type, str]] = {
    "evaluate": (EvaluateOptions, "test NLL, rate, distortion, active units of a trained model"),
    "sample": (SampleOptions, "images from the prior"),
    "reconstruct": (ReconstructOptions, "test images beside their reconstructions"),
    "doctor": (DoctorOptions, "check MPI, Horovod, GPU and cores"),
}
