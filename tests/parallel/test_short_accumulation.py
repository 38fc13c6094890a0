"""A step after fewer backward passes than `backward_passes_per_step` (the end of an epoch) is of those there were."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvdvae.ps.plan import Plan
from hvdvae.strategies import DistributedOptimizer
from hvdvae.trainer import Trainer
from hvdvae.world import World
from tests.parallel.regression import OPTIMIZERS, examples, loss_of, network, weights
from tests.parallel.test_parameter_server import Smooth, data, served
from tests.rows import Rows

PASSES = 4
WAYS: dict[str, dict[str, Any]] = {
    "allreduce, horovod": {"engine": "horovod"},
    "allreduce, mpi": {"engine": "mpi"},
    "bf16": {"engine": "mpi", "compression": "bf16"},
    "sharded": {"engine": "mpi", "strategy": "sharded"},
    "sharded, gradients too": {"engine": "mpi", "strategy": "sharded", "zero_stage": 2},
    "local-sgd": {"strategy": "local-sgd", "sync_every": 1},
    "adasum, horovod": {"engine": "horovod", "reduce_op": "adasum"},
}
ALONE = ("local-sgd", "adasum, horovod")
"""Where each rank's own gradient is the mean of its own passes."""


def wrapped(world: World, name: str, model: nn.Module, passes: int = PASSES) -> Any:
    if world.launcher == "horovodrun-gloo" and "horovod" not in name:
        pytest.skip("horovodrun --gloo has no MPI")
    if world.launcher != "none" and "horovod" in name:
        pytest.importorskip("horovod.torch")
    plain = OPTIMIZERS["sgd"](model.parameters())
    return DistributedOptimizer(plain, model, world=world, backward_passes_per_step=passes, **WAYS[name])


def micro_batches(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Ten of one example; each rank's are its own."""
    x, y = examples()
    return [(x[place : place + 1], y[place : place + 1]) for place in (range(10) if rank % 2 else range(12, 22))]


@pytest.mark.parametrize("name", WAYS)
def test_the_last_step_of_an_epoch_is_as_large_as_its_passes_are(world: World, name: str) -> None:
    """10 micro-batches by 4: the last step is the mean of 2, not half of it."""
    found = []
    for passes in (PASSES, 1):
        model = network(seed=100)
        optimizer = wrapped(world, name, model, passes)
        mine = micro_batches(world.rank)
        for start in range(0, len(mine), PASSES):
            optimizer.zero_grad()
            part = mine[start : start + PASSES]
            for x, y in part:
                # By hand: the mean of the part's losses.
                (loss_of(model, x, y) / (len(part) if passes == 1 else 1)).backward()
            optimizer.step()
        with optimizer.fetched():
            found.append(weights(model))
    near = {"atol": 5e-3, "rtol": 5e-2} if name == "bf16" else {"atol": 2e-6, "rtol": 2e-5}
    torch.testing.assert_close(*found, **near)


@pytest.mark.parametrize("name", [name for name in WAYS if name not in ALONE])
def test_passes_count_alike_where_ranks_made_different_numbers(world: World, name: str) -> None:
    """Also a rank that had no data left for the step."""
    model, single = network(seed=100), network(seed=100)
    optimizer = wrapped(world, name, model)
    alone = OPTIMIZERS["sgd"](single.parameters())
    # Of the last step the ranks make 3, 0, 3, 0, ... passes.
    for counts in ((4, 4), (3, 0)):
        optimizer.zero_grad()
        for x, y in micro_batches(world.rank)[: counts[world.rank % 2]]:
            loss_of(model, x, y).backward()
        optimizer.step()
        alone.zero_grad()
        ranks = range(world.size)
        losses = [loss_of(single, x, y) for rank in ranks for x, y in micro_batches(rank)[: counts[rank % 2]]]
        torch.stack(losses).mean().backward()
        alone.step()
    near = {"atol": 5e-3, "rtol": 5e-2} if name == "bf16" else {"atol": 2e-6, "rtol": 2e-5}
    torch.testing.assert_close(weights(model), weights(single), **near)


def test_two_losses_of_a_micro_batch_are_one_pass(world: World) -> None:
    """They add up, as without accumulation, where all passes are made."""
    found = []
    for losses in (1, 2):
        model = network(seed=100)
        optimizer = wrapped(world, "allreduce, mpi", model)
        for x, y in micro_batches(world.rank)[:PASSES]:
            for _ in range(losses):
                (loss_of(model, x, y) / losses).backward()
        optimizer.step()
        found.append(weights(model))
    torch.testing.assert_close(*found, atol=2e-6, rtol=2e-5)


def test_workers_of_parameter_servers_divide_by_their_own_passes(world: World) -> None:
    found = []
    for passes in (PASSES, 1):
        with served(
            world, world.size - 1, Plan(), Smooth, OPTIMIZERS["sgd"], backward_passes_per_step=passes
        ) as connected:
            if connected is None:
                continue
            optimizer, model, _ = connected
            x, y = data()
            for _ in range(2):
                (loss_of(model, x[:2], y[:2]) / (1 if passes > 1 else 2)).backward()
                (loss_of(model, x[2:4], y[2:4]) / (1 if passes > 1 else 2)).backward()
                optimizer.step()
                optimizer.zero_grad()
            optimizer.finish()
            with optimizer.fetched():
                found.append(weights(model))
    if found:
        torch.testing.assert_close(*found, atol=2e-6, rtol=2e-5)


def test_the_trainer_weighs_its_micro_batches_itself(world: World) -> None:
    """Batches of 3 examples cut in at most 4: law 1 holds as it did."""
    found = []
    for passes in (PASSES, 1):
        model = network(seed=100)
        optimizer = wrapped(world, "allreduce, mpi", model, passes)
        batches = Rows(torch.cat(examples(), 1), 3, world)
        trainer = Trainer(model, optimizer, lambda net, rows, epoch: loss_of(net, *rows.split([6, 3], 1)), batches)
        trainer.fit(1)
        found.append(weights(model))
    torch.testing.assert_close(*found, atol=2e-6, rtol=2e-5)
