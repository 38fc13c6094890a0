"""Law 4 for weights: float32 ones that are split over the ranks train as whole ones do under autocast."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvdvae.errors import ConfigError
from hvdvae.strategies import DistributedOptimizer
from hvdvae.strategies.master_weights import MasterWeights
from hvdvae.strategies.optimizer_state import pack
from hvdvae.strategies.strategy import Strategy
from hvdvae.world import World
from tests.parallel.regression import OPTIMIZERS, examples, loss_of, network, share, weights

STEPS = 6


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdvae.strategies.sharded_gradients.BUCKET_BYTES", 80)


def wrapped(
    world: World, engine: str, kind: str = "adamw", *, of: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, MasterWeights]:
    model = network(seed=100 + world.rank) if of is None else of
    optimizer = DistributedOptimizer(
        OPTIMIZERS[kind](model.parameters()),
        model,
        world=world,
        engine=engine,
        strategy="sharded",
        zero_stage=2,
        weights="bf16",
        **options,
    )
    assert isinstance(optimizer, MasterWeights)
    return model, optimizer


def train(world: World, model: nn.Module, optimizer: Strategy, steps: int, passes: int = 1) -> None:
    """Each rank on its own examples, at a rate that falls."""
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    x, y = (tensor[share(world)] for tensor in examples())
    for _ in range(steps):
        optimizer.zero_grad()
        for part in torch.arange(len(x)).chunk(passes):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, x[part], y[part])
            loss.backward()
        optimizer.step()
        schedule.step()


def masters(optimizer: MasterWeights) -> dict[str, Tensor]:
    """All of them, on all ranks."""
    with optimizer.saving():
        return {name: piece.get().clone() for name, piece in sorted(optimizer.master_weights().items())}


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("options", [{}, {"backward_passes_per_step": 2}, {"clip_norm": 0.05}], ids=str)
def test_equals_whole_float32_weights_under_autocast(
    world: World, engine: str, kind: str, options: dict[str, Any]
) -> None:
    passes = options.get("backward_passes_per_step", 1)
    single = network(seed=100 + world.rank)
    plain = DistributedOptimizer(
        OPTIMIZERS[kind](single.parameters()), single, world=world, engine=engine, strategy="allreduce", **options
    )
    train(world, single, plain, STEPS, passes)
    model, optimizer = wrapped(world, engine, kind, **options)
    train(world, model, optimizer, STEPS, passes)
    found = masters(optimizer)
    for name, expected in single.named_parameters():
        torch.testing.assert_close(found[name], expected.detach(), atol=2e-5, rtol=2e-4)


def test_models_are_the_masters_rounded_the_same_bits_on_all_ranks(world: World, engine: str) -> None:
    model, optimizer = wrapped(world, engine)
    train(world, model, optimizer, 2)
    held = weights(model)
    assert held.dtype == torch.bfloat16
    found = masters(optimizer)
    assert torch.equal(held, torch.cat([found[name].flatten() for name, _ in model.named_parameters()]).bfloat16())
    assert any(not torch.equal(whole, whole.bfloat16().float()) for whole in found.values()), "masters hold more"
    bits = held.view(torch.int16).numpy().tobytes()
    assert world.gather_bytes(bits) == [bits] * world.size


def test_a_rank_keeps_float32_of_its_share_alone(world: World, engine: str) -> None:
    model, optimizer = wrapped(world, engine)
    train(world, model, optimizer, 1)
    length = optimizer.flat.layout.length  # With what aligns parameters.
    everyone = world.gather_objects(optimizer.results()["weight_bytes"])
    assert sum(everyone) == 2 * length * world.size + 4 * length
    assert max(everyone) - min(everyone) <= 4
    stepped = [group["params"][0] for group in optimizer.inner.param_groups]
    assert {vector.dtype for vector in stepped} == {torch.float32}
    assert {vector.untyped_storage().nbytes() for vector in stepped} == {everyone[world.rank] - 2 * length}
    assert all(p.untyped_storage().nbytes() == 2 * p.numel() for p in model.parameters()), "and none behind the model's"


def test_goes_on_bit_for_bit_from_what_was_saved(world: World, engine: str) -> None:
    model, optimizer = wrapped(world, engine)
    train(world, model, optimizer, 3)
    saved = masters(optimizer)
    with optimizer.saving():
        pieces, scalars = optimizer.pieces()
        state = {name: pieces[name].get().clone() for name in sorted(pieces)}
    other, resumed = wrapped(world, engine)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(saved[name])
    resumed.load_master_weights(iter({**saved, "frozen.elsewhere": torch.ones(2)}.items()))
    entries = [(int(number), key, value) for number, found in scalars.items() for key, value in found.items()]
    entries += [(int(name.split("/")[0]), name.split("/")[1], tensor) for name, tensor in state.items()]
    resumed.load_entries(pack(optimizer.param_groups), iter(entries))
    train(world, model, optimizer, 2)
    train(world, other, resumed, 2)
    for name, tensor in masters(resumed).items():
        assert torch.equal(tensor, masters(optimizer)[name]), name


def test_what_somebody_writes_into_the_model_counts(world: World, engine: str) -> None:
    model, optimizer = wrapped(world, engine, "sgd")
    train(world, model, optimizer, 2)
    before = masters(optimizer)
    with torch.no_grad():
        model[0].bias[1] = 3.0  # type: ignore[index]
    optimizer.zero_grad()
    optimizer.step()  # Without a gradient: plain SGD stays where it is.
    after = masters(optimizer)
    assert float(after["0.bias"][1]) == 3.0
    before["0.bias"][1] = 3.0
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_evaluates_in_the_precision_of_the_weights(world: World, engine: str) -> None:
    model, optimizer = wrapped(world, engine)
    x, _ = examples()
    with optimizer.arithmetic(), torch.no_grad():
        assert model(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        model(x)


def test_what_it_cannot_do_is_refused(world: World, engine: str) -> None:
    normed = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    with pytest.raises(ConfigError, match=r"layer '1' \(BatchNorm1d\) has statistics next to its weights"):
        wrapped(world, engine, of=normed)
    with pytest.raises(ConfigError, match="is for float32 models, found"):
        wrapped(world, engine, of=network(seed=0).double())
    for given, message in (
        ({"strategy": "local-sgd"}, "is for strategy .*sharded"),
        ({"zero_stage": 1}, "expected 1 or 2 and 'fp32', or 2 and 'bf16'"),
        ({"zero_stage": 3}, "zero_stage .--zero-stage. is 3"),
        ({"weights": "fp16"}, "weights .--weights. 'fp16'"),
    ):
        options: dict[str, Any] = {"strategy": "sharded", "zero_stage": 2, "weights": "bf16", **given}
        model = network(seed=0)
        with pytest.raises(ConfigError, match=message):
            DistributedOptimizer(OPTIMIZERS["adam"](model.parameters()), model, world=world, engine=engine, **options)
