"""Law 1 for every strategy: gradients of parts of a batch, accumulated, are those of the whole batch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hvdvae.ps.plan import Plan
from hvdvae.strategies import DistributedOptimizer, Strategy
from hvdvae.world import World
from tests.parallel.regression import OPTIMIZERS, examples, loss_of, network, share, weights
from tests.parallel.test_parameter_server import Smooth, data, served

PLANS: dict[str, dict[str, Any]] = {
    "allreduce, horovod": {"engine": "horovod"},
    "allreduce, mpi": {"engine": "mpi"},
    "adasum, horovod": {"engine": "horovod", "reduce_op": "adasum"},
    "bf16": {"engine": "mpi", "compression": "bf16"},
    "powersgd": {"engine": "mpi", "compression": "powersgd"},
    "sharded": {"engine": "mpi", "strategy": "sharded"},
    "sharded, gradients too": {"engine": "mpi", "strategy": "sharded", "zero_stage": 2},
    "local-sgd": {"strategy": "local-sgd", "sync_every": 2},
    "diloco": {"strategy": "diloco", "sync_every": 2},
}
PARTS, STEPS = 2, 4


def train(optimizer: Strategy, model: torch.nn.Module, x: Tensor, y: Tensor, parts: int) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        for piece in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss_of(model, *piece).backward()
        optimizer.step()


@pytest.mark.parametrize("name", PLANS)
def test_parts_are_the_whole_batch(world: World, name: str) -> None:
    if world.launcher == "horovodrun-gloo" and "horovod" not in name:
        pytest.skip("horovodrun --gloo has no MPI")
    if world.launcher != "none" and "horovod" in name:
        pytest.importorskip("horovod.torch")
    found = []
    for parts in (1, PARTS):
        model = network(seed=100)
        optimizer = DistributedOptimizer(
            OPTIMIZERS["momentum"](model.parameters()),
            model,
            world=world,
            backward_passes_per_step=parts,
            **PLANS[name],
        )
        x, y = (tensor[share(world)] for tensor in examples())
        train(optimizer, model, x, y, parts)
        with optimizer.fetched():
            found.append(weights(model))
    # Rounding to bfloat16 may tip another way.
    near = {"atol": 5e-3, "rtol": 5e-2} if name == "bf16" else {"atol": 2e-6, "rtol": 2e-5}
    torch.testing.assert_close(found[0], found[1], **near)


@pytest.mark.parametrize("consistency", ["bsp", "asp"])
def test_parts_are_the_whole_batch_of_a_worker_of_parameter_servers(world: World, consistency: str) -> None:
    # All but one serve: the order of pushes of several would decide under asp.
    found = []
    for parts in (1, PARTS):
        plan = Plan(consistency=consistency)
        options = {"backward_passes_per_step": parts}
        with served(world, world.size - 1, plan, Smooth, OPTIMIZERS["momentum"], **options) as connected:
            if connected is None:
                continue
            optimizer, model, _ = connected
            train(optimizer, model, *data(), parts)
            optimizer.finish()
            with optimizer.fetched():
                found.append(weights(model))
    if found:
        torch.testing.assert_close(found[0], found[1], atol=2e-6, rtol=2e-5)
