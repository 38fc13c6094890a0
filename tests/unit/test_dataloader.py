"""A torch DataLoader as a run's batches: what ranks see together, in which order, and what is refused by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from hvdvae.dataloader import DataLoaderBatches
from hvdvae.errors import ConfigError
from hvdvae.strategies import DistributedOptimizer
from hvdvae.trainer import Trainer
from hvdvae.world import World

WORLD = World.alone(device="cpu")
NUMBERS = torch.arange(26.0)


def ranks(size: int, loader: DataLoader[Any] | None = None, **options: Any) -> list[DataLoaderBatches]:
    chosen = loader if loader is not None else DataLoader(NUMBERS, **options)  # type: ignore[arg-type]
    return [DataLoaderBatches(chosen, rank=rank, size=size, seed=4) for rank in range(size)]


def steps(batches: list[DataLoaderBatches], epoch: int = 0, start: int = 0) -> list[list[float]]:
    """What all ranks see in each step, in the order of ranks."""
    each = [[batch.tolist() for batch in rank.epoch(epoch, start)] for rank in batches]  # type: ignore[union-attr]
    assert {len(rank) for rank in each} == {batches[0].steps(start)}, "equally many on every rank"
    return [[number for part in step for number in part] for step in zip(*each, strict=True)]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_several_ranks_see_what_one_sees_with_a_larger_batch(shuffle: bool, drop_last: bool) -> None:
    for epoch in (0, 1):
        one = steps(ranks(1, batch_size=8, shuffle=shuffle, drop_last=drop_last), epoch)
        two = steps(ranks(2, batch_size=4, shuffle=shuffle, drop_last=drop_last), epoch)
        assert two == one
    assert sum(map(len, one)) == (24 if drop_last else 26)
    in_order = [number for step in one for number in step] == NUMBERS[: 24 if drop_last else 26].tolist()
    assert in_order != shuffle


def test_epochs_differ_and_come_again() -> None:
    torch.manual_seed(1)
    first = [steps(ranks(2, batch_size=4, shuffle=True), epoch) for epoch in (0, 1)]
    torch.manual_seed(2)
    again = [steps(ranks(2, batch_size=4, shuffle=True), epoch) for epoch in (0, 1)]
    assert first == again
    assert first[0] != first[1]


def test_the_last_step_is_filled_up_to_equal_shares() -> None:
    found = steps(ranks(3, batch_size=4))
    assert [len(step) for step in found] == [12, 12, 3]
    assert found[-1] == [24.0, 25.0, 0.0]


@pytest.mark.parametrize("size", [1, 2])
def test_an_epoch_goes_on_where_it_was_left_at_any_size(size: int) -> None:
    whole = steps(ranks(1, batch_size=4, shuffle=True), 3)
    rest = steps(ranks(size, batch_size=4 // size, shuffle=True), 3, start=8)
    assert rest == whole[2:]


def test_a_distributed_sampler_says_which_examples_are_whose() -> None:
    dataset = TensorDataset(NUMBERS)
    found: list[list[float]] = []
    for rank in range(2):
        sampler: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=2, rank=rank, seed=9)
        loader = DataLoader(dataset, batch_size=4, sampler=sampler)
        mine = DataLoaderBatches(loader, rank=rank, size=2, seed=0)
        assert (mine.examples, mine.steps(), mine.steps(8)) == (26, 4, 3)
        found.append([n for (batch,) in mine.epoch(1) for n in batch.tolist()])
        sampler.set_epoch(1)
        assert found[-1] == NUMBERS[list(sampler)].tolist(), "set_epoch is called"
        assert [n for (batch,) in mine.epoch(1, 8) for n in batch.tolist()] == found[-1][4:]
    assert sorted(found[0] + found[1]) == NUMBERS.tolist()
    with pytest.raises(ConfigError, match="cuts for rank 1 of 2, this is rank 0 of 2"):
        DataLoaderBatches(loader, rank=0, size=2, seed=0)


def test_a_users_sampler_is_drawn_alike_on_all_ranks() -> None:
    sampler = WeightedRandomSampler([1.0, 2.0] * 13, 16)
    two = steps(ranks(2, batch_size=4, sampler=sampler), 5)
    torch.manual_seed(77)
    one = steps(ranks(1, batch_size=8, sampler=sampler), 5)
    assert one == two
    assert [len(step) for step in one] == [8, 8]


class Noisy(Dataset[Tensor]):
    """Augments by torch's generator."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(3)


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_differs_over_ranks_and_comes_again(workers: int) -> None:
    loader = DataLoader(Noisy(), batch_size=3, num_workers=workers)
    torch.manual_seed(5)
    first = [torch.cat(list(rank.epoch(2))) for rank in ranks(2, loader)]  # type: ignore[arg-type]
    torch.manual_seed(6)
    again = [torch.cat(list(rank.epoch(2))) for rank in ranks(2, loader)]  # type: ignore[arg-type]
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0].frac(), first[1].frac())


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(NUMBERS)


