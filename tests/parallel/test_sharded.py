"""Law 4: an optimizer that is split over the ranks is the whole one, and each rank has its share of the state."""

import copy

import pytest
import torch
from torch import nn

from hvdvae.errors import ConfigError
from hvdvae.strategies import DistributedOptimizer
from hvdvae.strategies.sharded import Sharded
from hvdvae.world import World
from tests.parallel.regression import OPTIMIZERS, examples, loss_of, network, share, weights
from tests.parallel.test_allreduce import STEPS, parallel, plain


@pytest.fixture(params=["shared memory", "messages", "horovod"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, world: World) -> str:
    """Every carrier: ranks of one host share memory, those of several do not, and Horovod finds its own way."""
    if request.param == "horovod":
        if world.launcher != "none":
            pytest.importorskip("horovod.torch")
        return "horovod"
    if world.launcher == "horovodrun-gloo":
        pytest.skip("horovodrun --gloo has no MPI")
    if request.param == "messages":
        monkeypatch.setattr(World, "shared_vectors", lambda world, like: None)
    return "mpi"


@pytest.fixture(params=[1, 2])
def stage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """What is split; buckets so small that there are several."""
    monkeypatch.setattr("hvdvae.strategies.sharded_gradients.BUCKET_BYTES", 80)
    return int(request.param)


def sharded(world: World, engine: str, kind: str = "adam", **options: object) -> tuple[nn.Module, Sharded]:
    model = network(seed=100 + world.rank)
    optimizer = DistributedOptimizer(
        OPTIMIZERS[kind](model.parameters()), model, world=world, engine=engine, strategy="sharded", **options
    )
    assert isinstance(optimizer, Sharded)
    return model, optimizer


def step(world: World, model: nn.Module, optimizer: Sharded) -> None:
    x, y = (tensor[share(world)] for tensor in examples())
    optimizer.zero_grad()
    loss_of(model, x, y).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_equals_one_process_with_the_whole_batch(world: World, engine: str, stage: int, kind: str) -> None:
    found = parallel(world, engine, OPTIMIZERS[kind], strategy="sharded", zero_stage=stage)
    torch.testing.assert_close(found, plain(OPTIMIZERS[kind]), atol=2e-6, rtol=2e-5)
    assert len(set(world.gather_bytes(found.numpy().tobytes()))) == 1, "the same bits on all ranks"


def test_two_groups_of_which_a_rank_may_have_none(world: World, engine: str, stage: int) -> None:
    def build(parameters: object) -> torch.optim.Optimizer:
        first, *rest = list(parameters)  # type: ignore[call-overload]
        return torch.optim.AdamW([{"params": [first], "lr": 0.2, "weight_decay": 0.3}, {"params": rest}], 0.05)

    torch.testing.assert_close(
        parallel(world, engine, build, strategy="sharded", zero_stage=stage), plain(build), atol=2e-6, rtol=2e-5
    )


def test_clipping_is_of_the_whole_mean_gradient(world: World, engine: str) -> None:
    def clip_plain(number: int, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)

    def clip_synchronized(number: int, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        optimizer.synchronize()  # type: ignore[attr-defined]
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)

    build = OPTIMIZERS["momentum"]
    expected = plain(build, clip_plain)
    for stage in (1, 2):
        by_option = parallel(world, engine, build, strategy="sharded", clip_norm=0.05, zero_stage=stage)
        torch.testing.assert_close(by_option, expected, atol=2e-6, rtol=2e-4)
    by_hand = parallel(world, engine, build, clip_synchronized, strategy="sharded")
    torch.testing.assert_close(by_hand, expected, atol=2e-6, rtol=2e-4)


def test_accumulated_gradients_are_the_big_batch(world: World, engine: str, stage: int) -> None:
    model, optimizer = sharded(world, engine, zero_stage=stage, backward_passes_per_step=2)
    x, y = (tensor[share(world)] for tensor in examples())
    for _ in range(STEPS):
        optimizer.zero_grad()
        for half in (slice(0, len(x) // 2), slice(len(x) // 2, None)):
            loss_of(model, x[half], y[half]).backward()
        optimizer.step()
    torch.testing.assert_close(weights(model), plain(OPTIMIZERS["adam"]), atol=2e-6, rtol=2e-5)


def test_each_rank_keeps_its_share_of_the_state(world: World, engine: str, stage: int) -> None:
    model, optimizer = sharded(world, engine, zero_stage=stage)
    step(world, model, optimizer)
    length = optimizer.flat.layout.length  # With what aligns parameters.
    mine = optimizer.results()["optimizer_state_bytes"]
    counters = sum(4 for _ in optimizer.param_groups)
    everyone = world.gather_objects(mine)
    assert sum(everyone) == 2 * 4 * length + counters * world.size
    assert max(everyone) - min(everyone) <= 2 * 4
    vectors = [value for entries in optimizer.inner.state.values() for value in entries.values() if value.dim()]
    assert sum(vector.untyped_storage().nbytes() for vector in vectors) == mine - counters, "and no more behind it"


def test_a_checkpoint_is_the_plain_optimizers_and_loads_into_any(world: World, engine: str, stage: int) -> None:
    model, optimizer = sharded(world, engine, zero_stage=stage)
    for _ in range(3):
        step(world, model, optimizer)
    with optimizer.fetched(state=True):
        saved = copy.deepcopy(optimizer.state_dict()) if world.is_first else {}
    if world.size > 1:  # Kept for its time only, and elsewhere never.
        for ask in (
            optimizer.state_dict,
            lambda: optimizer.state[next(model.parameters())],
            lambda: len(optimizer.state),
        ):
            with pytest.raises(ConfigError, match=r"keeps a slice .* call optimizer\.checkpoint\(\) on all ranks"):
                ask()
        with pytest.raises(ConfigError, match="keeps a slice"):
            optimizer.wrapped.state_dict()
    single = network(seed=100)
    alone = OPTIMIZERS["adam"](single.parameters())
    x, y = examples()
    for _ in range(3):
        alone.zero_grad()
        loss_of(single, x, y).backward()
        alone.step()
    if world.is_first:
        for number, entries in alone.state_dict()["state"].items():
            for key, value in entries.items():
                torch.testing.assert_close(saved["state"][number][key], value, atol=2e-6, rtol=2e-5)
    # Into a new one, from the plain optimizer's: every rank takes its slice.
    other, resumed = sharded(world, engine, zero_stage=stage)
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), single.parameters(), strict=True):
            mine.copy_(theirs)
    resumed.load_state_dict(alone.state_dict())
    step(world, model, optimizer)
    step(world, other, resumed)
    torch.testing.assert_close(weights(other), weights(model), atol=2e-6, rtol=2e-5)


def test_layers_in_bfloat16_train_float32_weights_on_a_schedule(world: World, engine: str, stage: int) -> None:
    found = []
    for options in ({"strategy": "allreduce"}, {"strategy": "sharded", "zero_stage": stage}):
        model = network(seed=100)
        inner = OPTIMIZERS["adamw"](model.parameters())
        optimizer = DistributedOptimizer(inner, model, world=world, engine=engine, **options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        x, y = (tensor[share(world)] for tensor in examples())
        for _ in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, x, y)
            loss.backward()
            optimizer.step()
            schedule.step()
        assert weights(model).dtype == torch.float32
        found.append(weights(model))
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=2e-4)


