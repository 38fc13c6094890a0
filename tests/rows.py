"""A user's own data: rows of a tensor. N ranks with batch B see together what one sees with batch N * B."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hvdvae.world import World


class Rows:
    """The trainer's `Batches`, without the package's loader. `seen` notes what this rank was given."""

    def __init__(self, rows: Tensor, batch: int, world: World) -> None:
        self._rows, self._batch, self._world = rows, batch, world
        self.seen: list[Tensor] = []

    @property
    def examples(self) -> int:
        return len(self._rows)

    def steps(self, start: int = 0) -> int:
        return (len(self._rows) - start) // (self._batch * self._world.size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        order = torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(epoch))
        for step in range(self.steps(start)):
            first = start + (step * self._world.size + self._world.rank) * self._batch
            self.seen.append(order[first : first + self._batch])
            yield self._rows[self.seen[-1]]
