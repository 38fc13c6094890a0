"""A torch DataLoader over ranks: N of them are one process with N times the batch, and those that differ are named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from hvdvae.errors import ConfigError
from hvdvae.strategies import DistributedOptimizer
from hvdvae.trainer import Trainer
from hvdvae.world import World

GLOBAL_BATCH = 8
GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(44, 3, generator=GENERATOR)  # Six steps, the last of four examples.
DATA = TensorDataset(ROWS, ROWS.square())


def loss(model: nn.Module, batch: tuple[Tensor, Tensor], epoch: float) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def trainer_of(world: World, training: DataLoader[Any], *, first: int = 0, **options: Any) -> Trainer:
    torch.manual_seed(first)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    way: dict[str, Any] = {"strategy": "local"}
    if world.launcher != "none":
        way = {"strategy": "allreduce", "engine": "horovod" if world.launcher == "horovodrun-gloo" else "mpi"}
    plain = torch.optim.Adam(model.parameters(), lr=0.02)
    wrapped = DistributedOptimizer(plain, model, world=world, **way)
    return Trainer(model, wrapped, loss, training, seed=3, **options)


def loader(size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=GLOBAL_BATCH // size, **options)


@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_are_one_process_with_the_whole_batch(world: World, tmp_path: Path, shuffle: bool) -> None:
    """Training, and the mean loss of validation."""
    alone = World.alone(device="cpu")
    many = trainer_of(world, loader(world.size, shuffle=shuffle), first=world.rank, validate=loader(1))
    one = trainer_of(alone, loader(1, shuffle=shuffle), validate=loader(1))
    outcome, expected = many.fit(3), one.fit(3)
    assert (outcome.step, outcome.epochs) == (expected.step, expected.epochs) == (18, 3)
    for mine, theirs in zip(many.model.parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-3)
    assert many.best == pytest.approx(one.best, rel=1e-4)


def test_a_run_goes_on_from_its_folder(world: World, shared_path: Path) -> None:
    """Rank 0's folder is found by all."""
    options: dict[str, Any] = {"validate": loader(1), "folder": shared_path / "run"}
    first = trainer_of(world, loader(world.size, shuffle=True), **options)
    assert not first.resume()
    first.fit(2)
    world.barrier()
    second = trainer_of(world, loader(world.size, shuffle=True), first=world.rank + 5, **options)
    assert second.resume()
    assert (second.position.epoch, second.position.step) == (2, 12)
    second.fit(3)
    whole = trainer_of(world, loader(world.size, shuffle=True))
    whole.fit(3)
    for mine, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_distributed_sampler_cuts_by_itself(world: World) -> None:
    sampler: DistributedSampler[Any] = DistributedSampler(DATA, num_replicas=world.size, rank=world.rank, seed=1)
    trainer = trainer_of(world, DataLoader(DATA, batch_size=GLOBAL_BATCH // world.size, sampler=sampler))
    outcome = trainer.fit(2)
    assert outcome.step == 12
    assert sampler.epoch == 1


def test_ranks_with_other_data_are_named_before_they_wait_for_each_other(world: World) -> None:
    if world.size == 1:
        pytest.skip("one rank differs from nobody")
    fewer = Subset(DATA, range(44 - 8 * world.rank))
    with pytest.raises(ConfigError, match=r"rank 1 has . steps left in an epoch of 36 examples, rank 0 6 in one of 44"):
        trainer_of(world, DataLoader(fewer, batch_size=GLOBAL_BATCH // world.size)).fit(1)


class Own(RandomSampler):
    """Its order is that of its rank."""

    def __init__(self, rank: int) -> None:
        super().__init__(DATA)
        self._rank = rank

    def __iter__(self) -> Any:
        return iter(torch.randperm(44, generator=torch.Generator().manual_seed(self._rank)).tolist())


def test_a_sampler_that_draws_otherwise_on_each_rank_is_named(world: World) -> None:
    if world.size == 1:
        pytest.skip("one rank differs from nobody")
    with pytest.raises(ConfigError, match="the sampler of rank 1 has another order than rank 0's"):
        trainer_of(world, DataLoader(DATA, batch_size=2, sampler=Own(world.rank))).fit(1)
    world.barrier()
