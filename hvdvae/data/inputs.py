"""From stored values to what a model takes: float32, binarized or scaled."""

from collections.abc import Callable
from itertools import islice

import numpy as np
import torch

from hvdvae.data.binarize import EVALUATION_SEED, binarize, binarize_on_device, evaluation_key
from hvdvae.data.read import read
from hvdvae.data.source import Indices, Source, Values


def to_input(values: Values, *, peak: int, binarization: str, key: int, examples: Indices) -> torch.Tensor:
    """Values (B, *shape) as a float32 tensor of that shape; values are not changed.

    0 or 1 where binarized; otherwise uint8 becomes [0, 1] and floats stay as they are. `peak` is the source's; key and
    examples address the noise (see `binarize`).
    """
    if binarization != "none":
        return torch.from_numpy(binarize(values, peak, key, examples).astype(np.float32))
    return torch.from_numpy(np.divide(values, np.float32(peak), dtype=np.float32))


def to_input_on_device(
    values: torch.Tensor, *, peak: int, binarization: str, generator: torch.Generator
) -> torch.Tensor:
    """As `to_input`, for values that are on an accelerator already and drawn with its generator."""
    if binarization != "none":
        return binarize_on_device(values, peak, generator)
    return values.float().div(peak)


def input_limits(source: Source) -> tuple[float, float]:
    """An interval that holds all values as models see them: that of the source for floats, (0, 1) for uint8."""
    return (0.0, 1.0) if source.dtype == np.uint8 else source.limits


def evaluation_batch(
    source: Source,
    start: int,
    stop: int,
    *,
    binarization: str,
    seed: int = EVALUATION_SEED,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Examples start..stop of a validation or test split, float32 (stop - start, *shape) on `device`.

    Dynamic data is binarized once: the same for a seed, however the split is cut into batches and ranks.
    """
    examples = np.arange(start, stop, dtype=np.int64)
    key = evaluation_key(binarization, seed)
    batch = to_input(
        source.gather(examples),
        peak=source.peak,
        binarization=binarization,
        key=key,
        examples=examples,
    )
    return batch.to(device)


def mean_example(
    source: Source,
    *,
    rank: int = 0,
    size: int = 1,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda total: total,
) -> torch.Tensor:
    """Mean of all examples, float32 (*shape), in units of `to_input` without binarization: [0, 1] for uint8.

    Each rank reads its share of the source in chunks; `sum_over_ranks` adds float64 totals in place, the same bits on
    all. Blocks; every rank must call it. Serves to set the output bias of a Bernoulli decoder (Burda et al. 2016).
    """
    total = np.zeros(source.shape, np.float64)
    for span in islice(source.spans(), rank, None, size):
        total += read(source, span).sum(axis=0, dtype=np.float64)
    total = sum_over_ranks(torch.from_numpy(total)).numpy()
    return torch.from_numpy((total / (len(source) * source.peak)).astype(np.float32))
