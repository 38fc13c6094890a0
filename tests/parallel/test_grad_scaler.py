"""torch's GradScaler around a strategy: ranks agree on overflows and on the scale, or are told how to."""

import pytest
import torch

from hvdvae.errors import ConfigError
from hvdvae.strategies import DistributedOptimizer
from hvdvae.world import World
from tests.parallel.regression import examples, loss_of, network, share, weights


@pytest.mark.parametrize("strategy", ["allreduce", "sharded"])
@pytest.mark.parametrize("unscale", [True, False])
def test_an_overflow_on_one_rank_is_skipped_on_all(world: World, engine: str, unscale: bool, strategy: str) -> None:
    model, plain = network(seed=100), network(seed=100)
    inner = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = DistributedOptimizer(inner, model, world=world, engine=engine, strategy=strategy)
    reference = torch.optim.SGD(plain.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    everything = examples()
    x, y = (tensor[share(world)] for tensor in everything)
    scales = []
    for step in range(5):
        optimizer.zero_grad()
        bad = step == 2 and world.rank == world.size - 1
        scaler.scale(loss_of(model, x, y) * (float("inf") if bad else 1.0)).backward()
        optimizer.synchronize()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if step != 2:
            reference.zero_grad()
            loss_of(plain, *everything).backward()
            reference.step()
    assert scales == [1024.0, 1024.0, 512.0, 512.0, 512.0]
    assert optimizer.skipped_steps == 1
    torch.testing.assert_close(weights(model), weights(plain), atol=2e-6, rtol=2e-5)


def test_a_scaler_that_would_let_ranks_disagree_is_refused(world: World, engine: str) -> None:
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    model = network(seed=100)
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world, engine=engine)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, *examples())).backward()
    with pytest.raises(ConfigError, match="synchronize"):
        scaler.step(optimizer)


def test_gradients_assigned_after_the_exchange_are_those_that_step(world: World, engine: str) -> None:
    model = network(seed=100)
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), 1.0), model, world=world, engine=engine)
    loss_of(model, *examples()).backward()
    before = weights(model)
    optimizer.synchronize()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(weights(model), before - 1)
