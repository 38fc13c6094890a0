"""A finished or interrupted run, opened again: its configuration, data and trained model."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from hvdvae import checkpoint as checkpoints
from hvdvae.cli import assemble
from hvdvae.cli.agreement import digest
from hvdvae.cli.config_file import CONFIG_FILE, read_config
from hvdvae.cli.same_function import check_folder
from hvdvae.config import TrainConfig
from hvdvae.data import Dataset, Source, check_support
from hvdvae.errors import ConfigError, DataError
from hvdvae.resume import load_weights
from hvdvae.run_record import check_model
from hvdvae.vae import VAE
from hvdvae.world import World


class SavedModel(NamedTuple):
    """What samples need."""

    config: TrainConfig
    model: VAE
    checkpoint: str
    """The file that the weights came from."""
    data_digest: str | None
    """Of what it was trained on."""
    limits: tuple[float, float]
    """Of the values that it was trained on."""


class SavedRun(NamedTuple):
    """What evaluation and reconstructions need."""

    config: TrainConfig
    dataset: Dataset
    model: VAE
    checkpoint: str
    """The file that the weights came from."""

    is_other_data: bool
    """Whether --data names other data than the run was trained on."""

    def scored(self, split: str | None) -> tuple[str, Source]:
        """A split and its name. None: test; of other data that brings no test split, all of it."""
        name = split or ("all" if self.is_other_data and "test" not in self.dataset.brought else "test")
        source: Source = self.dataset.whole if name == "all" else getattr(self.dataset, name)
        return name, source


def open_model(folder: str, choice: str, world: World) -> SavedModel:
    """Open the model in `folder` with a checkpoint (best, last or a file). Blocks; every rank must call it.

    Weights are the moving average where the run kept one. Raises ConfigError or CheckpointError naming the file.
    """
    path = Path(folder)
    # Rank 0 alone needs to see the folder, as in training.
    seen = _look(path, choice) if world.is_first else None
    values, file = world.gather_objects(seen, "configuration of the run")[0]
    config = TrainConfig(**values)
    found = checkpoints.spread(Path(file) if world.is_first else None, world)
    assert found is not None
    check_model(found)
    saved = found.record["config"]
    check_folder(config, found.record, file, str(path / CONFIG_FILE))
    model = assemble.model(config, tuple(saved["shape"]), world.device)
    load_weights(model, found, ema=True)
    low, high = saved.get("limits", (0.0, 1.0))
    return SavedModel(config, model, file, saved.get("data_digest"), (low, high))


def open_run(folder: str, choice: str, world: World, *, data: str | None = None) -> SavedRun:
    """As `open_model`, with its data, or other data of its shape. Blocks; every rank must call it.

    Raises DataError, too.
    """
    config, model, file, saved, _ = open_model(folder, choice, world)
    # A path is saved absolute.
    is_own = data is None or config.data in (data, os.path.abspath(data))
    dataset = assemble.data(
        data or config.data,
        world,
        validation=config.validation if is_own else None,
        external_storage=config.external_storage and is_own,
    )
    if dataset.shape != model.shape:
        raise DataError(
            f"{f'--data {data}' if data else config.data}: found examples of shape {dataset.shape}, expected "
            f"{model.shape}, as {folder} was trained on: name data of that shape by --data"
        )
    for split in (dataset.train, dataset.validation, dataset.test):
        check_support(split, config.likelihood, assemble.binarization(config, split))
    is_trained_on = saved == digest(dataset.train)
    if data is None and saved is not None and not is_trained_on:
        raise DataError(
            f"{config.data}: found other examples than {folder} was trained on (their digest is not {saved}): name the "
            "data of the run by --data, or other data of its shape"
        )
    return SavedRun(config, dataset, model, file, not (is_own or is_trained_on))


def _look(path: Path, choice: str) -> tuple[dict[str, Any], str]:
    """The configuration's values and the checkpoint's file."""
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder: expected the --out of a training run")
    return asdict(read_config(path / CONFIG_FILE)), str(assemble.checkpoint_file(path, choice))
