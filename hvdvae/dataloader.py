"""A torch DataLoader as the trainer's batches (batch.Batches): cut over ranks, in an order that a resume finds again.

    shuffle=True              a new order each epoch, a function of (seed, epoch), the same on all ranks; of each step's
                              batch_size x ranks examples rank r takes the r-th part, so that N ranks see together what
                              one process sees with N times the batch
    shuffle=False             the order of the data, cut in the same way
    a sampler of the user's   its indices, drawn alike on all ranks, cut in the same way
    a DistributedSampler      this rank's share, as it says it; set_epoch is called

Without drop_last the last step of an epoch is filled up to equal shares with examples from the beginning of its order,
as a DistributedSampler does it: ranks take equally many steps, always.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from hvdvae.batch import Batch, Batches
from hvdvae.errors import ConfigError
from hvdvae.seeding import stream

if TYPE_CHECKING:
    from hvdvae.world import World

_ORDER, _SAMPLER, _WORKERS, _DRAWS = 101, 102, 103, 104
"""Tell streams of the seed apart."""


class DataLoaderBatches:
    """One rank's batches of a DataLoader."""

    def __init__(
        self, loader: DataLoader[Any], *, rank: int, size: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        """Look at the loader; nothing is read. Raises ConfigError for one that cannot be cut over ranks, or resumed."""
        check_loader(loader)
        self._loader, self._seed, self._device = loader, seed, torch.device(device)
        self._is_cut_by_sampler = _is_distributed(loader.sampler)
        self._rank, self._size = rank, size
        if self._is_cut_by_sampler:
            self._check_share(rank, size)
        elif loader.batch_size is None and size > 1:
            raise ConfigError(
                f"the DataLoader has a batch_sampler ({type(loader.batch_sampler).__name__}), whose batches cannot be "
                f"cut over {size} ranks: give it a batch_size and a sampler"
            )
        self._plan = _Plan()
        self._generator = torch.Generator()
        self._batches = _with_plan(loader, self._plan, self._generator)

    @property
    def examples(self) -> int:
        """Examples of an epoch, all ranks."""
        sampler = self._loader.sampler
        if isinstance(sampler, DistributedSampler):
            return len(sampler.dataset)  # type: ignore[arg-type]
        return len(sampler) * (self._size if self._is_cut_by_sampler else 1)  # type: ignore[arg-type]

    @property
    def alike(self) -> str:
        """What must be the same on all ranks: a digest of the order that they cut, or "" where each has its own."""
        if self._is_cut_by_sampler or self._size == 1:
            return ""
        return hashlib.sha256(repr(self._order(0)).encode()).hexdigest()

    def reshare(self, rank: int, size: int) -> None:
        """From the next `epoch` on, take the share of `rank` of `size`.

        Raises ConfigError where a sampler has cut the data for another number of ranks.
        """
        if self._is_cut_by_sampler:
            self._check_share(rank, size)
        self._rank, self._size = rank, size

    def steps(self, start: int = 0) -> int:
        """Steps from position `start` (examples that all ranks have seen in this epoch) to its end."""
        if self._loader.batch_size is None:
            return len(self._cuts(0, start))
        batch = self._loader.batch_size * self._size
        left = max(0, self._length() - start)
        return left // batch if self._loader.drop_last else -(-left // batch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches from position `start` of an epoch, on the device; equally many on every rank.

        Workers, where there are some, begin anew with a seed of (seed, rank, epoch); without workers each batch is
        drawn with one of (seed, rank, epoch, position).
        """
        self._plan.cuts = self._cuts(epoch, start)
        self._generator.manual_seed(_signed(stream(_WORKERS, self._seed, self._rank, epoch)))
        batches = iter(self._batches)
        for number in itertools.count():
            if not self._loader.num_workers:
                key = stream(_DRAWS, self._seed, self._rank, epoch, start, number)
                torch.default_generator.manual_seed(key)
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield to_device(batch, self._device)

    def _length(self) -> int:
        return len(self._loader.sampler) * (self._size if self._is_cut_by_sampler else 1)  # type: ignore[arg-type]

    def _order(self, epoch: int) -> list[Any]:
        """Indices of an epoch: of all ranks, or of this rank's share where a sampler has cut it."""
        return order_of(self._loader, stream(_ORDER, self._seed, epoch), epoch)

    def _cuts(self, epoch: int, start: int) -> list[list[Any]]:
        """Indices of this rank's batches."""
        if self._loader.batch_size is None:
            with _seeded(stream(_SAMPLER, self._seed, epoch)):
                cuts = [list(cut) for cut in cast(Any, self._loader.batch_sampler)]
            seen = list(itertools.accumulate(len(cut) for cut in cuts))
            return [cut for cut, end in zip(cuts, seen, strict=True) if end > start]
        order, batch = self._order(epoch), self._loader.batch_size
        if self._is_cut_by_sampler:
            own = order[start // self._size :]
            cuts = [own[first : first + batch] for first in range(0, len(own), batch)]
            return [cut for cut in cuts if len(cut) == batch] if self._loader.drop_last else cuts
        cuts = []
        for first in range(start, start + self.steps(start) * batch * self._size, batch * self._size):
            each = min(batch, -(-(len(order) - first) // self._size))
            mine = first + self._rank * each
            cuts.append([order[place % len(order)] for place in range(mine, mine + each)])
        return cuts

    def _check_share(self, rank: int, size: int) -> None:
        sampler = cast(Any, self._loader.sampler)
        if (sampler.num_replicas, sampler.rank) != (size, rank):
            raise ConfigError(
                f"the DataLoader's {type(sampler).__name__} cuts for rank {sampler.rank} of {sampler.num_replicas}, "
                f"this is rank {rank} of {size}: make it with num_replicas=world.size, rank=world.rank, or leave it "
                "out: the trainer cuts a DataLoader over ranks by itself"
            )


class _Plan:
    """Where a DataLoader gets its batches of indices from: the next epoch's."""

    def __init__(self) -> None:
        self.cuts: list[list[Any]] = []

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.cuts)

    def __len__(self) -> int:
        return len(self.cuts)


def check_alike(batches: Batches, world: "World", start: int) -> None:
    """Raises ConfigError, on all ranks, where they would not take the same steps from `start`, and wait for ever.

    Blocks; every rank must call it.
    """
    mine = [batches.examples, batches.steps(start), getattr(batches, "alike", "")]
    found = world.gather_objects(mine, "comparison of batches")
    examples, steps, order = found[0]
    for rank, theirs in enumerate(found):
        if theirs[:2] != [examples, steps]:
            raise ConfigError(
                f"rank {rank} has {theirs[1]} steps left in an epoch of {theirs[0]} examples, rank 0 {steps} in one of "
                f"{examples}: give all ranks the same data, of which each takes its share"
            )
        if theirs[2] != order:
            raise ConfigError(
                f"the sampler of rank {rank} has another order than rank 0's, and the trainer cuts one order over all "
                "ranks: seed it alike, or have it cut by itself, with num_replicas, rank and set_epoch, as a "
                "DistributedSampler does"
            )


def check_loader(loader: DataLoader[Any]) -> None:
    """Raises ConfigError for a DataLoader whose examples have no numbers, or that is more than a DataLoader."""
    if isinstance(loader.dataset, IterableDataset):
        raise ConfigError(
            f"the DataLoader reads a stream ({type(loader.dataset).__name__} is an IterableDataset): it has no order "
            "that could be cut over ranks or resumed. Expected a dataset with __getitem__ and __len__, or batches of "
            "your own (hvdvae.batch.Batches)"
        )
    if loader.batch_size is None and loader.batch_sampler is None:
        raise ConfigError("the DataLoader has batch_size=None, expected a number of examples for each rank's step")
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ConfigError(
            f"{type(loader).__name__} changes how a DataLoader is iterated, which a cut over ranks would lose: give "
            "the trainer a plain torch DataLoader, or batches of your own (hvdvae.batch.Batches)"
        )
    if not hasattr(loader.sampler, "__len__"):
        raise ConfigError(
            f"the DataLoader's sampler ({type(loader.sampler).__name__}) has no length: give it __len__, so that all "
            "ranks take equally many steps"
        )


def order_of(loader: DataLoader[Any], seed: int, epoch: int) -> list[Any]:
    """Indices in the order of an epoch, which follows from the seed, whatever was drawn before. Mutates a sampler."""
    sampler: Any = loader.sampler
    if type(sampler) is SequentialSampler:
        return list(range(len(sampler)))
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return torch.randperm(len(sampler), generator=torch.Generator().manual_seed(_signed(seed))).tolist()
    if _is_distributed(sampler):
        sampler.set_epoch(epoch)
        return list(sampler)
    with _seeded(seed):
        if isinstance(getattr(sampler, "generator", None), torch.Generator):
            sampler.generator.manual_seed(_signed(seed))
        return list(sampler)


def with_cuts(loader: DataLoader[Any], cuts: Sequence[list[Any]]) -> DataLoader[Any]:
    """The same DataLoader, of these batches of indices."""
    plan = _Plan()
    plan.cuts = list(cuts)
    return _with_plan(loader, plan, torch.Generator().manual_seed(0))


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; what is no tensor stays."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_make"):
        return batch._make(to_device(value, device) for value in batch)
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _with_plan(loader: DataLoader[Any], plan: _Plan, generator: torch.Generator) -> DataLoader[Any]:
    options: dict[str, Any] = {"prefetch_factor": loader.prefetch_factor} if loader.num_workers else {}
    return DataLoader(
        loader.dataset,
        batch_sampler=cast(Any, plan),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if loader.num_workers else None,
        generator=generator,
        persistent_workers=loader.persistent_workers,
        **options,
    )


def _is_distributed(sampler: Any) -> bool:
    return all(hasattr(sampler, name) for name in ("num_replicas", "rank", "set_epoch"))


def _signed(seed: int) -> int:
    return seed - (1 << 64) if seed >= 1 << 63 else seed


class _seeded:  # noqa: N801 - a context
    """Inside, the default generators of Python, NumPy and torch are at the beginning of a stream of their own."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - as samplers do
        random.seed(self._seed)
        np.random.seed(self._seed % (1 << 32))  # noqa: NPY002
        torch.default_generator.manual_seed(_signed(self._seed))

    def __exit__(self, *_: object) -> None:
        python, numpy, ours = self._before
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(ours)
