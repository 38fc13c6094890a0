"""pythae's own trainer on its own VAE, with networks of the same sizes, where it is installed.

It is used as its README shows: BaseTrainer with its default Adam. Its images are binarized once, before it
starts, so it is spared what our loader does for every batch.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.side import Run, Side
from benchmarks.task import LEARNING_RATE, Task


def is_installed() -> bool:
    """Whether `import pythae` would find something."""
    return find_spec("pythae") is not None


def _encoder(model: str) -> tuple[nn.Module, int]:
    """The layers below the two heads, and how many units they end in."""
    if model == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU()), 400
    convolutions = [nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*convolutions), 64 * 7 * 7


def _decoder(model: str) -> nn.Module:
    if model == "mlp":
        return nn.Sequential(
            nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784), nn.Sigmoid(), nn.Unflatten(1, (1, 28, 28))
        )
    return nn.Sequential(
        nn.Linear(20, 64 * 7 * 7),
        nn.ReLU(),
        nn.Unflatten(1, (64, 7, 7)),
        nn.ConvTranspose2d(64, 32, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, 2, 1),
        nn.Sigmoid(),
    )


def _vae(model: str) -> Any:
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers, width = _encoder(model)
            self.mean, self.log_covariance = nn.Linear(width, 20), nn.Linear(width, 20)

        def forward(self, x: Tensor) -> Any:
            h = self.layers(x)
            return ModelOutput(embedding=self.mean(h), log_covariance=self.log_covariance(h))

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = _decoder(model)

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.layers(z))

    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=20, reconstruction_loss="bce")
    return VAE(config, encoder=Encoder(), decoder=Decoder())


@contextmanager
def _pythae(task: Task) -> Iterator[Run]:
    # Progress bars of this side are no part of our output, but it does draw them, as it always does.
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        from pythae.data.datasets import BaseDataset
        from pythae.trainers import BaseTrainer, BaseTrainerConfig

        logging.getLogger("pythae").setLevel(logging.ERROR)
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("pythae"):
                logging.getLogger(name).setLevel(logging.ERROR)
        images = torch.from_numpy(_binarized(task))
        labels = torch.zeros(len(images))
        config = BaseTrainerConfig(
            output_dir=folder,
            per_device_train_batch_size=task.batch,
            learning_rate=LEARNING_RATE,
            no_cuda=True,
        )
        trainer = BaseTrainer(_vae(task.model), BaseDataset(images, labels), training_config=config)
        trainer.prepare_training()

        def run(steps: int) -> None:
            # One epoch of its own over as many images as make so many steps.
            done = 0
            while done < steps:
                take = min((steps - done) * task.batch, len(images) // task.batch * task.batch)
                trainer.train_loader = trainer.get_train_dataloader(BaseDataset(images[:take], labels[:take]))
                trainer.train_step(epoch=1)
                done += take // task.batch

        yield run


def _binarized(task: Task) -> np.ndarray[Any, np.dtype[np.float32]]:
    images = task.source.gather(np.arange(len(task.source)))
    return (images > task.source.peak / 2).astype(np.float32)


PYTHAE = Side("pythae", "pythae's BaseTrainer", _pythae)
