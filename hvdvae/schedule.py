"""The learning rate as a pure function of the epoch, so that resuming, also at another world size, needs no state."""

import math
from collections.abc import Callable
from typing import Literal

Schedule = Callable[[float], float]
"""Epochs done (fractional) -> factor of the base learning rate."""


def learning_rate(
    kind: Literal["constant", "cosine", "step"],
    *,
    epochs: float,
    warmup: float,
    step_epochs: float,
    gamma: float,
) -> Schedule:
    """A linear warm-up over `warmup` epochs, then constant, a half cosine to 0 at `epochs`, or drops.

    Warm-up and cosine as in Goyal et al. 2017 and Loshchilov & Hutter 2017. All times in epochs.
    """

    def factor(epoch: float) -> float:
        if epoch < warmup:
            return epoch / warmup
        if kind == "cosine":
            done = min((epoch - warmup) / max(epochs - warmup, 1e-12), 1.0)
            return 0.5 * (1 + math.cos(math.pi * done))
        if kind == "step":
            return float(gamma ** math.floor((epoch - warmup) / step_epochs))
        return 1.0

    return factor


def world_scale(kind: Literal["none", "linear", "sqrt"], size: int) -> float:
    """Factor of the learning rate for `size` ranks (linear: Goyal et al. 2017; sqrt: Krizhevsky 2014)."""
    return {"none": 1.0, "linear": float(size), "sqrt": math.sqrt(size)}[kind]
