"""What every side of the comparison computes: one model, one objective, one stream of batches.

Batches of a rank are the Loader's, binarized anew in every epoch; all sides see the same ones from the start.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hvdvae.data import ArraySource, Loader, Source, open_dataset
from hvdvae.errors import DataError
from hvdvae.vae import VAE, Elbo, build_model

SEED = 0
LEARNING_RATE = 1e-3
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "mlp": {"hidden": (400,), "latent": (20,)},
    "conv": {"channels": (32, 64), "latent": (20,)},
}


@dataclass(frozen=True)
class Task:
    """One model on one data set."""

    model: str
    """mlp (784-400-20) or conv (32 and 64 channels, 20 latent dimensions), both with relu."""
    source: Source
    batch: int
    """Examples a rank and step."""

    objective = Elbo()

    def network(self) -> VAE:
        """The model, with the same initial weights every time. Seeds torch's default generator."""
        torch.manual_seed(SEED)
        return build_model(self.model, self.source.shape, activation="relu", **SIZES[self.model])  # type: ignore[arg-type]

    def loader(self, rank: int = 0, size: int = 1) -> Loader:
        """The batches of one rank of `size`."""
        return Loader(self.source, batch=self.batch, rank=rank, size=size, seed=SEED)


def endless(loader: Loader) -> Iterator[Tensor]:
    """Batches of one epoch after the other."""
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def open_splits(data: str | None) -> tuple[list[Source], str]:
    """The splits, training images first, and what they are.

    `data`: as in --data, or None for MNIST where it can be had. Blocks; may download. Raises DataError for
    a path that is not data.
    """
    if data == "synthetic":
        return [_synthetic()], SYNTHETIC
    try:
        dataset = open_dataset(data or "mnist")
    except DataError:
        if data is not None:
            raise
        return [_synthetic()], f"{SYNTHETIC}, since MNIST was neither found nor downloaded (name it with --data)"
    description = f"{dataset.name}: {len(dataset.train):,} training images of {dataset.shape}"
    return [dataset.train, dataset.validation, dataset.test], description


SYNTHETIC = "synthetic: 60,000 random images of (1, 28, 28), uint8"


def _synthetic() -> Source:
    pixels = np.random.default_rng(SEED).integers(0, 256, (60_000, 28, 28), np.uint8)
    return ArraySource(pixels, "synthetic images")
