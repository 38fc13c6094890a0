"""TensorBoard events: curves, the split of time, step times of every rank, grids of images."""

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from hvdvae.monitor.writing import writing
from hvdvae.pulse import Beat

SECONDS_BETWEEN_POINTS = 2.0


class TensorBoard:
    """Writes event files into a folder. View them with `tensorboard --logdir DIR`."""

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        """Open a writer; points of an earlier run at or after `first_step` are hidden by TensorBoard."""
        self._folder = folder
        with writing(folder):
            self._writer = SummaryWriter(str(folder), purge_step=first_step or None)
        self._last = 0.0

    def on_beat(self, beat: Beat, *, step: int, epoch: float, lr: float) -> None:
        """Points of the training curves, every two seconds."""
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_POINTS:
            return
        self._last = now
        self._points(
            step,
            {
                "train/loss": beat.loss,
                "train/rate": beat.rate,
                "train/distortion": beat.distortion,
                "train/learning_rate": lr,
                "speed/examples_per_second": beat.examples / beat.seconds,
                "time/data": beat.data_share,
                "time/communication": beat.exchange_share,
                "time/compute": 1 - beat.data_share - beat.exchange_share,
                **{f"step_seconds/rank_{rank}": value for rank, value in enumerate(beat.step_seconds)},
            },
        )

    def on_epoch(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Points of the epoch's means and of the validation."""
        self._points(step, {f"epoch/{name}": value for name, value in metrics.items()})
        with writing(self._folder):
            self._writer.flush()

    def images(self, name: str, grid: NDArray[np.uint8], step: int) -> None:
        """A grid of images, (H, W, C) uint8."""
        with writing(self._folder):
            self._writer.add_image(name, grid, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        with writing(self._folder):
            self._writer.close()

    def _points(self, step: int, values: dict[str, float]) -> None:
        with writing(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
