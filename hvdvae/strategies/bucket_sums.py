"""Sums of buckets of gradients over ranks, each piece for the rank whose slice it is, under way during backward.

Sending never blocks: another rank may have to come through a sum of its own first (SyncBatchNorm's in backward), or
sends this bucket at its step only. So each carrier starts sums that go on while the rank computes, MPI on a
communicator that nothing else uses, Horovod by names.

Shapes: a bucket is a piece (b,) of a vector (P,) of which every rank has a slice.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from hvdvae.strategies.overlap import overlap
from hvdvae.world import World
from hvdvae.world.collectives import slice_of

MESSAGE = 2**20
"""Elements of a message at most."""
ROOM = 4
"""Messages that an owner receives at a time."""
TAGS = 2**14
"""Of sums that may be under way at a time."""


class Sum(Protocol):
    """One that is under way."""

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
        self._vector = vector

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
    """Over MPI: every rank sends an owner its piece, and the owner adds them up. A GPU's are staged through the host.

    Not MPI_Ireduce, which takes three times as much of the processor on few ranks (Open MPI's goes in steps of 16 kB).
    """

    halves = 1

    def __init__(self, world: World, length: int) -> None:
        """`length`: P. Blocks; every rank must call it."""
        self._slices = [slice_of(length, rank, world.size) for rank in range(world.size)]
        self._rank, self._count = world.rank, 0
        with world.waiting("communicator for gradients"):
            self._comm = world.comm.Dup()

    def start(self, vector: Tensor, start: int, round_: int) -> Sum:
        """As Sums'."""
        self._count = (self._count + 1) % TAGS
        found = _MessageSum(vector, self._comm, self._count)
        _UNDER_WAY.add(found)
        whole = slice(start, start + len(vector))
        for rank, owned in enumerate(self._slices):
            piece = overlap(owned, whole)
            for begin in range(piece.start, piece.stop, MESSAGE):
                part = slice(begin - start, min(begin + MESSAGE, piece.stop) - start)
                if rank != self._rank:
                    found.send(part, rank)
                    continue
                for other in range(len(self._slices)):
                    if other != self._rank:
                        found.expect(part, other)
        found.is_done()
        return found


_UNDER_WAY: "set[_MessageSum]" = set()
"""Held until they are done, also where the optimizer that began them is gone: MPI reads and writes their memory."""


class _MessageSum:
    def __init__(self, vector: Tensor, comm: Any, tag: int) -> None:
        self._vector, self._host, self._comm, self._tag = vector, vector.cpu(), comm, tag
        self._sends: list[Any] = []
        self._expected: deque[tuple[slice, int]] = deque()
        self._receives: deque[tuple[Any, slice, Tensor]] = deque()
        """Requests, each with its part and where that comes to. In one order: a sum has the same bits each time."""

    def send(self, part: slice, rank: int) -> None:
        """Begin to send a part to its owner."""
        self._sends.append(self._comm.Isend(self._host[part].numpy(), rank, self._tag))

    def expect(self, part: slice, rank: int) -> None:
        """Note that a rank will send this part."""
        self._expected.append((part, rank))

    def is_done(self) -> bool:
        """As Sum's."""
        from mpi4py import MPI

        self._post()
        while self._receives and self._receives[0][0].Test():
            self._take()
        return not self._receives and bool(MPI.Request.Testall(self._sends))

    def result(self) -> Tensor:
        """As Sum's."""
        from mpi4py import MPI

        self._post()
        while self._receives:
            self._receives[0][0].Wait()
            self._take()
        MPI.Request.Waitall(self._sends)
        _UNDER_WAY.discard(self)
        return self._host.to(self._vector.device)

    def _post(self) -> None:
        """Receive what is expected next, as long as there is room."""
        while self._expected and len(self._receives) < ROOM:
            part, rank = self._expected.popleft()
            found = torch.empty_like(self._host[part])
            self._receives.append((self._comm.Irecv(found.numpy(), rank, self._tag), part, found))

    def _take(self) -> None:
        _, part, found = self._receives.popleft()
        self._host[part].add_(found)
        self._post()


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
