"""What `hvdvae sample` and `hvdvae reconstruct` write: a picture to look at, or an array to compute with."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hvdvae.errors import ConfigError, NonFiniteError
from hvdvae.regular_file import open_new, temporary, why
from hvdvae.vae.pictures import Picture, save_picture

SUFFIXES = (".png", ".npy")


def check_suffix(output: str | None) -> None:
    """Refuse --output whose name does not say what it is to be. Pure. Raises ConfigError."""
    if output is not None and Path(output).suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"--output {output}: expected a name that ends in .png for a picture, or in .npy for an array of the values"
        )


def write_result(path: Path, values: Tensor, picture: Callable[[], Picture], *, what: str) -> str:
    """Write `values` (N, *shape) as they are, or the picture of them, as the name's suffix says. Local.

    Returns a line that says what was written. Raises ConfigError where the file cannot be written, or where the values
    are no pictures; NonFiniteError where one is not finite.
    """
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            f"the model gives {what} that are not finite: it has diverged; nothing is written to {path}"
        )
    if path.suffix.lower() == ".npy":
        array = values.detach().float().cpu().numpy()
        _save_array(path, array)
        return f"{path}: {len(array)} {what}, {array.dtype} {array.shape}, from {array.min():g} to {array.max():g}"
    try:
        save_picture(path, picture())
    except ConfigError as error:
        if not str(error).startswith("pictures:"):
            raise
        raise ConfigError(f"{error}; --output FILE.npy writes the values as an array") from error
    return f"{path}: {len(values)} {what}"


def _save_array(path: Path, array: np.ndarray) -> None:
    draft = temporary(path)
    try:
        with open_new(draft) as file:
            np.save(file, array)
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise ConfigError(f"cannot write {path}: {why(error, path)}") from error
