"""Progress of the run: a bar on a terminal, a line every few seconds in a log."""

import sys
import time
from typing import Never, TextIO

from tqdm import tqdm

from hvdvae.monitor.counting import clock
from hvdvae.pulse import Beat, ServedBeat

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Examples/s, ELBO, and the time that is left. ELBO here is that of the minibatches, in nats per example."""

    def __init__(self, *, epochs: int, done: float = 0.0, stream: TextIO | None = None) -> None:
        """`done`: epochs, with their fraction, of an earlier run. Writes to `stream` (default stderr).

        Epochs measure it, since a step of an earlier run may have been of another size.
        """
        self._stream = stream or sys.stderr
        self._epochs = epochs
        self._start, self._first = time.monotonic(), done
        self._last_line = self._start
        self._bar: tqdm[Never] | None = None

    def on_beat(self, beat: Beat, *, step: int, epoch: float, lr: float) -> None:
        """Move the bar, or print a line if the last is old."""
        rate = f"{beat.examples / beat.seconds:,.0f} examples/s"
        if isinstance(beat, ServedBeat):
            rate += f", {_staleness(beat)}"
        elbo = f"ELBO {-(beat.rate + beat.distortion):.2f}" if beat.rate or beat.distortion else f"loss {beat.loss:.4g}"
        if self._bar is None and self._stream.isatty():
            self._bar = tqdm(
                total=self._epochs,
                initial=self._first,
                file=self._stream,
                unit="epoch",
                dynamic_ncols=True,
                bar_format="{desc} |{bar}| {percentage:3.0f}% {elapsed}<{remaining}{postfix}",
            )
        if self._bar is not None:
            self._bar.set_description_str(f"epoch {min(int(epoch) + 1, self._epochs)}/{self._epochs}", refresh=False)
            self._bar.set_postfix_str(f"{rate}, {elbo}", refresh=False)
            self._bar.update(epoch - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            seen = epoch - self._first
            left = clock(max(self._epochs - epoch, 0) * (now - self._start) / seen) if seen > 0 else "?"
            self._print(f"epoch {epoch:.2f}/{self._epochs}  {rate}  {elbo}  lr {lr:.3g}  {left} left")

    def on_epoch(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """One line an epoch, above the bar."""
        if self._bar is not None:
            self._bar.update(epoch - self._bar.n)  # Also by the examples that no step of it took.
        names = ("loss", "elbo", "validation_elbo", "validation_loss", "examples_per_second")
        known = {name: metrics[name] for name in names if name in metrics}
        if "elbo" in known:
            known.pop("loss", None)
            known.pop("validation_loss", None)
        text = "  ".join(f"{name.replace('_', ' ')} {value:,.2f}" for name, value in known.items())
        self._print(f"epoch {epoch}/{self._epochs}  {text}")

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()


def _staleness(beat: ServedBeat) -> str:
    lags = "/".join(str(lag) for lag in beat.lags)
    updates = f"{beat.updates / beat.seconds:,.0f} updates/s"
    return f"{updates}, staleness {beat.staleness_mean:.1f} (max {beat.staleness_max}), lag {lags}"
