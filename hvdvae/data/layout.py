"""Which arrays are data: their dtypes, their ranks, and where the channels are.

Shapes: N examples, D numbers an example, C channels, H rows, W columns.
"""

from typing import NamedTuple

import numpy as np

from hvdvae.errors import DataError

ACCEPTED = "uint8, bool, other whole numbers, or floats of 16, 32 or 64 bits"


class Layout(NamedTuple):
    """Shape of one example as models see it, (D,) or (C, H, W), and whether it is stored as (H, W, C)."""

    shape: tuple[int, ...]
    channels_last: bool


def checked_layout(shape: tuple[int, ...], path: str) -> Layout:
    """Layout of an array of `shape`: (N, D), (N, H, W), (N, C, H, W) or (N, H, W, C) with C of 1 or 3.

    A four-dimensional array counts as channels last if its last axis is 1 or 3 and its second is not.
    Raises DataError for any other rank and for an array without a single number.
    """
    if len(shape) not in (2, 3, 4):
        raise DataError(
            f"{path}: found an array of rank {len(shape)}, shape {shape}; expected vectors (N, D) or images "
            "(N, H, W), (N, C, H, W) or (N, H, W, C): give the array of examples, not of labels"
        )
    if 0 in shape:
        raise DataError(f"{path}: found an empty array, shape {shape}; expected at least one example")
    if len(shape) == 2:
        return Layout((shape[1],), False)
    if len(shape) == 3:
        return Layout((1, shape[1], shape[2]), False)
    if shape[3] in (1, 3) and shape[1] not in (1, 3):
        return Layout((shape[3], shape[1], shape[2]), True)
    if shape[1] not in (1, 3):
        last = shape[3] in (2, 4)
        advice = f"if the last are transparency, save array[..., :{shape[3] - 1}]" if last else "save images as (N, D)"
        raise DataError(
            f"{path}: found images of {shape[3] if last else shape[1]} channels, shape {shape}; expected (N, C, H, W) "
            f"or (N, H, W, C) with C of 1 or 3: {advice}"
        )
    return Layout(shape[1:], False)


def checked_dtype(dtype: np.dtype, path: str) -> np.dtype:
    """The dtype that `gather` returns for data stored as `dtype`.

    uint8 stays, bool becomes uint8, all other whole numbers and floats of up to 64 bits become float32. Raises
    DataError for every other dtype.
    """
    if dtype.hasobject:
        raise DataError(
            f"{path}: found an array of Python objects; such files can run code when they are read and are "
            f"never unpickled; expected {ACCEPTED}: save a plain numeric array"
        )
    if dtype == np.uint8 or dtype == np.bool_:
        return np.dtype(np.uint8)
    if dtype.kind in "iu" or (dtype.kind == "f" and dtype.itemsize <= 8):
        return np.dtype(np.float32)
    hint = "save real and imaginary parts side by side" if dtype.kind == "c" else "save array.astype(numpy.float32)"
    raise DataError(f"{path}: found dtype {dtype.name}; expected {ACCEPTED}: {hint}")


def converted(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`values` as `dtype`, the same array if they are.

    What float32 cannot hold becomes infinite, to be refused.
    """
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype=dtype)
