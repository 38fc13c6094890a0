"""What is refused before training.

NaN, ranks of arrays and torn files are refused earlier, by `open_dataset`.
"""

import math

from hvdvae.config import LIKELIHOODS
from hvdvae.data.dataset import Dataset
from hvdvae.data.source import LEAST_WHITE, Source
from hvdvae.data.values import check_scale
from hvdvae.errors import ConfigError, DataError

BINARIZATIONS = ("dynamic", "static", "none")


def check_dataset(dataset: Dataset, *, likelihood: str, binarization: str, batch: int, size: int) -> None:
    """Refuse a data set that `size` ranks with `batch` examples each cannot train on with this likelihood.

    Every rank may call it and comes to the same end. Raises DataError naming the file, ConfigError naming
    the flag.
    """
    for source in (dataset.train, dataset.validation, dataset.test):
        check_support(source, likelihood, binarization)
    check_size(dataset.train, size, batch)


def check_choice(likelihood: str, binarization: str) -> None:
    """Refuse unknown names, and binarization under a likelihood of continuous values (ConfigError)."""
    if likelihood not in LIKELIHOODS:
        raise ConfigError(f"--likelihood: found {likelihood!r}; expected one of {', '.join(LIKELIHOODS)}")
    if binarization not in BINARIZATIONS:
        raise ConfigError(f"--binarization: found {binarization!r}; expected one of {', '.join(BINARIZATIONS)}")
    if binarization != "none" and likelihood != "bernoulli":
        raise ConfigError(
            f"--binarization: found {binarization!r} with --likelihood {likelihood}, a density that grows "
            "without bound on binary data; expected --binarization none, or --likelihood bernoulli"
        )


def check_support(source: Source, likelihood: str, binarization: str) -> None:
    """Refuse values outside the likelihood's support (DataError).

    gaussian takes all, the others values in [0, 1] and 8-bit images. All are searched once in chunks, if they
    have not been. Calls `check_choice` and `check_scale` first.
    """
    check_choice(likelihood, binarization)
    check_scale(source)
    low, high = source.limits
    if source.dtype.kind == "f" and likelihood != "gaussian" and not (low >= 0 and high <= 1):
        images = source.stored.kind in "iu" and low >= 0 and LEAST_WHITE <= high <= 255
        hint = "save array.astype(numpy.uint8), if these are 8-bit images," if images else "rescale the data,"
        raise DataError(
            f"{source.path}: found {source.stored.name} from {low:g} to {high:g}; expected values in [0, 1], or 8-bit "
            f"images as uint8, for --likelihood {likelihood}: {hint} or choose --likelihood gaussian"
        )


def check_size(source: Source, size: int, batch: int) -> None:
    """Refuse fewer examples than `size` ranks (DataError), and an empty batch (ConfigError)."""
    if batch < 1:
        raise ConfigError(f"--batch-size: found {batch}; expected at least 1 example a rank")
    if len(source) < size:
        raise DataError(
            f"{source.path}: found {len(source)} training examples; expected at least one for each of the "
            f"{size} ranks: start fewer ranks"
        )


def check_finite(source: Source) -> None:
    """Refuse a NaN or an infinity in floats (DataError naming the example); reads them once in chunks."""
    if source.dtype.kind == "f" and not all(map(math.isfinite, source.limits)):
        raise DataError(f"{source.path}: found values from {source.limits}; expected finite values")


def check_same_form(splits: dict[str, Source]) -> None:
    """Refuse splits whose examples differ from train's in shape or dtype (DataError)."""
    train = splits["train"]
    for split, source in splits.items():
        if (source.shape, source.dtype) != (train.shape, train.dtype):
            raise DataError(
                f"{source.path}: found {split} examples of shape {source.shape}, {source.dtype}; expected "
                f"{train.shape}, {train.dtype} as in {train.path}: convert one of them"
            )
