"""Sums that are under way: MPI writes to their memory until they are done, whoever has begun them."""

import gc
import weakref

import pytest
import torch

from hvdvae.strategies.bucket_sums import MessageSums
from hvdvae.world import World


def test_what_is_under_way_is_held_when_nobody_waits_for_it(world: World) -> None:
    """As where a loop drops its optimizer after a backward pass without a step."""
    if world.size == 1 or world.launcher == "horovodrun-gloo":
        pytest.skip("needs MPI and two ranks")
    sums = MessageSums(world, 6 * world.size)
    found = sums.start(torch.full((6 * world.size,), world.rank + 1.0), 0, 0)
    kept = weakref.ref(found)
    del found
    gc.collect()
    assert kept() is not None
    world.barrier("all have begun")
    under_way = kept()
    assert under_way is not None
    mine = under_way.result()[6 * world.rank : 6 * (world.rank + 1)]
    assert mine.tolist() == [sum(range(1, world.size + 1))] * 6
    del under_way
    gc.collect()
    assert kept() is None
