"""One rank's batches of an epoch, ready for the model: float32, on its device."""

import itertools
import math
from collections.abc import Generator, Iterable

import numpy as np
import torch

from hvdvae.data.accelerator import AcceleratorFeed
from hvdvae.data.binarize import training_key
from hvdvae.data.check import check_size, check_support
from hvdvae.data.inputs import to_input
from hvdvae.data.prefetch import prefetched
from hvdvae.data.read import read
from hvdvae.data.sampler import epoch_order, local_batch, rank_indices, steps_left
from hvdvae.data.source import Indices, Source
from hvdvae.data.values import chosen_binarization

BATCHES_AT_ONCE, BYTES_AT_ONCE = 8, 4 << 20
"""Batches that are made in one go from data in memory, and the most they may take."""


class Loader:
    """Batches of one rank. Keeps no state between epochs: a batch is a function of (seed, epoch, position).

    `binarization`: dynamic, static, none, or None for what the data calls for (`chosen_binarization`).
    On a CPU, neither the examples of a global step nor their binarization depend on how many ranks share it.
    Raises DataError or ConfigError for a source that cannot be trained on (see `check_support`,
    `check_size`).
    """

    batch: int
    """Examples a rank takes in a step; less than asked for where the data does not fill one global batch."""
    global_batch: int
    """Examples that all ranks together take in a step: what a position moves on by."""

    def __init__(
        self,
        source: Source,
        *,
        batch: int,
        rank: int = 0,
        size: int = 1,
        seed: int = 0,
        likelihood: str = "bernoulli",
        binarization: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        binarization = chosen_binarization(source, likelihood, binarization)
        check_size(source, size, batch)
        check_support(source, likelihood, binarization)
        self.source, self.seed = source, seed
        self._asked_batch = batch
        self.reshare(rank, size)
        self._binarization = binarization
        device = torch.device(device)
        self._accelerator = (
            AcceleratorFeed(source, binarization=binarization, seed=seed, device=device)
            if device.type != "cpu"
            else None
        )

    @property
    def examples(self) -> int:
        """Examples of an epoch, all ranks together, the left-out remainder included."""
        return len(self.source)

    def reshare(self, rank: int, size: int) -> None:
        """From the next `epoch` on, take the share of `rank` of `size`; an epoch may go on at the position it has."""
        self._rank, self._size = rank, size
        # From the batch asked for: many ranks may have had to take a smaller one, and a new rank knows of no history.
        self.batch = local_batch(len(self.source), self._asked_batch, size)
        self.global_batch = self.batch * size

    def steps(self, start: int = 0) -> int:
        """Steps from position `start` to the end of an epoch, the same on every rank; whole ones only."""
        return steps_left(len(self.source), self.batch, self._size, start)

    def epoch(self, epoch: int, start: int = 0) -> Generator[torch.Tensor, None, None]:
        """Batches (batch, *shape), float32, of `epoch` from position `start`, on the device.

        Position: examples that all ranks together have seen in this epoch; it may come from a run of another
        size. In-memory data is gathered by the caller. Other data is read by a thread up to three batches
        ahead, which ends with the iterator. Raises DataError naming the file if reading fails.
        """
        order = epoch_order(self.seed, epoch, len(self.source))
        starts = range(start, start + self.steps(start) * self.global_batch, self.global_batch)
        cuts = (rank_indices(order, first, self.batch, self._rank, self._size) for first in starts)
        if self._accelerator is not None:
            return self._accelerator.batches(cuts, epoch)
        key = training_key(self._binarization, self.seed, epoch)
        if self.source.in_memory:
            return self._host_batches(cuts, key)
        return prefetched(self._host_batch(examples, key) for examples in cuts)

    def _host_batches(self, cuts: Iterable[Indices], key: int) -> Generator[torch.Tensor, None, None]:
        # Several at once: alone, each would find code and tables gone from the cache after a training step.
        count = max(1, min(BATCHES_AT_ONCE, BYTES_AT_ONCE // (4 * self.batch * math.prod(self.source.shape))))
        ahead = iter(cuts)
        while some := list(itertools.islice(ahead, count)):
            yield from torch.split(self._host_batch(np.concatenate(some), key), self.batch)

    def _host_batch(self, examples: Indices, key: int) -> torch.Tensor:
        return to_input(
            read(self.source, examples),
            peak=self.source.peak,
            binarization=self._binarization,
            key=key,
            examples=examples,
        )
