"""A folder in which a run of the trainer is kept: what it saves, and what it tells."""

from pathlib import Path

from hvdvae.checkpoint import Folder
from hvdvae.monitor import Monitor

KEPT = 3
"""Checkpoints, besides the best."""


class RunFolder:
    """checkpoints/ (the last three and the best by validation), metrics.jsonl and tensorboard/."""

    def __init__(self, folder: Path) -> None:
        """Names only; nothing is read or made."""
        self.folder = folder
        self.checkpoints = Folder(folder / "checkpoints", KEPT)

    def monitors(self, *, epochs: int, done: float, step: int) -> list[Monitor]:
        """Progress on the terminal, lines of JSON and TensorBoard, of a run of so many epochs that stands at `step`.

        Makes the folder. Rank 0's affair.
        """
        from hvdvae.monitor.jsonl import JsonLines
        from hvdvae.monitor.progress import Progress
        from hvdvae.monitor.tensorboard import TensorBoard

        self.folder.mkdir(parents=True, exist_ok=True)
        return [
            Progress(epochs=epochs, done=done),
            JsonLines(self.folder / "metrics.jsonl", first_step=step),
            TensorBoard(self.folder / "tensorboard", first_step=step),
        ]