def test_state_that_was_there_before_wrapping_is_kept(world: World, engine: str, stage: int) -> None:
    model = network(seed=100)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    x, y = examples()
    loss_of(model, x, y).backward()
    optimizer.step()
    wrapped = DistributedOptimizer(optimizer, model, world=world, engine=engine, strategy="sharded", zero_stage=stage)
    assert isinstance(wrapped, Sharded)
    for _ in range(STEPS - 1):
        step(world, model, wrapped)
    torch.testing.assert_close(weights(model), plain(OPTIMIZERS["adam"]), atol=2e-6, rtol=2e-5)


def test_a_rank_that_is_not_finite_skips_the_step_on_all(world: World, engine: str, stage: int) -> None:
    model, optimizer = sharded(world, engine, zero_stage=stage)
    start = weights(model)
    optimizer.zero_grad()
    x, y = (tensor[share(world)] for tensor in examples())
    loss = loss_of(model, x, y)
    loss.backward()
    optimizer.watch(loss * (float("nan") if world.rank == world.size - 1 else 1.0))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(weights(model), start)
    step(world, model, optimizer)
    assert optimizer.skipped_steps == 1
    assert torch.isfinite(weights(model)).all()


def test_bytes_are_those_of_an_allreduce(world: World, engine: str) -> None:
    model, optimizer = sharded(world, engine)
    for _ in range(3):
        step(world, model, optimizer)
    length = optimizer.flat.layout.length
    expected = 2 * 4 * length * (world.size - 1) / world.size
    assert optimizer.traffic()["bytes_sent_per_step"] == pytest.approx(expected, abs=8)


@pytest.mark.parametrize("options", [{"compression": "int8"}, {"reduce_op": "adasum"}])
def test_what_it_cannot_do_is_refused(world: World, options: dict[str, str]) -> None:
    model = network(seed=0)
    with pytest.raises(ConfigError, match="is for strategy allreduce"):
        DistributedOptimizer(OPTIMIZERS["adam"](model.parameters()), model, world=world, strategy="sharded", **options)


def test_an_optimizer_that_is_not_elementwise_is_refused(world: World) -> None:
    model = network(seed=0)
    with pytest.raises(ConfigError, match="Adafactor is not elementwise"):
        DistributedOptimizer(torch.optim.Adafactor(model.parameters()), model, world=world, strategy="sharded")
