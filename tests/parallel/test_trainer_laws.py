"""The laws of the whole loop, with real VAEs and the package's loader.

N ranks are one process; each draws its own noise; a resumed run is the run that never stopped.
"""

import os
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvdvae import pulse
from hvdvae.batch import Batches
from hvdvae.checkpoint import Folder, spread
from hvdvae.cli.assessment import assess
from hvdvae.data import ArraySource, Loader, open_dataset
from hvdvae.resume import Position
from hvdvae.schedule import learning_rate
from hvdvae.stepper import Loss
from hvdvae.strategies import DistributedOptimizer
from hvdvae.trainer import Trainer
from hvdvae.vae import VAE, Elbo, build_model
from hvdvae.world import World
from tests.rows import Rows

SHAPE, LATENT, EXAMPLES = (1, 4, 4), 3, 75
GLOBAL_BATCH = 8  # Of 1, 2 or 4 ranks together: nine steps, and three examples that are left out.
STEPS = EXAMPLES // GLOBAL_BATCH
IMAGES = np.random.default_rng(3).integers(0, 256, (EXAMPLES, *SHAPE), dtype=np.uint8)


def vae(seed: int) -> VAE:
    torch.manual_seed(seed)
    return build_model("mlp", SHAPE, hidden=[8], latent=[LATENT])


def loader(world: World, seed: int = 5) -> Loader:
    batch = GLOBAL_BATCH // world.size
    return Loader(ArraySource(IMAGES, "images"), batch=batch, rank=world.rank, size=world.size, seed=seed)


def noise_of(example: Tensor) -> Tensor:
    """Noise (LATENT,) that belongs to a binarized example, whoever trains on it."""
    generator = torch.Generator().manual_seed(zlib.crc32(example.numpy().tobytes()))
    return torch.randn(LATENT, generator=generator)


def loss_with_noise_of_examples(model: nn.Module, batch: Tensor, epoch: float) -> dict[str, Tensor]:
    terms = model(batch, noise=torch.stack([noise_of(example) for example in batch])[None])
    rate, distortion = terms.kl[0].sum(-1).mean(), -terms.log_px.mean()
    return {"loss": distortion + min(1.0, epoch) * rate, "rate": rate, "distortion": distortion}


class Epochs:
    """A monitor that keeps the epochs' metrics."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_beat(self, beat: pulse.Beat, *, step: int, epoch: float, lr: float) -> None:
        """Not kept."""

    def on_epoch(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)

    def close(self) -> None:
        """Nothing is open."""


def trainer_of(
    model: nn.Module,
    world: World,
    loss: Loss,
    batches: Batches,
    engine: str = "mpi",
    exchange: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    plain = torch.optim.Adam(model.parameters(), 0.02)
    strategy = "local" if world.launcher == "none" else "allreduce"
    engine = "horovod" if world.launcher == "horovodrun-gloo" else engine
    chosen = {"strategy": strategy, "clip_norm": 20.0, **(exchange or {})}
    by_gloo = engine == "horovod" and chosen.get("compression", "none") not in ("none", "fp16")
    if chosen["strategy"] in ("allreduce", "sharded") and not by_gloo:
        chosen.setdefault("engine", engine)
    optimizer = DistributedOptimizer(plain, model, world=world, **chosen)
    return Trainer(model, optimizer, loss, batches, **options)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def same_on_all(world: World, tensor: Tensor) -> bool:
    return len(set(world.gather_bytes(tensor.numpy().tobytes()))) == 1


@pytest.fixture
def alone() -> World:
    return World.alone(device="cpu")


@pytest.fixture(autouse=True)
def _beat_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a signal ends the run at the step in which it came."""
    monkeypatch.setattr(pulse, "PERIOD_SECONDS", 0.0)


