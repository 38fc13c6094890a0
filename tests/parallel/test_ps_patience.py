"""A worker that evaluates longer than a deadline keeps the others waiting, and does not end the job."""

import time

import pytest
import torch
from torch import nn

from hvdvae.ps.plan import Plan
from hvdvae.strategies import DistributedOptimizer
from hvdvae.world import World

pytest.importorskip("mpi4py")

STEPS = 3


def test_workers_are_patient_with_one_that_evaluates(world: World) -> None:
    """Under bsp they wait for its next push, which may be longer than a deadline away."""
    if world.launcher in ("none", "horovodrun-gloo") or world.size < 3:
        pytest.skip("needs MPI, two workers and a server")
    from hvdvae.ps.serve import serve

    plan = Plan(consistency="bsp")
    joined = World.create(device="cpu", deadline=4, servers=1)
    if joined.role == "server":
        serve(joined, plan)
    else:
        model = nn.Linear(3, 2)
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), 0.1), model, world=joined, strategy="ps", plan=plan
        )

        for step in range(STEPS):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().mean().backward()
            if step == 1 and joined.rank == 0:
                with optimizer.fetched():
                    time.sleep(6)
            optimizer.step()
        optimizer.finish()
        assert optimizer.ledgers[0]["updates"] == STEPS
    joined.close()
