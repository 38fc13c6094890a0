"""The checkpoints of one run."""

import os
import re
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from hvdvae.checkpoint.file import opened, save
from hvdvae.checkpoint.pieces import Checkpoint, Draft, Piece
from hvdvae.errors import CheckpointError
from hvdvae.regular_file import temporary, why

_NAME = re.compile(r"step-(\d+)\.safetensors")


class Folder:
    """The last `keep` steps, and the best by validation."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Names only; nothing is read or made."""
        self.folder = folder
        self.keep = keep

    @property
    def best(self) -> Path:
        """Where the best by validation stands, if there is one."""
        return self.folder / "best.safetensors"

    def steps(self) -> list[Path]:
        """Checkpoints by step, newest first."""
        if not self.folder.is_dir():
            return []
        found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found, reverse=True)]

    def save(self, checkpoint: Checkpoint | Draft, *, is_best: bool, keeps_others: bool = False) -> Path:
        """Write `step-N.safetensors`, link it as best if it is, and drop the oldest. One rank's affair, as `save`.

        `keeps_others`: drop none; it is to be dropped itself, or written anew.
        """
        path = self._path(checkpoint.record["step"])
        save(path, checkpoint)
        if is_best:
            self._link(path)
        # The one just written stays whatever its number: a torn one may bear a higher.
        for old in [other for other in self.steps() if other != path][self.keep - 1 :] if not keeps_others else ():
            old.unlink(missing_ok=True)
        for left in self.folder.glob("*.tmp"):  # Of a writer that was killed.
            with suppress(OSError):  # A folder of that name is somebody's.
                left.unlink()
        return path

    def drop(self, step: int) -> None:
        """Delete the checkpoint of this step, if there is one. One rank's affair."""
        self._path(step).unlink(missing_ok=True)

    def newest_good(self) -> Path | None:
        """The newest whole checkpoint, else the best, or None; torn ones are named on stderr and passed over."""
        for path in [*self.steps(), *([self.best] if self.best.exists() else [])]:
            try:
                with opened(path):
                    return path
            except CheckpointError as error:
                sys.stderr.write(f"hvdvae: refused: {error}\n")
        return None

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.safetensors"

    def _link(self, path: Path) -> None:
        draft = temporary(self.best)
        try:
            os.link(path, draft)
        except OSError:  # Some cluster file systems have no hard links.
            with opened(path) as file:
                pieces = {n: Piece(shape, file.dtypes[n], partial(file.read, n)) for n, shape in file.shapes.items()}
                save(draft, Draft(pieces, file.record))
        try:
            draft.replace(self.best)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise CheckpointError(f"cannot write checkpoint {self.best}: {why(error, self.best)}") from error
