"""Shards: every element on one server, balanced, and cut where no kernel notices."""

import itertools

import hypothesis.strategies as st
from hypothesis import given

from hvdvae.ps.shards import ALIGNMENT, cut, pieces


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=5).filter(sum), st.integers(1, 6))
def test_shards_are_a_partition_cut_at_multiples_from_their_group(sizes: list[int], servers: int) -> None:
    groups, start = [], 0
    for size in sizes:
        groups.append(slice(start, start + size))
        start += size
    shards = cut(groups, servers)
    assert [shards[0].start, shards[-1].stop] == [0, sum(sizes)]
    assert all(one.stop == other.start for one, other in itertools.pairwise(shards))
    for shard in shards[:-1]:
        group = next(g for g in groups if g.start <= shard.stop < g.stop or g is groups[-1])
        assert (shard.stop - group.start) % ALIGNMENT == 0 or shard.stop == group.start
    largest = max(shard.stop - shard.start for shard in shards)
    assert largest <= sum(sizes) / servers + 2 * ALIGNMENT
    for group_number, group in enumerate(groups):
        parts = [(shard.start, pieces(groups, shard)[group_number]) for shard in shards]
        covered = [(start + part.start, start + part.stop) for start, part in parts if part.start < part.stop]
        assert sum(b - a for a, b in covered) == group.stop - group.start
        assert all(group.start <= a and b <= group.stop for a, b in covered)
