"""A job in which rank 1 fails in the way that the first argument names, while the others wait for it."""

import os
import signal
import sys
import time

import torch

from hvdvae.strategies import DistributedOptimizer
from hvdvae.world import World

way, engine, deadline = sys.argv[1], sys.argv[2], float(sys.argv[3])
if way == "joins late" and os.environ.get("OMPI_COMM_WORLD_RANK") == "1":
    time.sleep(3600)
world = World.create(device="cpu", deadline=deadline)
model = torch.nn.Linear(3, 2)
optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world, engine=engine)
print(f"rank {world.rank} is ready", flush=True)

for step in range(10**6):
    world.watchdog.step = step
    if step == 3 and world.rank == 1:
        if way == "raises":
            raise RuntimeError("the bad example 4711")
        if way == "raises in a thread":
            import threading

            threading.Thread(target=lambda: 1 / 0).start()
            time.sleep(3600)
        if way == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        if way == "calls another operation":
            world.barrier("a barrier that nobody else calls")
        if way == "computes for ever":
            while True:
                time.sleep(0.1)
    optimizer.zero_grad()
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    time.sleep(0.01)
