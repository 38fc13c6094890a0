"""Which examples each rank sees in which step: pure functions, which any rank or later run can recompute.

An epoch is one order of all N examples, which depends on neither batch nor size. A step takes the next
batch * size positions of it, rank r the r-th piece of `batch`; so N ranks with batch B see together what one
process sees with batch N * B, and an epoch can go on from any position at another size. The positions that do
not fill a last step are left out, the same number on every rank.
"""

import numpy as np

from hvdvae.data.source import Indices
from hvdvae.errors import DataError
from hvdvae.seeding import stream

QUARTERS = 4
_BASE, _EPOCH = 1, 2  # tell the streams of the fixed and of the epoch's order apart


def epoch_order(seed: int, epoch: int, n: int) -> Indices:
    """The order (n,) of the examples in `epoch` (0, 1, ...): one global permutation, int64.

    What is left out of an epoch is its tail, so tails rotate. The seed divides the examples at random into
    four quarters; epoch e ends with quarter e mod 4 and has quarter e + 2 in its first half, all in new
    random order. A tail is always shorter than n / 2, hence each example is seen in at least one of two
    epochs that lie two apart; and if it is not longer than n // 4, nobody is left out twice in any four
    consecutive epochs.
    """
    base = np.array_split(_generator(_BASE, seed).permutation(n), min(QUARTERS, n))
    rng = _generator(_EPOCH, seed, epoch)
    quarters = [base[(epoch + ahead) % len(base)] for ahead in range(len(base))]
    if len(quarters) < 3:  # one or two examples: no step leaves any out
        return rng.permutation(np.concatenate(quarters))
    last, early = quarters[0], quarters[2]
    others = rng.permutation(np.concatenate([quarters[1], *quarters[3:]]))
    half = n // 2 - len(early)
    first = rng.permutation(np.concatenate([early, others[:half]]))
    return np.concatenate([first, others[half:], rng.permutation(last)])


def local_batch(n: int, batch: int, size: int) -> int:
    """Examples a rank takes in a step: `batch`, or n // size where the data does not fill one global batch.

    Raises DataError if there are fewer examples than ranks.
    """
    if n < size:
        raise DataError(f"found {n} training examples; expected at least one for each of {size} ranks: start fewer")
    return min(batch, n // size)


def steps_left(n: int, batch: int, size: int, start: int = 0) -> int:
    """Whole steps from position `start` (examples seen by all ranks together) to the end of an epoch."""
    return max(0, n - start) // (local_batch(n, batch, size) * size)


def rank_indices(order: Indices, start: int, batch: int, rank: int, size: int) -> Indices:
    """The examples (batch,) of `rank` in the step that begins at position `start`; a view of `order` (n,).

    Raises ValueError if the step does not fit into the epoch.
    """
    if not 0 <= rank < size or not 0 <= start <= len(order) - batch * size:
        raise ValueError(f"no step of {size} x {batch} at {start} of {len(order)} for rank {rank}")
    return order[start + rank * batch : start + (rank + 1) * batch]


def _generator(*parts: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(stream(*parts)))