class Other(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter([])


class Endless(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Stream(), batch_size=2), "Stream is an IterableDataset"),
        (DataLoader(NUMBERS, batch_size=None), "batch_size=None"),  # type: ignore[arg-type]
        (Other(NUMBERS, batch_size=2), "Other changes how a DataLoader is iterated"),
        (DataLoader(NUMBERS, batch_size=2, sampler=Endless()), "Endless.* has no length"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(loader: DataLoader[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataLoaderBatches(loader, rank=0, size=1, seed=0)


def test_a_batch_sampler_is_taken_as_it_is_by_one_process_and_refused_by_several() -> None:
    sampler = BatchSampler(SequentialSampler(NUMBERS), 5, drop_last=False)  # type: ignore[arg-type]
    loader = DataLoader(NUMBERS, batch_sampler=sampler)  # type: ignore[arg-type]
    assert [len(step) for step in steps(ranks(1, loader))] == [5, 5, 5, 5, 5, 1]
    assert [len(step) for step in steps(ranks(1, loader), start=10)] == [5, 5, 5, 1]
    with pytest.raises(ConfigError, match="batch_sampler"):
        ranks(2, loader)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def trainer_of(folder: Path | None, **options: Any) -> Trainer:
    model = network()
    wrapped = DistributedOptimizer(torch.optim.Adam(model.parameters()), model, world=WORLD, strategy="local")
    rows = torch.randn(26, 3, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(rows, rows.square())

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], epoch: float) -> Tensor:
        x, y = batch
        return (model(x) - y).square().mean()

    training = DataLoader(data, batch_size=4, shuffle=True)
    return Trainer(model, wrapped, loss, training, validate=DataLoader(data, batch_size=8), folder=folder, **options)


def test_a_run_is_kept_in_its_folder_and_resumed_from_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = trainer_of(tmp_path / "whole")
    assert not whole.resume()
    whole.fit(4)
    first = trainer_of(tmp_path / "run")
    first.fit(2)
    second = trainer_of(tmp_path / "run")
    assert second.resume()
    assert "resumed at step 14 of" in capfd.readouterr().err
    second.fit(4)
    for mine, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert second.best == whole.best
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum('"kind": "epoch"' in line for line in lines) == 4
    assert '"validation_loss"' in lines[-1]
    assert (tmp_path / "run" / "checkpoints" / "best.safetensors").exists()
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_validation_is_the_mean_over_all_examples(tmp_path: Path) -> None:
    trainer = trainer_of(None)
    trainer.fit(1)
    rows = torch.randn(26, 3, generator=torch.Generator().manual_seed(0))
    expected = (trainer.model(rows) - rows.square()).square().mean()
    assert trainer.best == pytest.approx(expected.item(), rel=1e-6)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="folder stands for checkpoints and monitors"):
        trainer_of(Path("nowhere"), monitors=[object()])
    with pytest.raises(ConfigError, match="no folder to look in"):
        trainer_of(None).resume()
