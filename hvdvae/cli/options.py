"""Options of the subcommands other than train. Fields are flags; `folder` is positional."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
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
    threads: int | None = None
    """CPU threads a rank [the cores this rank has]."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """A grid of images drawn from a trained model's prior."""

    folder: str
    """--out of a training run."""
    checkpoint: str = "best"
    """best, last, or a file."""
    count: int = 64
    """Images."""
    seed: int = 0
    """Seed of the draws."""
    output: str | None = None
    """PNG file [DIR/samples.png]."""


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions:
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


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Check this machine: MPI, Horovod, GPU, launcher, cores, and a real allreduce of two ranks."""


SUBCOMMANDS: dict[str, tuple[type, str]] = {
    "evaluate": (EvaluateOptions, "test NLL, rate, distortion, active units of a trained model"),
    "sample": (SampleOptions, "images from the prior"),
    "reconstruct": (ReconstructOptions, "test images beside their reconstructions"),
    "doctor": (DoctorOptions, "check MPI, Horovod, GPU and cores"),
}
