"""Which server holds which slice of the flat vector: contiguous, equal in bytes but for the rounding of cuts.

Cuts lie at multiples of ALIGNMENT elements from the start of their parameter group, so that a vectorized optimizer
kernel treats every element as it would in the uncut vector, to the last bit.
"""

import itertools
from collections.abc import Sequence

ALIGNMENT = 64


def cut(groups: Sequence[slice], servers: int) -> list[slice]:
    """One slice of the vector for each server, in order. `groups`: the slices of the parameter groups, in order."""
    length = groups[-1].stop
    cuts = [_aligned(round(length * part / servers), groups) for part in range(servers)] + [length]
    return [slice(start, stop) for start, stop in itertools.pairwise(cuts)]


def pieces(groups: Sequence[slice], shard: slice) -> list[slice]:
    """The part of each group that lies in a shard, counted from the shard's start; some may be empty."""
    found = []
    for group in groups:
        start = min(max(group.start, shard.start), shard.stop)
        stop = max(start, min(group.stop, shard.stop))
        found.append(slice(start - shard.start, stop - shard.start))
    return found


def _aligned(position: int, groups: Sequence[slice]) -> int:
    group = next(group for group in groups if position < group.stop or group is groups[-1])
    return int(group.start + (position - group.start) // ALIGNMENT * ALIGNMENT)