def test_ranks_together_are_one_process_with_the_whole_batch(world: World, alone: World, engine: str) -> None:
    """Law 1: the same examples, binarized alike, the same noise; weights that differ until rank 0's are broadcast."""
    factor = learning_rate("cosine", epochs=3, warmup=1, step_epochs=1, gamma=1)
    told, told_alone = Epochs(), Epochs()
    many, one = vae(seed=40 + world.rank), vae(seed=40)
    start = weights(one)
    options: dict[str, Any] = {"schedule": factor, "ema_decay": 0.9}
    trainer = trainer_of(many, world, loss_with_noise_of_examples, loader(world), engine, monitors=[told], **options)
    single = trainer_of(one, alone, loss_with_noise_of_examples, loader(alone), monitors=[told_alone], **options)
    outcome, expected = trainer.fit(3), single.fit(3)
    assert (outcome.step, outcome.examples, outcome.epochs) == (expected.step, expected.examples, expected.epochs)
    assert outcome.step == 3 * STEPS
    torch.testing.assert_close(weights(many), weights(one), atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(trainer.ema.average, single.ema.average, atol=2e-5, rtol=1e-3)  # type: ignore[union-attr]
    assert (weights(one) - start).norm() > 1, "it must have learned something for this to mean anything"
    assert same_on_all(world, weights(many))
    if world.is_first:
        assert len(told.metrics) == 3
        for mine, theirs in zip(told.metrics, told_alone.metrics, strict=True):
            for name in ("loss", "rate", "distortion", "elbo", "lr", "gradient_norm"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-3), name
    else:
        assert told.metrics == [], "monitors are rank 0's"


def latents_of_a_run(world: World, seed: int) -> list[list[float]]:
    """What the decoder gets at each step, where all ranks have the same weights and the same examples."""
    seen: list[list[float]] = []
    model = vae(seed=1)
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten().tolist()))
    rows = torch.from_numpy(IMAGES[:1]).float().div(255).repeat(12, 1, 1, 1)
    plain = torch.optim.SGD(model.parameters(), 0.0)
    strategy, engine = ("local", None) if world.launcher == "none" else ("allreduce", "mpi")
    engine = "horovod" if world.launcher == "horovodrun-gloo" else engine
    optimizer = DistributedOptimizer(plain, model, world=world, strategy=strategy, engine=engine)
    Trainer(model, optimizer, Elbo(), Rows(rows, 1, world), seed=seed).fit(1)
    return seen


def test_every_rank_and_step_draws_its_own_noise_from_the_seed(world: World) -> None:
    """Law 6, of the reparameterization noise itself: z differs, though weights and examples do not."""
    mine = latents_of_a_run(world, seed=11)
    steps = 12 // world.size
    assert len(mine) == steps
    everyone = world.gather_objects(mine)
    draws = {tuple(z) for of_rank in everyone for z in of_rank}
    assert len(draws) == steps * world.size, "two ranks or steps drew the same noise"
    assert latents_of_a_run(world, seed=11) == mine
    assert latents_of_a_run(world, seed=12) != mine


