"""Averaged weights are evaluated, saved and loaded with BatchNorm statistics that are theirs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvdvae import checkpoint as checkpoints
from hvdvae.checkpoint import Folder
from hvdvae.data import ArraySource, Loader
from hvdvae.resume import load_weights
from hvdvae.strategies import DistributedOptimizer
from hvdvae.strategies.sync_batch_norm import convert_sync_batch_norm
from hvdvae.trainer import Trainer
from hvdvae.world import World

EXAMPLES = 240


def data() -> Tensor:
    return torch.randn(EXAMPLES, 8, generator=torch.Generator().manual_seed(3)).clamp(-2, 2) / 4 + 0.5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.frozen = nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.tensor(0))

    def train(self, mode: bool = True) -> "Net":
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + len(x)
        return self.last(self.norm(self.frozen(self.first(x))))  # type: ignore[no-any-return]


def trainer_of(world: World, model: Net, folder: Path | None = None, validate: Any = None, **options: Any) -> Trainer:
    strategy = {"strategy": "allreduce" if world.size > 1 else "local", **options}
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.5), model, world=world, **strategy)
    source = ArraySource(data().numpy(), "x")
    place = {"rank": world.rank, "size": world.size}
    batches = Loader(source, batch=48 // world.size, binarization="none", likelihood="gaussian", **place)
    kept = Folder(folder, 3) if folder is not None else None

    def loss(model: nn.Module, batch: Any, epoch: float) -> Tensor:
        return (model(batch) - batch).square().mean()

    return Trainer(model, optimizer, loss, batches, ema_decay=0.9, validate=validate, checkpoints=kept)


def of_all(model: Net) -> tuple[Tensor, Tensor]:
    """Mean and variance before the layer, with the weights that the model holds."""
    with torch.no_grad():
        before = model.frozen(model.first(data()))
    return before.mean(0), before.var(0)


@pytest.mark.parametrize("kind", ["plain", "sync"])
def test_the_average_is_evaluated_saved_and_loaded_with_its_own(world: World, shared_path: Path, kind: str) -> None:
    model = Net()
    if kind == "sync":
        convert_sync_batch_norm(model, world)
    seen: list[tuple[Tensor, ...]] = []
    own: list[dict[str, Tensor]] = []

    def validate() -> dict[str, float]:
        assert not model.training
        mean, variance = of_all(model)
        seen.append((mean, variance, model.norm.running_mean.clone(), model.norm.running_var.clone()))  # type: ignore[union-attr]
        assert model.frozen.running_mean.abs().max() == 0  # type: ignore[union-attr]
        return {"loss": float((model(data()) - data()).square().mean())}

    trainer = trainer_of(world, model, shared_path, validate)
    trainer.fit(3)
    for mean, variance, found_mean, found_variance in seen:
        torch.testing.assert_close(found_mean, mean, atol=0.02, rtol=0)
        torch.testing.assert_close(found_variance, variance, atol=0.02, rtol=0.15)
    # Training goes on with its own: what the model has is of the weights that it has.
    own.append({name: value.clone() for name, value in model.state_dict().items()})
    assert int(model.norm.num_batches_tracked) == 3 * 5  # type: ignore[arg-type]
    assert int(model.seen) == 3 * 5 * 48 // world.size
    assert model.norm.momentum == 0.1
    assert not torch.allclose(model.norm.running_mean, seen[-1][2])  # type: ignore[arg-type]

    newest = Folder(shared_path, 3).newest_good() if world.is_first else None
    source = checkpoints.spread(newest, world)
    assert source is not None
    loaded = Net()
    load_weights(loaded, source, ema=True)
    torch.testing.assert_close(loaded.norm.running_mean, seen[-1][2])
    torch.testing.assert_close(loaded.norm.running_var, seen[-1][3])
    plain = Net()
    load_weights(plain, source)
    assert not torch.allclose(plain.norm.running_mean, seen[-1][2])  # type: ignore[arg-type]
    other = trainer_of(world, Net())
    other.resume(source)
    assert other.averaged_statistics is not None
    torch.testing.assert_close(other.averaged_statistics.values["norm.running_var"], seen[-1][3])


def test_a_run_that_measures_trains_as_one_that_does_not(world: World, shared_path: Path) -> None:
    found = []
    for validates in (False, True):
        model = Net()
        trainer = trainer_of(world, model, None, (lambda: {"loss": 1.0}) if validates else None)
        trainer.fit(3)
        found.append([*model.state_dict().values(), trainer.ema.average])  # type: ignore[union-attr]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_checkpoint_without_a_validation_has_them_too(world: World, shared_path: Path) -> None:
    model = Net()
    trainer = trainer_of(world, model, shared_path)
    trainer.fit(1)
    assert trainer.averaged_statistics is not None
    with trainer.ema.applied():  # type: ignore[union-attr]
        mean, _ = of_all(model)
    torch.testing.assert_close(trainer.averaged_statistics.values["norm.running_mean"], mean, atol=0.02, rtol=0)
    assert np.isfinite(trainer.averaged_statistics.values["norm.running_var"].numpy()).all()
