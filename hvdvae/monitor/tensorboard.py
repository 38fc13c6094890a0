"""TensorBoard events: curves, the split of time, step times of every rank, grids of images."""

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvdvae.monitor.writing import writing
from hvdvae.pulse import Beat, ServedBeat

SECONDS_BETWEEN_POINTS = 2.0


class TensorBoard:
    """Writes event files into a folder. View them with `tensorboard --logdir DIR`."""

    def __init__(self, folder: Path, *, first_step: int | None = None) -> None:
        """Open a writer. Points beyond `first_step`, where a run goes on, come again: TensorBoard hides them."""
        # Imported here: rank 0 alone needs it.
        from hvdvae.monitor.event_file import EventFile

        self._folder = folder
        with writing(folder):
            self._file = EventFile(folder, None if first_step is None else first_step + 1)
        self._last = 0.0
        self._staleness = np.zeros(1, np.int64)

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

        if isinstance(beat, ServedBeat):
            self._on_served(beat, step)

    def _on_served(self, beat: ServedBeat, step: int) -> None:
        self._points(
            step,
            {
                "servers/updates_per_second": beat.updates / beat.seconds,
                "servers/queue_milliseconds": 1e3 * beat.queue_seconds,
                "servers/bytes_pushed": beat.bytes_pushed,
                "servers/bytes_pulled": beat.bytes_pulled,
                "staleness/mean": beat.staleness_mean,
                "staleness/max": beat.staleness_max,
                **{f"lag/worker_{worker}": lag for worker, lag in enumerate(beat.lags)},
            },
        )
        counts = np.array(beat.staleness) - self._staleness
        self._staleness = np.array(beat.staleness)
        if counts.sum():
            with writing(self._folder):
                self._file.counts("staleness/pushes", step, counts)

    def on_epoch(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Points of the epoch's means and of the validation."""
        self._points(step, {f"epoch/{name}": value for name, value in metrics.items()})
        with writing(self._folder):
            self._file.flush()

    def images(self, name: str, grid: NDArray[np.uint8], step: int) -> None:
        """A grid of images, (H, W, C) uint8."""
        with writing(self._folder):
            self._file.image(name, step, grid)

    def close(self) -> None:
        """Flush and close."""
        with writing(self._folder):
            self._file.close()

    def _points(self, step: int, values: dict[str, float]) -> None:
        with writing(self._folder):
            self._file.numbers(step, values)
            self._file.flush()
