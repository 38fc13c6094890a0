"""Whether a run has learned anything, and what to do where it has not: judged by the data's range. Pure."""

import math
from collections.abc import Sequence

import numpy as np

from hvdvae.config import TrainConfig
from hvdvae.data import Source

ABSURD = 1000.0
"""Nats a dimension above which it is asked whether a model does better than a constant."""
NARROWEST = 1 / 256
"""Standard deviation that a learned width does not fall below (vae/likelihoods.py)."""
_USUAL = 10.0
"""Of --likelihood gaussian, which begins at means near 0 and widths near 1: sizes of values that it takes well."""


def values_of(source: Source) -> str:
    """The data's range and dtype in words, as they are stored. Reads floats once, where nobody has."""
    low, high = source.limits
    return f"{source.path} has values from {low:g} to {high:g} ({source.dtype})"


def fits(config: TrainConfig, source: Source) -> str:
    """What the data's range has to do with a loss that is not finite. Reads floats once."""
    size = max(map(abs, source.limits)) / source.peak
    name = f"--likelihood {config.likelihood}" + (f" --sigma {config.sigma:g}" if config.sigma else "")
    if config.likelihood == "gaussian" and size > _USUAL:
        return (
            f"{values_of(source)}, and {name} begins at means near 0: scale the data to about that (less its mean, "
            "divided by its standard deviation)"
        )
    return f"{values_of(source)}, which {name} takes"


def remedy(config: TrainConfig, source: Source) -> str:
    """The same, and what to do besides."""
    return f"{fits(config, source)}; lower --lr, or set --clip-norm"


def constant_nll(config: TrainConfig, source: Source) -> float:
    """Nats of an example under the best model that is one distribution for all dimensions and examples, or more.

    Reads a gaussian's data once.
    """
    dimensions = math.prod(source.shape)
    if config.likelihood != "gaussian":
        return dimensions * math.log(2 if config.likelihood == "bernoulli" else 256)
    mean, square, count = 0.0, 0.0, len(source) * dimensions
    for _, values in source.chunks():
        found = values.astype(np.float64) / source.peak
        mean, square = mean + found.sum() / count, square + np.square(found).sum() / count
    variance = max(square - mean**2, NARROWEST**2)
    width = config.sigma**2 if config.sigma else variance
    return dimensions * 0.5 * (math.log(2 * math.pi * width) + variance / width)


def complaint(
    config: TrainConfig,
    source: Source,
    nll: float | None,
    steps: Sequence[tuple[int, int]] = (),
    *,
    what: str,
    validated: bool = True,
) -> str:
    """Why it is no success, naming the data's range and what to do; empty where something was learned.

    nll: of an example of `source`, nats; None where there was no test. steps: of each rank those of the run, and how
    many of them were skipped. validated: whether some validation gave a finite loss.
    """
    if steps and all(0 < taken <= skipped for taken, skipped in steps):
        return (
            f"{what} has learned nothing: all of its {steps[0][0]} steps were skipped, as a loss or gradient was not "
            f"finite; {remedy(config, source)}"
        )
    if nll is None and not validated:
        return f"{what} gave no finite loss in any validation: it has diverged; {remedy(config, source)}"
    if nll is None:
        return ""
    if not math.isfinite(nll):
        return f"{what} gives no finite likelihood (NLL {nll}): it has diverged; {remedy(config, source)}"
    if nll > ABSURD * math.prod(source.shape) and nll > (constant := constant_nll(config, source)):
        return (
            f"{what} has an NLL of {nll:.4g} nats, where a single distribution for all dimensions has {constant:.4g}: "
            f"it has learned nothing, or has diverged; {remedy(config, source)}"
        )
    return ""
