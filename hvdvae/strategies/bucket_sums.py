"""Sums of buckets of gradients over ranks, each piece for the rank whose slice it is, under way during backward.

Sending never blocks: another rank may have to come through a sum of its own first (SyncBatchNorm's in backward), or
sends this bucket at its step only. So each carrier starts sums that go on while the rank computes, MPI on a
communicator that nothing else uses, Horovod by names.

Shapes: a bucket is a piece (b,) of a vector (P,) of which every rank has a slice.
"""

import os
import time
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from hvdvae.strategies.overlap import overlap
from hvdvae.world import World
from hvdvae.world.collectives import slice_of

MESSAGE = 2**20
"""Elements. In pieces: MPI needs room of its own for what it sums."""


class Sum(Protocol):
    """One that is under way."""

    nbytes: int
    """That this rank holds for it."""

    def is_done(self) -> bool:
        """Whether it has come. Local; moves it on."""

    def result(self) -> Tensor:
        """The bucket (b,), of which this rank's slice holds the sum over ranks. Blocks until it has come."""


class Sums(Protocol):
    """One way of carrying them. Every rank must start the same sums, in one order; when is its own affair."""

    halves: int
    """Of a ring that a sum takes: a reduce-scatter is one, an allreduce two."""

    def start(self, vector: Tensor, start: int, round_: int) -> Sum:
        """Begin the sum of a bucket (b,), at `start` in the vector. Does not block; `vector` belongs to it.

        `round_`: which of this bucket's since the last step.
        """


class OneSum:
    """Of one process, and what it says: the bucket itself."""

    def __init__(self, vector: Tensor) -> None:
        """It has come."""
        self._vector, self.nbytes = vector, vector.nbytes

    def is_done(self) -> bool:
        """As Sum's."""
        return True

    def result(self) -> Tensor:
        """As Sum's."""
        return self._vector


class OwnSums:
    """Of one process."""

    halves = 0

    def start(self, vector: Tensor, start: int, round_: int) -> Sum:
        """As Sums'."""
        return OneSum(vector)


class MessageSums:
    """Over MPI: an MPI_Ireduce to each owner. Vectors of a GPU are staged through host memory."""

    halves = 1

    def __init__(self, world: World, length: int) -> None:
        """`length`: P. Blocks; every rank must call it."""
        self._slices = [slice_of(length, rank, world.size) for rank in range(world.size)]
        self._rank = world.rank
        with world.waiting("communicator for gradients"):
            self._comm = world.comm.Dup()

    def start(self, vector: Tensor, start: int, round_: int) -> Sum:
        """As Sums'."""
        from mpi4py import MPI

        host, whole = vector.cpu(), slice(start, start + len(vector))
        requests = []
        for rank, owned in enumerate(self._slices):
            piece = overlap(owned, whole)
            for begin in range(piece.start, piece.stop, MESSAGE):
                part = host[begin - start : min(begin + MESSAGE, piece.stop) - start].numpy()
                if rank == self._rank:
                    requests.append(self._comm.Ireduce(MPI.IN_PLACE, part, root=rank))
                else:
                    requests.append(self._comm.Ireduce(part, None, root=rank))
        return _MessageSum(vector, host, requests)


class _MessageSum:
    def __init__(self, vector: Tensor, host: Tensor, requests: list[Any]) -> None:
        self._vector, self._host, self._requests = vector, host, requests
        self.nbytes = vector.nbytes

    def is_done(self) -> bool:
        from mpi4py import MPI

        return bool(MPI.Request.Testall(self._requests))

    def result(self) -> Tensor:
        from mpi4py import MPI

        MPI.Request.Waitall(self._requests)
        return self._host.to(self._vector.device)


class HorovodSums:
    """Over Horovod (NCCL, MPI or Gloo): its allreduce, since its reducescatter knows no slices that begin elsewhere."""

    halves = 2

    def __init__(self, world: World) -> None:
        """Start Horovod. Blocks; every rank must call it."""
        self._hvd = world.horovod()

    def start(self, vector: Tensor, start: int, round_: int) -> Sum:
        """As Sums'."""
        # Horovod meets by names; two rounds of one bucket may be under way.
        name = f"hvdvae.bucket.{start}.{round_}"
        return _HorovodSum(self._hvd, vector, self._hvd.allreduce_async_(vector, name=name, op=self._hvd.Sum))


class _HorovodSum:
    def __init__(self, hvd: Any, vector: Tensor, handle: int) -> None:
        self._hvd, self._vector, self._handle = hvd, vector, handle
        self.nbytes = vector.nbytes

    def is_done(self) -> bool:
        return bool(self._hvd.poll(self._handle))

    def result(self) -> Tensor:
        self._hvd.synchronize(self._handle)
        return self._vector


def patiently(is_done: Callable[[], bool], seconds: float) -> bool:
    """Look until it is, at most so long. Returns whether it is. Blocks."""
    end = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > end:
            return False
        os.sched_yield()  # Looking is what moves it on.
    return True
