"""What a run tells: progress on the terminal, TensorBoard, a file of JSON lines. All on rank 0.

A monitor is any object with the three methods of `Monitor`; the trainer calls all of them.
"""

from typing import Protocol

from hvdvae.pulse import Beat


class Monitor(Protocol):
    """Listens to a run. Called on rank 0 only; must not call collectives."""

    def on_beat(self, beat: Beat, *, step: int, epoch: float, lr: float) -> None:
        """A few times a second."""

    def on_epoch(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """After an epoch (1, 2, ...), with means over its examples and the validation's numbers."""

    def close(self) -> None:
        """The run has ended, well or not."""
