"""A file of TensorBoard's events, written in the thread that has them.

TensorBoard's own writer opens by name, through links too, in another thread, whose tracebacks of a full disk stand
below our line; and takes no path that is not UTF-8.
"""

import io
import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from hvdvae.regular_file import open_new

_COLORS = {1: 1, 3: 3}
"""TensorBoard's number of what has so many channels: gray, RGB."""


class EventFile:
    """A new file in a folder, which is made. All methods are local and raise OSError."""

    def __init__(self, folder: Path, first_step: int | None) -> None:
        """Points from `first_step` on that stand in earlier files are hidden: they come again."""
        folder.mkdir(parents=True, exist_ok=True)
        seconds, rest = divmod(time.time_ns(), 10**9)
        # Read in the order of names; the last part cannot be known before, by somebody who would put a link there.
        place = f"{seconds:010d}.{rest:09d}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(6)}"
        self._records = RecordWriter(open_new(folder / f"events.out.tfevents.{place}"))
        self._write(None, file_version="brain.Event:2")
        if first_step is not None:
            self._write(first_step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each curve."""
        for name, value in values.items():
            self._write(step, summary=Summary(value=[Summary.Value(tag=name, simple_value=float(value))]))

    def counts(self, name: str, step: int, counts: NDArray[np.int64]) -> None:
        """A histogram of whole numbers: how often 0, 1, 2, ... came; at least one did."""
        places = np.arange(len(counts))
        seen = places[counts > 0]
        histogram = HistogramProto(
            min=float(seen[0]),
            max=float(seen[-1]),
            num=float(counts.sum()),
            sum=float(counts @ places),
            sum_squares=float(counts @ places**2),
            bucket_limit=(places + 0.5).tolist(),
            bucket=counts.tolist(),
        )
        self._write(step, summary=Summary(value=[Summary.Value(tag=name, histo=histogram)]))

    def image(self, name: str, step: int, pixels: NDArray[np.uint8]) -> None:
        """One, (H, W, 1 or 3)."""
        height, width, channels = pixels.shape
        png = io.BytesIO()
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(png, format="PNG")
        colors = _COLORS[channels]
        shown = Summary.Image(height=height, width=width, colorspace=colors, encoded_image_string=png.getvalue())
        self._write(step, summary=Summary(value=[Summary.Value(tag=name, image=shown)]))

    def flush(self) -> None:
        """What was written can be read."""
        self._records.flush()

    def close(self) -> None:
        """Flush and close."""
        self._records.close()

    def _write(self, step: int | None, **what: Any) -> None:
        self._records.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())
