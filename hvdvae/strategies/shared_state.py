"""Optimizers that each rank steps by itself, made one: where strategies save what each rank has of its own."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from hvdvae.world import World


def share_state(world: World, optimizer: Optimizer) -> int:
    """Let every rank's optimizer go on with the mean of all their states, once all have one; returns the bytes summed.

    Blocks; every rank must call it. Mutates the state.
    """
    lacks = torch.tensor([int(not optimizer.state)])
    # A rank that has skipped all of its steps must not leave the others alone in a sum.
    if int(world.max_(lacks, "agreement on the optimizers' states")):
        return 0
    nbytes = 0
    for entries in optimizer.state.values():
        # Sorted: what was loaded from a checkpoint comes in another order on each rank.
        for _, value in sorted(entries.items()):
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1:
                world.sum_(value, "average of the optimizers' states").div_(world.size)
                nbytes += value.nbytes
    return nbytes
