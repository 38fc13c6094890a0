"""A finished or interrupted run, opened again: its configuration, data and trained model."""

from pathlib import Path
from typing import NamedTuple

from hvdvae import checkpoint as checkpoints
from hvdvae.cli import assemble
from hvdvae.cli.config_file import CONFIG_FILE, read_config
from hvdvae.config import TrainConfig
from hvdvae.data import Dataset, Source, check_support
from hvdvae.errors import ConfigError
from hvdvae.resume import load_weights
from hvdvae.vae import VAE
from hvdvae.world import World


class SavedRun(NamedTuple):
    """What evaluation, samples and reconstructions need."""

    config: TrainConfig
    dataset: Dataset
    model: VAE
    checkpoint: str
    """The file that the weights came from."""

    def split(self, name: str) -> Source:
        """A split by name."""
        source: Source = getattr(self.dataset, name)
        return source


def open_run(folder: str, choice: str, world: World, *, data: str | None = None) -> SavedRun:
    """Open the run in `folder` with a checkpoint (best, last or a file). Blocks; every rank must call it.

    Weights are the moving average where the run kept one. Raises ConfigError, DataError or CheckpointError naming the
    file.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"{folder} is no folder: expected the --out of a training run")
    config = read_config(path / CONFIG_FILE)
    dataset = assemble.data(data or config.data, world, validation=None if data else config.validation)
    model = assemble.model(config, dataset.shape, world.device)
    check_support(dataset.test, config.likelihood, assemble.binarization(config))
    file = assemble.checkpoint_file(path, choice)
    found = checkpoints.spread(file if world.is_first else None, world)
    assert found is not None
    load_weights(model, found, ema=True)
    return SavedRun(config, dataset, model, str(file))
