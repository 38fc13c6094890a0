"""What is done to the values of a data set before a model sees them: chosen from the data, and said in one sentence."""

import numpy as np

from hvdvae.data.source import LEAST_WHITE, Source
from hvdvae.errors import DataError

EXACT = 2**24
"""Whole numbers below this are exact in float32."""

_DRAWN = {
    "dynamic": "then drawn as 0 or 1 with that probability, anew in every epoch (--binarization none keeps them)",
    "static": "then drawn as 0 or 1 with that probability, once (--binarization none keeps them)",
}


def chosen_binarization(source: Source, likelihood: str, asked: str | None = None) -> str:
    """`asked`, or what stands for it: dynamic for 8-bit images under bernoulli, none for all else.

    Floats are measurements, which nobody turns into zeros and ones unasked.
    """
    if asked is not None:
        return asked
    return "dynamic" if likelihood == "bernoulli" and source.dtype == np.uint8 else "none"


def describe_values(source: Source, *, likelihood: str, binarization: str) -> str:
    """What is stored, its range, and all that is done to it, as one sentence without a full stop.

    `binarization`: as chosen. Reads the source where its range is not known yet.
    """
    low, high = source.limits
    stored = source.stored.name
    if source.dtype == np.uint8 and source.peak == 1:
        steps = [f"{stored}, 0 and 1, as they are"]
    elif source.dtype == np.uint8:
        steps = [f"{stored}, 0 to {high:g}, divided by 255"]
    else:
        steps = [f"{stored}, {low:g} to {high:g}, as they are" + (", in float32" if stored != "float32" else "")]
    if binarization != "none" and not (source.dtype == np.uint8 and source.peak == 1):
        steps.append(_DRAWN[binarization])
    elif likelihood == "bernoulli" and source.dtype != np.uint8 and not _binary(source):
        steps.append("each taken for a probability (--binarization dynamic draws 0 or 1 with it)")
    if likelihood == "discretized-logistic":
        steps.append("scored on a grid of 256 levels from 0 to 1")
    return ", ".join(steps) + "".join(f"; {note}" for note in source.notes)


def check_scale(source: Source) -> None:
    """Refuse bytes that are neither 0 and 1 nor 8-bit images (DataError): divided by 255 they would all but vanish."""
    high = source.limits[1]
    if source.dtype == np.uint8 and not source.white_is_255 and 1 < high < LEAST_WHITE:
        raise DataError(
            f"{source.path}: found uint8 from 0 to {high:g}; divided by 255, as 8-bit images are, these would be 0 to "
            f"{high / 255:.2g}; expected 0 and 1, or images with values from {LEAST_WHITE} to 255, too: save "
            "array.astype(numpy.float32) and choose --likelihood gaussian, or save array / array.max(), in [0, 1]"
        )


def check_exact(source: Source) -> None:
    """Refuse whole numbers that float32 would round (DataError); reads them once in chunks."""
    if source.stored.kind in "iu" and source.dtype == np.float32:
        low, high = source.limits
        if max(-low, high) >= EXACT:
            raise DataError(
                f"{source.path}: found {source.stored.name} from {low:.9g} to {high:.9g}; expected whole numbers below "
                f"2**24 in size, which float32 holds exactly: save them scaled, as float32"
            )


def _binary(source: Source) -> bool:
    return source.stored.kind in "iu" and source.limits[0] >= 0 and source.limits[1] <= 1
