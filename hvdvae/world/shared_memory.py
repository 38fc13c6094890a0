"""A vector of every rank of one host, in memory that all of them see: the mean of all without a message.

    1. every rank writes its own vector          (the gradient is gathered right into it)
    2. barrier
    3. rank r averages the r-th slice of all vectors, and writes the mean into all of them
    4. barrier

Each rank reads N and writes N slices of P/N elements, where a message would be copied in, out, and summed. Every slice
is summed by one rank, so all ranks hold the same bits. The memory is given back when MPI ends.
"""

import shutil
from collections.abc import Iterator

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hvdvae.flat_layout import ALIGNED
from hvdvae.world.collectives import slice_of

CHUNK = 65536
"""Elements that are summed, scaled and written while they are in the cache."""

_KEPT: list[MPI.Win] = []
"""Windows of single vectors, which somebody may see until MPI ends."""

_BACKING = "/dev/shm"  # Where MPI libraries put shared windows; a container may give it a few MB.


class SharedVectors:
    """One vector (P,) a rank. Making it blocks; every rank of `comm` must do it."""

    def __init__(self, comm: MPI.Intracomm, like: Tensor) -> None:
        """Allocate vectors of `like`'s length and dtype, filled with zeros. `comm`: ranks of one host.

        The barriers are on a duplicate: one of the user's that another rank skipped must not pass for one of ours.
        """
        comm = self._comm = comm.Dup()
        bytes_each = like.numel() * like.element_size()
        room = bytes_each + ALIGNED if bytes_each else 0
        self._window = MPI.Win.Allocate_shared(room, like.element_size(), comm=comm)
        self._window.Lock_all()
        self.vectors = [self._vector_of(rank, like) for rank in range(comm.size)]
        self.mine.zero_()
        self._slice = slice_of(like.numel(), comm.rank, comm.size)
        self.meet()

    @property
    def mine(self) -> Tensor:
        """This rank's vector (P,)."""
        return self.vectors[self._comm.rank]

    @property
    def comm(self) -> MPI.Intracomm:
        """That the ranks meet on."""
        return self._comm

    def mean_(self) -> None:
        """Replace every rank's vector by the mean of all. Blocks; every rank must call it."""
        self.meet()
        for part in self._chunks():
            mean = self._mean_of(part)
            for other in self._others(part):
                other.copy_(mean)
        self.meet()

    def mean_of_slice_(self) -> None:
        """Replace this rank's slice of its own vector by the mean of all. Blocks; every rank must call it.

        Nobody may write a new vector before all have come through `gather_slices_`, of these vectors or of others.
        """
        self.meet()
        for part in self._chunks():
            self._mean_of(part)

    def gather_slices_(self) -> None:
        """Replace all others' slices of this rank's vector by theirs. Blocks; every rank must call it.

        Each reads what it needs next, where to write into the others' would take it out of their caches.
        """
        self.meet()
        for rank, theirs in enumerate(self.vectors):
            if rank != self._comm.rank:
                part = slice_of(self.mine.numel(), rank, self._comm.size)
                self.mine[part].copy_(theirs[part])
        self.meet()

    def _chunks(self) -> Iterator[slice]:
        for start in range(self._slice.start, self._slice.stop, CHUNK):
            yield slice(start, min(start + CHUNK, self._slice.stop))

    def _others(self, part: slice) -> list[Tensor]:
        return [vector[part] for rank, vector in enumerate(self.vectors) if rank != self._comm.rank]

    def _mean_of(self, part: slice) -> Tensor:
        mean = self.mine[part]
        for other in self._others(part):
            mean.add_(other)
        return mean.mul_(1 / self._comm.size)

    def _vector_of(self, rank: int, like: Tensor) -> Tensor:
        memory, _ = self._window.Shared_query(rank)
        # Parameters begin at a multiple of 64 bytes; memory is mapped by pages, so that it is one for every rank.
        start = -memory.address % ALIGNED if like.numel() else 0
        return torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=start)

    def meet(self) -> None:
        """Return once all have come, and see what they wrote. Blocks; every rank must call it."""
        self._window.Sync()
        self._comm.Barrier()
        self._window.Sync()


def one_vector(comm: MPI.Intracomm, like: Tensor) -> Tensor:
    """A vector of `like`'s length and dtype, zeroed, that all ranks of `comm` see. Blocks; every rank must call it."""
    comm = comm.Dup()
    itemsize = like.element_size()
    window = MPI.Win.Allocate_shared(like.nbytes if comm.rank == 0 else 0, itemsize, comm=comm)
    _KEPT.append(window)
    window.Lock_all()
    memory, _ = window.Shared_query(0)
    vector = torch.frombuffer(memory, dtype=like.dtype, count=like.numel())
    part = slice_of(like.numel(), comm.rank, comm.size)
    # Each its own: a page lies in the memory of the processor that touches it first.
    vector[part] = 0
    window.Sync()
    comm.Barrier()
    window.Sync()
    return vector


def fits(comm: MPI.Intracomm, bytes_each: int) -> bool:
    """Whether all ranks of `comm` are on one host with room for their vectors. Blocks; every rank must call it.

    Past the room the kernel would kill the process that touches a page, so half of it is left.
    """
    together = comm.Split_type(MPI.COMM_TYPE_SHARED)
    same_host = together.size == comm.size
    together.Free()
    try:
        room = shutil.disk_usage(_BACKING).free
    except OSError:
        room = 0
    # An array: MPI would pickle a number.
    good = np.array([same_host and 2 * bytes_each * comm.size < room], np.int32)
    comm.Allreduce(MPI.IN_PLACE, good, op=MPI.MIN)
    return bool(good[0]) and bytes_each > 0
