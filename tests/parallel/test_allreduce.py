"""Laws 1 and 7: N ranks with batch B each are one process with batch N * B, whatever the optimizer."""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.errors import ConfigError, WorldError
from hvdvae.strategies import DistributedOptimizer
from hvdvae.world import World
from tests.parallel.regression import OPTIMIZERS, examples, loss_of, network, share, weights

STEPS = 6
EVERY = OPTIMIZERS | {"adafactor, which is not elementwise": lambda p: torch.optim.Adafactor(p, 0.05)}


def plain(build: Callable[[Iterable[nn.Parameter]], Optimizer], each_step: Callable[..., None] | None = None) -> Tensor:
    """A plain PyTorch loop on all examples."""
    model = network(seed=100)
    optimizer = build(model.parameters())
    x, y = examples()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        if each_step is not None:
            each_step(step, optimizer, model)
        optimizer.step()
    return weights(model)


def parallel(
    world: World,
    engine: str,
    build: Callable[[Iterable[nn.Parameter]], Optimizer],
    each_step: Callable[..., None] | None = None,
    **options: object,
) -> Tensor:
    """The same, each rank on its own examples, from weights that differ until rank 0's are broadcast."""
    model = network(seed=100 + world.rank)
    optimizer = DistributedOptimizer(build(model.parameters()), model, world=world, engine=engine, **options)
    x, y = (tensor[share(world)] for tensor in examples())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        if each_step is not None:
            each_step(step, optimizer, model)
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("name", EVERY)
def test_equals_one_process_with_the_whole_batch(world: World, engine: str, name: str) -> None:
    torch.testing.assert_close(parallel(world, engine, EVERY[name]), plain(EVERY[name]), atol=2e-6, rtol=2e-5)


def test_ranks_hold_the_same_bits(world: World, engine: str) -> None:
    mine = parallel(world, engine, OPTIMIZERS["adam"])
    everyone = world.gather_bytes(mine.numpy().tobytes())
    assert everyone == [everyone[0]] * world.size


def test_schedules_and_changed_groups_rule(world: World, engine: str) -> None:
    """Law 7: learning rate, weight decay and two groups, changed while it runs, act as in a plain loop."""

    def two_groups(parameters: Iterable[nn.Parameter]) -> Optimizer:
        first, *rest = list(parameters)
        return torch.optim.AdamW([{"params": [first], "lr": 0.2, "weight_decay": 0.3}, {"params": rest}], 0.05)

    def change(step: int, optimizer: Optimizer, model: nn.Module) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.7
        optimizer.param_groups[1]["weight_decay"] = 0.1 * step

    torch.testing.assert_close(
        parallel(world, engine, two_groups, change), plain(two_groups, change), atol=2e-6, rtol=2e-5
    )


def test_torch_scheduler_built_before_or_after_wrapping(world: World, engine: str) -> None:
    results = []
    for before in (True, False):
        model = network(seed=100)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        early = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1) if before else None
        wrapped = DistributedOptimizer(optimizer, model, world=world, engine=engine)
        scheduler = early or torch.optim.lr_scheduler.StepLR(wrapped, 2, 0.1)
        x, y = (tensor[share(world)] for tensor in examples())
        for _ in range(STEPS):
            wrapped.zero_grad()
            loss_of(model, x, y).backward()
            wrapped.step()
            scheduler.step()
        assert wrapped.param_groups[0]["lr"] == pytest.approx(0.5 * 0.1**3)
        results.append(weights(model))
    assert torch.equal(*results)


def test_clipping_is_of_the_mean_gradient(world: World, engine: str) -> None:
    """Law 7, both ways to clip: the option, and the user's own call after synchronize()."""

    def clip_plain(step: int, optimizer: Optimizer, model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)

    def clip_synchronized(step: int, optimizer: Optimizer, model: nn.Module) -> None:
        optimizer.synchronize()  # type: ignore[attr-defined]
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)

    build = OPTIMIZERS["momentum"]
    expected = plain(build, clip_plain)
    assert not torch.allclose(expected, plain(build), atol=1e-3), "the norm must be large enough to be clipped"
    torch.testing.assert_close(parallel(world, engine, build, clip_norm=0.05), expected, atol=2e-6, rtol=2e-4)
    torch.testing.assert_close(parallel(world, engine, build, clip_synchronized), expected, atol=2e-6, rtol=2e-4)


