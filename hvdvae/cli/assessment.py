"""What a trained model is worth: evaluation over all ranks, and pictures on rank 0."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from hvdvae.config import TrainConfig
from hvdvae.data import Source, evaluation_batch, input_limits
from hvdvae.errors import ConfigError
from hvdvae.monitor.counting import counting
from hvdvae.monitor.tensorboard import TensorBoard
from hvdvae.vae import VAE
from hvdvae.vae.evaluate import evaluate
from hvdvae.vae.evaluation import Evaluation
from hvdvae.vae.generate import reconstruct, sample_images
from hvdvae.vae.pictures import image_grid, legend, pair_grid, save_picture, shades_of
from hvdvae.world import World

_PICTURE_SEED = 20131220  # The same draws in every grid of a run, so that grids show the model change.


def assess(
    model: VAE,
    source: Source,
    world: World,
    *,
    binarization: str,
    samples: int,
    seed: int = 0,
    title: str = "",
) -> Evaluation:
    """Evaluate a split over all ranks; the same numbers at every world size. Blocks; every rank must call it.

    With a `title`, rank 0 shows progress.
    """

    def gather(start: int, stop: int) -> Tensor:
        return evaluation_batch(source, start, stop, binarization=binarization)

    with counting(title if world.is_first else "", sys.stderr) as show:
        return evaluate(
            model,
            gather,
            len(source),
            samples=samples,
            seed=seed,
            rank=world.rank,
            size=world.size,
            gather_objects=world.gather_objects,
            progress=show,
        )


def validation_numbers(config: TrainConfig, found: Evaluation) -> dict[str, float]:
    """What a validation tells, in nats per example; the epoch with the least `loss` is the best. Pure.

    IWAE is judged by its own bound: its ELBO may well fall while the bound rises.
    """
    bound = {"loss": found.nll, "nll": found.nll} if config.objective == "iwae" else {"loss": -found.elbo}
    return {**bound, "elbo": found.elbo, "rate": found.rate, "distortion": found.distortion}


class Pictures:
    """Grids of samples and reconstructions of one run, for TensorBoard and as files."""

    def __init__(self, model: VAE, source: Source, *, binarization: str, count: int = 32) -> None:
        """`source`: the split whose first `count` examples are reconstructed."""
        self._model = model
        self._shades = shades_of(*input_limits(source))
        self._drawn: dict[str, object] = {}
        self._originals = evaluation_batch(source, 0, min(count, len(source)), binarization=binarization)

    def grids(self, samples: int = 64) -> dict[str, object]:
        """`samples` and `reconstructions` as (H, W, C) uint8. Raises ConfigError for data that is no image."""
        device = next(self._model.parameters()).device
        generator = torch.Generator(device).manual_seed(_PICTURE_SEED)
        originals = self._originals.to(device)
        return {
            "samples": image_grid(sample_images(self._model, samples, generator), shades=self._shades),
            "reconstructions": pair_grid(
                originals, reconstruct(self._model, originals, generator), shades=self._shades
            ),
        }

    def draw(self) -> None:
        """Compute both grids; none where the data is no image. Every rank of a model must call it."""
        try:
            self._drawn = self.grids()
        except ConfigError:
            self._drawn = {}

    def to_tensorboard(self, board: TensorBoard, step: int) -> None:
        """Add what was drawn last. Local."""
        for name, grid in self._drawn.items():
            board.images(name, grid, step)  # type: ignore[arg-type]

    @property
    def legend(self) -> str:
        """What black and white mean, where that is not 0 and 1."""
        return legend(self._shades)

    def to_files(self, folder: Path) -> list[Path]:
        """Write samples.png and reconstructions.png, as drawn last. Local. Returns what was written."""
        written = []
        for name, grid in self._drawn.items():
            written.append(folder / f"{name}.png")
            save_picture(written[-1], grid)  # type: ignore[arg-type]
        return written
