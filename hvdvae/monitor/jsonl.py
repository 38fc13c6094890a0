"""metrics.jsonl: one JSON object a line, appended and flushed, so that a killed run leaves whole lines."""

import io
import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from hvdvae.monitor.writing import writing
from hvdvae.pulse import Beat, ServedBeat
from hvdvae.regular_file import open_to_append, open_to_read
from hvdvae.whole_file import write_whole

SECONDS_BETWEEN_LINES = 2.0


class JsonLines:
    """Writes `{"kind": "step", ...}` every two seconds and `{"kind": "epoch", ...}` after each epoch."""

    def __init__(self, path: Path, *, first_step: int | None = None) -> None:
        """Open for appending. A run that goes on at `first_step` does so without the lines beyond it.

        Those steps were lost with the process that took them, and come again.
        """
        self._path = path
        with writing(path):
            if first_step is not None:
                _forget(path, first_step)
            file = open_to_append(path)
            if not _ends_whole(file):
                file.write(b"\n")  # After a line that was torn, by a crash of its host.
            self._file = io.TextIOWrapper(file, encoding="utf-8")
        self._last = 0.0

    def on_beat(self, beat: Beat, *, step: int, epoch: float, lr: float) -> None:
        """One line of kind step."""
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        self._write(
            {
                "kind": "step",
                "step": step,
                "epoch": round(epoch, 4),
                "loss": beat.loss,
                "rate": beat.rate,
                "distortion": beat.distortion,
                "lr": lr,
                "examples_per_second": beat.examples / beat.seconds,
                "data_share": beat.data_share,
                "exchange_share": beat.exchange_share,
                "step_seconds": beat.step_seconds,
                **(_served(beat) if isinstance(beat, ServedBeat) else {}),
            }
        )

    def on_epoch(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """One line of kind epoch."""
        self._write({"kind": "epoch", "epoch": epoch, "step": step, **metrics})

    def close(self) -> None:
        """Close the file."""
        with writing(self._path):
            self._file.close()

    def _write(self, record: dict[str, object]) -> None:
        with writing(self._path):
            self._file.write(json.dumps(finite({"time": time.time(), **record}), allow_nan=False) + "\n")
            self._file.flush()


def _forget(path: Path, first_step: int) -> None:
    if not os.path.lexists(path):
        return
    with open_to_read(path) as file:
        lines = file.read().decode("utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _step(line) <= first_step]
    if len(kept) < len(lines):
        write_whole(path, "".join(kept))


def _step(line: str) -> int:
    """That a line tells of; 0 of one that is torn."""
    with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return int(json.loads(line)["step"])
    return 0


def _ends_whole(file: BinaryIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: what is not finite is null, so that every reader takes the line. Pure."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _served(beat: ServedBeat) -> dict[str, object]:
    return {
        "updates_per_second": beat.updates / beat.seconds,
        "staleness_mean": beat.staleness_mean,
        "staleness_max": beat.staleness_max,
        "lags": beat.lags,
        "queue_seconds": beat.queue_seconds,
        "bytes_pushed": beat.bytes_pushed,
        "bytes_pulled": beat.bytes_pulled,
    }
