"""Compressed exchange and averages now and then: the same bits on all ranks, and nothing lost."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvdvae.compression import CODECS
from hvdvae.errors import ConfigError, NonFiniteError, RankLost
from hvdvae.strategies import DistributedOptimizer, Strategy
from hvdvae.strategies.mean import CompressedMean, mean_over_ranks
from hvdvae.world import World
from tests.parallel.regression import OPTIMIZERS, examples, loss_of, network, share, weights

SHAPES = [(40, 50), (50,), (7, 3, 3)]
LENGTH = 40 * 50 + 50 + 63
NOTHING: dict[str, Any] = {"share": None, "rank": None, "momentum": 0.0}
FEEDBACK = ("sign", "topk", "randomk", "powersgd")


def own(world: World, seed: int) -> Tensor:
    """Another vector on each rank."""
    return torch.randn(LENGTH, generator=torch.Generator().manual_seed(1000 * seed + world.rank))


def mean_of(world: World, codec: str, **options: object) -> CompressedMean:
    chosen = {**NOTHING, **options}
    return CompressedMean(world, torch.zeros(LENGTH), SHAPES, codec, **chosen)  # type: ignore[arg-type]


def sum_of(world: World, tensor: Tensor) -> Tensor:
    return world.sum_(tensor.clone().double())


def same_on_all(world: World, tensor: Tensor) -> bool:
    return len(set(world.gather_bytes(tensor.detach().numpy().tobytes()))) == 1


@pytest.mark.parametrize("codec", CODECS)
def test_ranks_decode_the_same_bits(world: World, codec: str) -> None:
    mean = mean_of(world, codec)
    for step in range(4):
        vector = own(world, step)
        mean.mean_(vector)
        mean.keep()
        assert same_on_all(world, vector)
        assert torch.isfinite(vector).all()
    if world.size > 1:
        assert 0 < mean.traffic.sent == mean.traffic.received < 4 * 4 * LENGTH * world.size


@pytest.mark.parametrize("codec", FEEDBACK)
def test_sent_and_remembered_are_all_that_was_given(world: World, codec: str) -> None:
    """Law 5, over ranks: N times the means that were stepped on, and what all ranks remember."""
    mean = mean_of(world, codec)
    given, stepped = torch.zeros(LENGTH).double(), torch.zeros(LENGTH).double()
    for step in range(10):
        vector = own(world, step)
        given += sum_of(world, vector)
        mean.mean_(vector)
        mean.keep()
        stepped += vector.double() * world.size
    left = sum_of(world, mean.memory()["remembered"])
    assert left.abs().max() > 0.1, "it did leave something out"
    torch.testing.assert_close(stepped + left, given, atol=1e-4, rtol=1e-4)
    mean.settle()
    assert same_on_all(world, mean.memory()["remembered"])
    torch.testing.assert_close(sum_of(world, mean.memory()["remembered"]), left, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("codec", FEEDBACK)
def test_a_rank_that_did_not_come_to_a_mean_that_others_used_remembers_what_they_do(
    world: World, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank died as the last answer came: its message was in the mean, and must not be told again."""
    came, missed = mean_of(world, codec), mean_of(world, codec)
    for mean in (came, missed):
        for step in range(2):
            mean.mean_(own(world, step))
            mean.keep()
    came.mean_(own(world, 2))
    came.keep()
    calls, last = 0, 2 if codec == "powersgd" else 1

    def breaking(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def broken(*given: Any) -> Tensor:
            nonlocal calls
            calls, found = calls + 1, real(*given)
            if calls == last:
                raise RankLost("somebody has died")
            return found

        return broken

    monkeypatch.setattr(world, "sum_", breaking(world.sum_))
    monkeypatch.setattr(world, "gather_rows", breaking(world.gather_rows))
    with pytest.raises(RankLost):
        missed.mean_(own(world, 2))
    monkeypatch.undo()
    missed.recover()
    missed.catch_up()
    assert torch.equal(missed.memory()["remembered"], came.memory()["remembered"])
    missed.catch_up()
    assert torch.equal(missed.memory()["remembered"], came.memory()["remembered"]), "once"


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8"])
def test_rounding_codecs_are_near_the_mean(world: World, codec: str) -> None:
    vector = own(world, 0)
    exact = sum_of(world, vector) / world.size
    mean_of(world, codec).mean_(vector)
    assert float((vector - exact).norm() / exact.norm()) < {"fp16": 1e-3, "bf16": 1e-2, "int8": 3e-2}[codec]


@pytest.mark.parametrize("codec", ["fp16", "bf16"])
def test_halves_cost_half_of_an_uncompressed_ring(world: World, codec: str) -> None:
    mean, plain = mean_of(world, codec), mean_over_ranks(world, torch.zeros(LENGTH), SHAPES, "none", **NOTHING)
    for one in (mean, plain):
        one.mean_(own(world, 0))
    # Besides flags, and what equal slices need to be even.
    assert mean.traffic.sent == pytest.approx(plain.traffic.sent / 2, abs=16 * world.size)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8"])
def test_vectors_that_are_shorter_than_there_are_ranks(world: World, codec: str, length: int) -> None:
    vector = torch.full((length,), float(world.rank))
    mean = mean_over_ranks(world, vector, [(length,)], codec, **NOTHING)
    mean.mean_(vector)
    assert same_on_all(world, vector)
    torch.testing.assert_close(vector, torch.full((length,), (world.size - 1) / 2), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("codec", ["topk", "randomk"])
def test_a_share_of_all_is_the_uncompressed_mean(world: World, codec: str) -> None:
    vector = own(world, 0)
    exact = (sum_of(world, vector) / world.size).float()
    mean = mean_of(world, codec, share=1.0)
    mean.mean_(vector)
    mean.keep()
    torch.testing.assert_close(vector, exact, atol=1e-6, rtol=1e-5)
    assert not mean.memory()["remembered"].any()


@pytest.mark.parametrize("codec", CODECS)
def test_one_rank_that_is_not_finite_is_heard_and_nothing_is_forgotten(world: World, codec: str) -> None:
    model = network(seed=1)
    optimizer = wrapped(world, model, compression=codec)
    x, y = (tensor[share(world)] for tensor in examples())
    take_step(optimizer, model, x, y)
    before = {name: kept.clone() for name, kept in optimizer.memory().items() if name != "calls"}
    at = weights(model)
    optimizer.zero_grad()
    loss = loss_of(model, x, y)
    (loss * (float("nan") if world.rank == world.size - 1 else 1.0)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(weights(model), at)
    assert all(torch.equal(kept, before[name]) for name, kept in optimizer.memory().items() if name != "calls")
    take_step(optimizer, model, x, y)
    assert torch.isfinite(weights(model)).all()
    assert not torch.equal(weights(model), at)


def wrapped(
    world: World, model: nn.Module, strategy: str = "allreduce", lr: float = 0.1, **options: object
) -> Strategy:
    plain = torch.optim.SGD(model.parameters(), lr)
    engine = "mpi" if strategy == "allreduce" else None
    return DistributedOptimizer(plain, model, world=world, strategy=strategy, engine=engine, **options)  # type: ignore[arg-type]


def take_step(optimizer: Strategy, model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model, x, y).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def trained(world: World, optimizer_steps: int, strategy: str, name: str = "sgd", **options: object) -> nn.Module:
    model = network(seed=100 + world.rank)
    plain = OPTIMIZERS[name](model.parameters())
    by_gloo = world.launcher == "horovodrun-gloo"
    by_horovod = options.get("compression", "none") in ("none", "fp16")
    engine = None if strategy != "allreduce" or (by_gloo and not by_horovod) else "horovod" if by_gloo else "mpi"
    optimizer = DistributedOptimizer(plain, model, world=world, strategy=strategy, engine=engine, **options)  # type: ignore[arg-type]
    x, y = (tensor[share(world)] for tensor in examples())
    for _ in range(optimizer_steps):
        take_step(optimizer, model, x, y)
    optimizer.finish()
    return model


def simulated(
    size: int, steps: int, every: int, name: str, outer_lr: float = 1.0, outer_momentum: float = 0.0
) -> Tensor:
    """The same by hand: replicas in one process, and torch's own SGD as the outer optimizer."""
    center = network(seed=100)
    outer = torch.optim.SGD(center.parameters(), outer_lr, momentum=outer_momentum, nesterov=bool(outer_momentum))
    replicas = [copy.deepcopy(center) for _ in range(size)]
    inner = [OPTIMIZERS[name](replica.parameters()) for replica in replicas]
    x, y = examples()
    part = len(x) // size
    for step in range(1, steps + 1):
        for place, (replica, optimizer) in enumerate(zip(replicas, inner, strict=True)):
            optimizer.zero_grad()
            mine = slice(place * part, (place + 1) * part)
            loss_of(replica, x[mine], y[mine]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if step % every == 0 or step == steps:
            for parameter, *others in zip(center.parameters(), *(r.parameters() for r in replicas), strict=True):
                parameter.grad = torch.stack([parameter.detach() - other.detach() for other in others]).mean(0)
            outer.step()
            for replica in replicas:
                replica.load_state_dict(center.state_dict())
    return weights(center)


def test_one_step_and_plain_sgd_is_allreduce(world: World) -> None:
    """The law: averaging weights after every step of SGD is averaging gradients."""
    local = weights(trained(world, 6, "local-sgd", sync_every=1))
    torch.testing.assert_close(local, weights(trained(world, 6, "allreduce")), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("every", [3, 4])
def test_local_sgd_is_the_mean_of_replicas(world: World, name: str, every: int) -> None:
    """Ten steps: the last period is cut short by `finish`."""
    found = weights(trained(world, 10, "local-sgd", name, sync_every=every))
    torch.testing.assert_close(found, simulated(world.size, 10, every, name), atol=2e-6, rtol=2e-5)
    assert same_on_all(world, found)


def test_diloco_has_nesterovs_outer_steps(world: World) -> None:
    found = weights(trained(world, 12, "diloco", "adamw", sync_every=3))
    torch.testing.assert_close(found, simulated(world.size, 12, 3, "adamw", 0.7, 0.9), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_group_is_one_replica_with_all_of_its_examples(world: World, size: int) -> None:
    """Hierarchical: groups of all ranks are allreduce, of one rank plain local SGD."""
    if world.size % size or (world.comm is None and world.size > 1):
        pytest.skip(f"{world.size} ranks without groups of {size}")
    found = weights(trained(world, 10, "local-sgd", "adam", sync_every=4, group_size=size))
    expected = simulated(world.size // size, 10, 4, "adam")
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)
    assert same_on_all(world, found)


def test_the_ranks_of_this_host_are_one_group(world: World) -> None:
    if world.comm is None and world.size > 1:
        pytest.skip("needs MPI")
    found = weights(trained(world, 6, "local-sgd", "sgd", sync_every=100, group_size=0))
    torch.testing.assert_close(found, weights(trained(world, 6, "allreduce")), atol=1e-6, rtol=1e-5)
    assert same_on_all(world, found)


@pytest.mark.parametrize("codec", CODECS)
def test_differences_travel_compressed_and_weights_stay_the_same_on_all(world: World, codec: str) -> None:
    model = trained(world, 9, "local-sgd", "adam", sync_every=3, compression=codec)
    assert same_on_all(world, weights(model))
    x, y = examples()
    assert loss_of(model, x, y) < loss_of(network(seed=100), x, y)


def test_evaluation_has_the_mean_and_training_its_own(world: World) -> None:
    model = network(seed=100)
    optimizer = wrapped(world, model, "local-sgd", sync_every=100)
    x, y = (tensor[share(world)] for tensor in examples())
    for _ in range(3):
        take_step(optimizer, model, x, y)
    mine = weights(model)
    exact = sum_of(world, mine) / world.size
    assert world.size == 1 or not same_on_all(world, mine)
    with optimizer.fetched():
        torch.testing.assert_close(weights(model).double(), exact, atol=1e-6, rtol=1e-6)
        assert same_on_all(world, weights(model))
    assert torch.equal(weights(model), mine)
    with optimizer.fetched(state=True):
        assert same_on_all(world, weights(model))
    assert same_on_all(world, weights(model)), "what was saved is what all go on with"


@pytest.mark.parametrize("strategy", ["local-sgd", "diloco"])
@pytest.mark.parametrize("compression", ["none", "sign"])
def test_what_is_validated_is_what_is_saved(world: World, strategy: str, compression: str) -> None:
    model = network(seed=100)
    optimizer = wrapped(world, model, strategy, sync_every=4, compression=compression)
    x, y = (tensor[share(world)] for tensor in examples())
    for steps in (3, 2, 3):  # Before, after and at the end of a period.
        for _ in range(steps):
            take_step(optimizer, model, x, y)
        with optimizer.fetched():
            validated = weights(model)
        with optimizer.fetched(state=True):
            assert torch.equal(weights(model), validated)
        assert torch.equal(weights(model), validated)
    optimizer.finish()
    assert torch.equal(weights(model), validated)
    assert optimizer.results()["averages"] == 2, "a checkpoint is no step of the outer optimizer"


def test_states_that_come_from_a_checkpoint_are_averaged_by_name(world: World) -> None:
    """A file's entries come in another order on each rank."""
    model = network(seed=100)
    optimizer = DistributedOptimizer(
        OPTIMIZERS["adam"](model.parameters()), model, world=world, strategy="local-sgd", sync_every=4
    )
    x, y = (tensor[share(world)] for tensor in examples())
    take_step(optimizer, model, x, y)
    vector, entries = next(iter(optimizer.inner.state.items()))
    means = {key: sum_of(world, value) / world.size for key, value in entries.items() if value.dim()}
    keys = sorted(entries, reverse=bool(world.rank % 2))
    optimizer.inner.state[vector] = {key: entries[key] for key in keys}
    with optimizer.fetched(state=True):
        pass
    for key, mean in means.items():
        torch.testing.assert_close(optimizer.inner.state[vector][key].double(), mean, atol=1e-7, rtol=1e-5)


def test_a_rank_that_never_stepped_leaves_nobody_waiting(world: World) -> None:
    """It has no optimizer's state to share, and the others must hear of it before they sum theirs."""
    model = network(seed=100)
    plain = torch.optim.Adam(model.parameters(), 0.05)
    optimizer = DistributedOptimizer(plain, model, world=world, strategy="local-sgd", sync_every=100)
    x, y = (tensor[share(world)] for tensor in examples())
    optimizer.zero_grad()
    loss = loss_of(model, x, y)
    (loss * (float("nan") if world.rank == world.size - 1 else 1.0)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    with optimizer.fetched(state=True):
        assert same_on_all(world, weights(model))


def test_an_adaptive_period_gets_shorter_as_the_loss_falls(world: World) -> None:
    model = network(seed=100)
    optimizer = wrapped(world, model, "local-sgd", sync_every=8, adaptive_sync=True)
    x, y = (tensor[share(world)] for tensor in examples())
    for step in range(40):
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.watch(loss.detach() * 0.8**step)  # As if it fell faster than it does.
        optimizer.step()
    optimizer.finish()
    found = optimizer.results()
    assert found["averages"] > 40 / 8 + 2
    assert set(world.gather_objects(found["averages"])) == {found["averages"]}


def test_an_adaptive_period_stays_where_losses_are_below_zero(world: World) -> None:
    model = network(seed=100)
    optimizer = wrapped(world, model, "local-sgd", sync_every=8, adaptive_sync=True)
    x, y = (tensor[share(world)] for tensor in examples())
    for step in range(40):
        take_step(optimizer, model, x, y)
        optimizer.watch(torch.tensor(-100.0 / (1 + step)))
    assert optimizer.results()["averages"] == 40 / 8


def test_a_resumed_run_averages_as_often_as_it_is_told(world: World) -> None:
    seldom = wrapped(world, network(seed=100), "local-sgd", sync_every=8)
    model = network(seed=100)
    often = wrapped(world, model, "local-sgd", sync_every=2)
    for name, tensor in often.memory().items():
        tensor.copy_(seldom.memory()[name])
    for _ in range(8):
        take_step(often, model, *(tensor[share(world)] for tensor in examples()))
    assert often.results()["averages"] == 4


@pytest.mark.parametrize("codec", FEEDBACK)
def test_what_is_remembered_of_gradients_is_not_taken_for_differences_of_weights(world: World, codec: str) -> None:
    names = [
        set(wrapped(world, network(0), strategy, compression=codec).memory()) for strategy in ("allreduce", "local-sgd")
    ]
    assert not names[0] & names[1]


def test_averages_to_look_at_and_to_save_are_counted(world: World) -> None:
    model = network(seed=100)
    optimizer = wrapped(world, model, "local-sgd", sync_every=100, compression="sign")
    take_step(optimizer, model, *(tensor[share(world)] for tensor in examples()))
    ring = 2 * 4 * optimizer.flat.layout.length * (world.size - 1) / world.size
    with optimizer.fetched():
        looked = optimizer.traffic()["bytes_sent"]
    assert looked == pytest.approx(ring, abs=4)
    with optimizer.fetched(state=True):
        saved = optimizer.traffic()["bytes_sent"] - looked
    assert saved > ring if world.size > 1 else saved == 0, "weights, and what is remembered"


def test_a_gradient_scaler_does_not_go_with_what_is_remembered(world: World) -> None:
    for codec in ("int8", "topk"):
        model = network(seed=100)
        optimizer = wrapped(world, model, compression=codec)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        x, y = (tensor[share(world)] for tensor in examples())
        scaler.scale(loss_of(model, x, y)).backward()  # type: ignore[no-untyped-call]
        optimizer.synchronize()
        if codec == "int8":
            scaler.step(optimizer)
            continue
        with pytest.raises(ConfigError, match=r"a GradScaler .* scales each step's differently"):
            scaler.step(optimizer)


def test_weights_that_are_not_finite_end_the_run_on_all_ranks(world: World) -> None:
    model = network(seed=100)
    optimizer = wrapped(world, model, "local-sgd", sync_every=2)
    x, y = (tensor[share(world)] for tensor in examples())
    take_step(optimizer, model, x, y)
    if world.rank == world.size - 1:
        next(model.parameters()).data.fill_(float("inf"))
    optimizer.zero_grad()
    with pytest.raises(NonFiniteError, match="--sync-every"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*averages all of it as it is")
def test_powersgd_of_thin_matrices_is_the_plain_mean(world: World) -> None:
    """Where no matrix is longer than its two factors all is averaged whole, and nothing is left out."""
    model, single = network(0), network(0)
    optimizer, alone = (
        wrapped(world, model, compression="powersgd", compression_rank=9),
        OPTIMIZERS["sgd"](single.parameters()),
    )
    x, y = examples()
    for _ in range(3):
        take_step(optimizer, model, x[share(world)], y[share(world)])
        alone.zero_grad()
        loss_of(single, x, y).backward()  # type: ignore[no-untyped-call]
        alone.step()
    torch.testing.assert_close(weights(model), weights(single), atol=2e-6, rtol=2e-5)
    assert optimizer.results()["compression_error"] == 0


def test_what_does_not_go_together_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match="--group-size is 5"):
        wrapped(world, network(0), "local-sgd", sync_every=2, group_size=5)
    for every in (-1, 2.5, float("nan")):
        with pytest.raises(ConfigError, match="sync_every"):
            wrapped(world, network(0), "local-sgd", sync_every=every)
    for strategy, option in (("allreduce", {"sync_every": 4}), ("local-sgd", {"outer_lr": 0.5})):
        with pytest.raises(ConfigError, match=f"is for strategy .*, found '{strategy}'"):
            wrapped(world, network(0), strategy, **option)
    with pytest.raises(ConfigError, match="expected a whole number"):
        wrapped(world, network(0), compression="powersgd", compression_rank=2.5)
    for option in ({"outer_lr": 0.0}, {"outer_lr": float("nan")}, {"outer_momentum": 1.0}, {"outer_momentum": -0.1}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            wrapped(world, network(0), "diloco", sync_every=2, **option)
    with pytest.raises(ConfigError, match=r"compression_momentum .* is for"):
        wrapped(world, network(0), compression="sign", compression_momentum=0.9)
    with pytest.raises(ConfigError, match="--compression-rank is 0"):
        wrapped(world, network(0), compression="powersgd", compression_rank=0)
    double = network(0).double()
    with pytest.raises(ConfigError, match="float32"):
        wrapped(world, double, compression="int8")