def test_accumulated_gradients_are_averaged(world: World, engine: str) -> None:
    """Two backward passes of half a batch each are one of the whole."""
    model = network(seed=100)
    optimizer = DistributedOptimizer(
        OPTIMIZERS["adam"](model.parameters()), model, world=world, engine=engine, backward_passes_per_step=2
    )
    x, y = (tensor[share(world)] for tensor in examples())
    for _ in range(STEPS):
        optimizer.zero_grad()
        for half in (slice(0, len(x) // 2), slice(len(x) // 2, None)):
            loss_of(model, x[half], y[half]).backward()
        optimizer.step()
    torch.testing.assert_close(weights(model), plain(OPTIMIZERS["adam"]), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_rank_that_is_not_finite_skips_the_step_on_all(world: World, engine: str, where: str) -> None:
    model = network(seed=100)
    optimizer = DistributedOptimizer(OPTIMIZERS["adam"](model.parameters()), model, world=world, engine=engine)
    start = weights(model)
    last = world.size - 1
    for bad in (True, False):
        optimizer.zero_grad()
        loss = loss_of(model, *(tensor[share(world)] for tensor in examples()))
        loss.backward()
        if bad and world.rank == last:
            if where == "gradient":
                next(model.parameters()).grad.view(-1)[3] = float("inf")  # type: ignore[union-attr]
            else:
                loss = loss + float("nan")
        optimizer.watch(loss)
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert torch.equal(weights(model), start) == bad


def test_state_loads_into_plain_torch_and_back(world: World, engine: str) -> None:
    """A run continues alike whether its optimizer's state passed through a plain torch optimizer or not."""
    torch_optimizer = OPTIMIZERS["adam"]

    def steps(model: nn.Module, optimizer: Optimizer, count: int, part: slice) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(model, *(tensor[part] for tensor in examples())).backward()
            optimizer.step()

    model = network(seed=100)
    optimizer = DistributedOptimizer(torch_optimizer(model.parameters()), model, world=world, engine=engine)
    steps(model, optimizer, 3, share(world))
    plain_model = network(seed=1)
    plain_model.load_state_dict(model.state_dict())
    plain_optimizer = torch_optimizer(plain_model.parameters())
    plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(plain_model, plain_optimizer, 2, slice(None))
    # wrapping keeps the state that the plain optimizer has
    wrapped = DistributedOptimizer(plain_optimizer, plain_model, world=world, engine=engine)
    steps(plain_model, wrapped, 2, share(world))
    steps(model, optimizer, 4, share(world))
    torch.testing.assert_close(weights(plain_model), weights(model), atol=2e-6, rtol=2e-5)


def test_parameters_without_gradient_and_outside_the_optimizer(world: World, engine: str) -> None:
    model = network(seed=100)
    model.add_module("unused", nn.Linear(2, 2))
    model.add_module("frozen", nn.Linear(2, 2))
    trained = [p for name, p in model.named_parameters() if not name.startswith("frozen")]
    frozen = model.frozen.weight.clone()  # type: ignore[union-attr, operator]
    unused = model.unused.weight.clone()  # type: ignore[union-attr, operator]
    optimizer = DistributedOptimizer(torch.optim.SGD(trained, 0.1), model, world=world, engine=engine)
    x, y = (tensor[share(world)] for tensor in examples())
    loss = (model[2](model[1](model[0](x))) - y).square().mean()  # type: ignore[index]
    loss.backward()
    optimizer.step()
    assert torch.equal(model.frozen.weight, frozen)  # type: ignore[union-attr]
    assert torch.equal(model.unused.weight, unused)  # type: ignore[union-attr]


def test_ranks_with_other_models_are_refused(world: World, engine: str) -> None:
    if world.size == 1:
        pytest.skip("needs two ranks to differ")
    model = nn.Linear(3, 2 + world.rank)
    with pytest.raises(WorldError, match=r"ranks \[1.*another model than rank 0"):
        DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world, engine=engine)


def test_local_refuses_several_ranks(world: World) -> None:
    model = network(0)
    if world.size == 1:
        DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world, strategy="local")
    else:
        with pytest.raises(ConfigError, match="--strategy allreduce"):
            DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world, strategy="local")