class Denoiser(nn.Module):
    """BatchNorm with statistics of each rank's own, dropout, and noise."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + 0.1 * torch.randn_like(x))  # type: ignore[no-any-return]


def stopping(loss: Loss, world: World, step: int) -> Loss:
    """Sends SIGTERM to the last rank alone, in its `step`-th step: in backward, as looks at an average have none."""
    calls = iter(range(1, 10**6))

    def stop(_: Tensor) -> None:
        if next(calls) == step and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def stops(model: nn.Module, batch: Tensor, epoch: float) -> Any:
        found = loss(model, batch, epoch)
        (found["loss"] if isinstance(found, dict) else found).register_hook(stop)  # type: ignore[no-untyped-call, union-attr]
        return found

    return stops


def squared_error(model: nn.Module, batch: Tensor, epoch: float) -> Tensor:
    return (model(batch) - batch).square().mean()


@pytest.mark.parametrize("stop", [3, STEPS + 2])
def test_a_resumed_run_is_the_run_that_never_stopped(world: World, engine: str, shared_path: Path, stop: int) -> None:
    """Law 8, bit for bit at the same world size; the signal reaches one rank only."""
    rows = torch.randn(EXAMPLES, 5, generator=torch.Generator().manual_seed(2))
    folder = Folder(shared_path, 2)

    def build(model: nn.Module, loss: Loss = squared_error, checkpoints: Folder | None = None) -> Trainer:
        batches = Rows(rows, GLOBAL_BATCH // world.size, world)
        factor = learning_rate("cosine", epochs=3, warmup=1, step_epochs=1, gamma=1)
        options: dict[str, Any] = {"seed": 4, "ema_decay": 0.8, "schedule": factor}
        return trainer_of(model, world, loss, batches, engine, checkpoints=checkpoints, **options)

    straight = Denoiser(seed=7)
    reference = build(straight)
    reference.fit(3)
    own = straight.layers[1].running_mean
    if world.size > 1:
        assert not same_on_all(world, own), "the statistics must differ for this to mean anything"  # type: ignore[arg-type]

    stopped = Denoiser(seed=7)
    outcome = build(stopped, stopping(squared_error, world, stop), folder).fit(3)
    assert (outcome.signal, outcome.step) == (signal.SIGTERM, stop)
    assert set(world.gather_objects(outcome.step)) == {stop}
    checkpoint = spread(folder.newest_good() if world.is_first else None, world)
    assert checkpoint is not None
    assert checkpoint.record["step"] == stop

    again = Denoiser(seed=1000 + world.rank)
    resumed = build(again)
    resumed.resume(checkpoint)
    assert resumed.position == Position(epoch=stop // STEPS, examples=stop % STEPS * GLOBAL_BATCH, step=stop)
    assert resumed.fit(3).step == 3 * STEPS
    for (name, a), b in zip(straight.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{name} on rank {world.rank}"
    assert torch.equal(resumed.ema.average, reference.ema.average)  # type: ignore[union-attr]
    ours, theirs = (trainer.optimizer.state_dict()["state"] for trainer in (resumed, reference))
    assert ours.keys() == theirs.keys()
    for number, entries in theirs.items():
        for key, value in entries.items():
            assert torch.equal(ours[number][key], value), (number, key)


@pytest.mark.parametrize(
    "exchange",
    [
        {"strategy": "allreduce", "compression": "topk", "compression_share": 0.2},
        {"strategy": "allreduce", "compression": "powersgd", "compression_rank": 1},
        {"strategy": "allreduce", "compression": "int8"},
        {"strategy": "local-sgd", "sync_every": 2, "adaptive_sync": True},
        {"strategy": "diloco", "sync_every": 4, "compression": "sign"},
    ],
    ids=lambda exchange: "-".join(map(str, exchange.values())),
)
def test_what_ranks_remember_is_resumed(world: World, shared_path: Path, exchange: dict[str, Any]) -> None:
    """Law 8, from a checkpoint of an epoch: there ranks share equally what they remember, and go on with that."""
    rows = torch.randn(EXAMPLES, 5, generator=torch.Generator().manual_seed(2))

    def run(model: nn.Module, epochs: int, name: str, resumed: Path | None = None) -> Trainer:
        batches = Rows(rows, GLOBAL_BATCH // world.size, world)
        folder = Folder(shared_path / name, 3)
        trainer = trainer_of(model, world, squared_error, batches, "mpi", exchange, seed=4, checkpoints=folder)
        if resumed is not None:
            checkpoint = spread(Folder(resumed, 3).newest_good() if world.is_first else None, world)
            assert checkpoint is not None
            trainer.resume(checkpoint)
        trainer.fit(epochs)
        return trainer

    straight, first, again = Denoiser(seed=7), Denoiser(seed=7), Denoiser(seed=1000 + world.rank)
    reference = run(straight, 3, "straight")
    run(first, 2, "first")
    resumed = run(again, 3, "again", shared_path / "first")
    assert torch.equal(weights(again), weights(straight))
    assert same_on_all(world, weights(again))
    ours, theirs = resumed.optimizer.memory(), reference.optimizer.memory()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], kept) for name, kept in theirs.items())
    if world.is_first:  # Whose counts are saved.
        assert resumed.optimizer.moved == reference.optimizer.moved, "totals are of the whole run"


@pytest.mark.parametrize(
    "exchange",
    [
        {"strategy": "allreduce", "compression": "topk", "compression_share": 0.2},
        {"strategy": "local-sgd", "sync_every": 4},
        {"strategy": "diloco", "sync_every": 4},
        {"strategy": "allreduce", "engine": "horovod", "reduce_op": "adasum"},
    ],
    ids=lambda exchange: "-".join(map(str, exchange.values())),
)
def test_what_is_trained_does_not_hang_on_how_long_a_validation_takes(
    world: World, shared_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: dict[str, Any]
) -> None:
    """Saves of these average what each rank has of its own; one comes before a long validation."""
    if "engine" in exchange and (world.launcher == "horovodrun-gloo" or world.size & (world.size - 1)):
        pytest.skip("Adasum is Horovod's over MPI, for a power of two")
    rows = torch.randn(EXAMPLES, 5, generator=torch.Generator().manual_seed(2))
    found = []
    for seconds in (-1.0, float("inf")):
        monkeypatch.setattr("hvdvae.trainer.LONG_SECONDS", seconds)
        losses = iter((3.0, 4.0, 5.0, 6.0))  # The first is the best: no other epoch saves for that.
        model = Denoiser(seed=7)
        trainer = trainer_of(
            model,
            world,
            squared_error,
            Rows(rows, GLOBAL_BATCH // world.size, world),
            "mpi",
            exchange,
            seed=4,
            checkpoints=Folder(shared_path / str(seconds), 3),
            checkpoint_every=3,
            validate=lambda losses=losses: {"loss": next(losses)},
        )
        trainer.fit(4)
        found.append(weights(model))
    assert torch.equal(*found)


class Recorded:
    """A loader that notes the examples, which are all different, in the order of the whole step."""

    def __init__(self, inner: Loader, world: World) -> None:
        self._inner, self._world = inner, world
        self.seen: list[str] = []

    @property
    def examples(self) -> int:
        return self._inner.examples

    def steps(self, start: int = 0) -> int:
        return self._inner.steps(start)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        for batch in self._inner.epoch(epoch, start):
            mine = [f"{zlib.crc32(example.numpy().tobytes()):x}" for example in batch]
            self.seen += [name for names in self._world.gather_objects(mine) for name in names]
            yield batch


def test_a_run_goes_on_at_another_world_size(world: World, alone: World, shared_path: Path) -> None:
    """Law 8: saved by N ranks amid an epoch, resumed by one: the same examples in the same order, near weights."""
    stop, folder = STEPS + 4, Folder(shared_path, 2)
    data = Recorded(loader(world), world)
    straight = vae(seed=3)
    reference = trainer_of(straight, world, loss_with_noise_of_examples, data, ema_decay=0.8)
    reference.fit(3)

    stopping_loss = stopping(loss_with_noise_of_examples, world, stop)
    before = Recorded(loader(world), world)
    trainer_of(vae(seed=3), world, stopping_loss, before, ema_decay=0.8, checkpoints=folder).fit(3)
    checkpoint = spread(folder.newest_good() if world.is_first else None, world)
    assert checkpoint is not None
    assert checkpoint.record["world_size"] == world.size

    one, after = vae(seed=99), Recorded(loader(alone), alone)
    resumed = trainer_of(one, alone, loss_with_noise_of_examples, after, ema_decay=0.8)
    resumed.resume(checkpoint)
    outcome = resumed.fit(3)
    assert outcome.step == 3 * STEPS
    assert len(data.seen) == 3 * STEPS * GLOBAL_BATCH
    assert before.seen + after.seen == data.seen
    torch.testing.assert_close(weights(one), weights(straight), atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(resumed.ema.average, reference.ema.average, atol=2e-5, rtol=1e-3)  # type: ignore[union-attr]


def test_rank_statistics_resume_as_their_mean_at_another_world_size(
    world: World, alone: World, shared_path: Path
) -> None:
    rows = torch.randn(EXAMPLES, 5, generator=torch.Generator().manual_seed(2))
    folder, model = Folder(shared_path, 1), Denoiser(seed=7)
    trainer_of(model, world, squared_error, Rows(rows, 2, world), checkpoints=folder).fit(1)
    checkpoint = spread(folder.newest_good() if world.is_first else None, world)
    assert checkpoint is not None
    one = Denoiser(seed=8)
    trainer_of(one, alone, squared_error, Rows(rows, 2, alone)).resume(checkpoint)
    for name in ("running_mean", "running_var"):
        own: Tensor = getattr(model.layers[1], name).clone()
        torch.testing.assert_close(getattr(one.layers[1], name), world.sum_(own) / world.size)


def test_validation_sees_the_same_statistics_on_all_ranks(world: World) -> None:
    rows = torch.randn(EXAMPLES, 5, generator=torch.Generator().manual_seed(2))
    model = Denoiser(seed=7)
    found: list[Tensor] = []

    def validate() -> dict[str, float]:
        found.append(model.layers[1].running_mean.clone())  # type: ignore[operator, union-attr]
        return {"loss": 1.0}

    trainer_of(model, world, squared_error, Rows(rows, 2, world), validate=validate).fit(1)
    own = model.layers[1].running_mean.clone()  # type: ignore[operator, union-attr]
    assert same_on_all(world, found[0])
    assert same_on_all(world, own) == (world.size == 1), "training goes on with each rank's own"
    torch.testing.assert_close(found[0], world.sum_(own) / world.size)


@pytest.mark.parametrize(("name", "count"), [("mlp", 45), ("mlp2", 64), ("conv", 70), ("mlp", 2)])
def test_evaluation_gives_the_same_bits_at_every_world_size(world: World, alone: World, name: str, count: int) -> None:
    """Law 9, also where ranks get different numbers of chunks, or none."""
    torch.manual_seed(6)
    sizes: dict[str, Any] = {"channels": [4, 8]} if name == "conv" else {"hidden": [8] * (2 if name == "mlp2" else 1)}
    model = build_model(name, (1, 8, 8), latent=[4, 3] if name == "mlp2" else [4], **sizes)
    pixels = np.random.default_rng(1).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)
    source = ArraySource(pixels, "images")
    for binarization in ("dynamic", "none"):
        together = assess(model, source, world, binarization=binarization, samples=20, seed=3)
        single = assess(model, source, alone, binarization=binarization, samples=20, seed=3)
        assert len(together.nll_per_example) == count
        for field in ("nll_per_example", "rate_per_example", "distortion_per_example"):
            assert getattr(together, field).tobytes() == getattr(single, field).tobytes(), field
        for field in ("kl_per_dimension", "mean_variance"):
            for mine, theirs in zip(getattr(together, field), getattr(single, field), strict=True):
                assert mine.tobytes() == theirs.tobytes(), field
        assert (together.nll, together.elbo, together.active_units) == (single.nll, single.elbo, single.active_units)
        assert len(set(world.gather_objects(repr(together.nll)))) == 1
    other_noise = assess(model, source, world, binarization="none", samples=20, seed=4)
    assert other_noise.nll != together.nll


def test_a_real_data_set_is_split_alike_on_all_ranks(world: World) -> None:
    dataset = open_dataset("digits")
    for split in (dataset.train, dataset.validation, dataset.test):
        content = split.gather(np.arange(len(split), dtype=np.int64)).tobytes()
        assert len(set(world.gather_objects(f"{len(split)} {zlib.crc32(content)}"))) == 1


def test_one_rank_that_is_not_finite_stops_all_at_the_same_step(world: World) -> None:
    """Each rank raises, so none waits for another."""
    from hvdvae.errors import NonFiniteError

    calls = iter(range(100))

    def loss(model: nn.Module, batch: Tensor, epoch: float) -> dict[str, Tensor]:
        terms = loss_with_noise_of_examples(model, batch, epoch)
        if next(calls) >= 2 and world.rank == world.size - 1:
            terms["loss"] = terms["loss"] * float("nan")
        return terms

    trainer = trainer_of(vae(1), world, loss, loader(world), skip_limit=3)
    with pytest.raises(NonFiniteError, match="--skip-limit 3"):
        trainer.fit(1)
    stopped_at = f"step {trainer.position.step}, {trainer.optimizer.skipped_steps} skipped"
    assert set(world.gather_objects(stopped_at)) == {"step 5, 4 skipped"}
    assert same_on_all(world, weights(trainer.model))
