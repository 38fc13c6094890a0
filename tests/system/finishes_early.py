"""Rank 1 has fewer batches than the others: python finishes_early.py WAY DEADLINE {closes,exits}, ways as below."""

import sys
from typing import Any

import torch
from torch import nn

from hvdvae import DistributedOptimizer, World

WAYS: dict[str, dict[str, Any]] = {
    "horovod": {"engine": "horovod"},
    "adasum": {"engine": "horovod", "reduce_op": "adasum"},
    "shared memory": {"engine": "mpi"},
    "messages": {"engine": "mpi"},
    "compressed": {"compression": "topk"},
    "sharded": {"strategy": "sharded", "engine": "mpi"},
    "zero 2": {"strategy": "sharded", "engine": "mpi", "zero_stage": 2},
    "sharded by horovod": {"strategy": "sharded", "engine": "horovod"},
    "local-sgd": {"strategy": "local-sgd", "sync_every": 2},
    "diloco": {"strategy": "diloco", "sync_every": 2},
}

if __name__ == "__main__":
    way, deadline, end = sys.argv[1:]
    if way == "messages":
        World.shares_memory = lambda self, bytes_each: False  # type: ignore[method-assign]
    world = World.create(device="cpu", deadline=float(deadline))
    model = nn.Linear(3, 2)
    optimizer = DistributedOptimizer(torch.optim.Adam(model.parameters()), model, world=world, **WAYS[way])
    for _ in range(2 if world.rank == 1 else 6):
        optimizer.zero_grad()
        model(torch.full((2, 3), 1.0 + world.rank)).square().mean().backward()
        optimizer.step()
    if end == "closes":
        world.close()
