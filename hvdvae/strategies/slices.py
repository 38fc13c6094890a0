"""Slices of a vector, one a rank: the mean of one's own over ranks, and everybody's to all.

Shapes: vectors (P,); slices are P / N elements, the first P % N of them one longer.
Three carriers give the same contract (`Slices`): shared memory on one host, MPI over several, Horovod.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from hvdvae.flat import FlatModel
from hvdvae.world import World
from hvdvae.world.collectives import slice_of


class Slices(Protocol):
    """Every method blocks; every rank must call it."""

    def reduce_(self, gradient: Tensor) -> None:
        """Replace one's own slice of a gradient (P,) by its mean over ranks; what stands in the others is of no use."""

    def gather_(self, vector: Tensor) -> None:
        """Replace all other slices of a vector (P,) by their owners'."""

    def sum(self, number: float) -> float:
        """Of every rank's number; the same bits on all."""


def slices_of(flat: FlatModel, world: World, engine: str) -> Slices:
    """Those of a model's vectors, which may be moved. Blocks; every rank must call it."""
    if world.size == 1:
        return OneSlice()
    if engine == "horovod":
        return HorovodSlices(world)
    gradients, parameters = world.shared_vectors(flat.parameters), None
    if gradients is not None:
        parameters = world.shared_vectors(flat.parameters)
    if parameters is None:
        return MessageSlices(world)
    flat.move_gradient(gradients.mine)
    flat.move_parameters(parameters.mine)
    return SharedSlices(world, gradients, parameters)


class OneSlice:
    """Of one process: the whole."""

    def reduce_(self, gradient: Tensor) -> None:
        """The mean over one."""

    def gather_(self, vector: Tensor) -> None:
        """It is there."""

    def sum(self, number: float) -> float:
        """That number."""
        return number


class SharedSlices:
    """Of ranks of one host: each reads and writes the others' vectors (world/shared_memory.py)."""

    def __init__(self, world: World, gradients: Any, parameters: Any) -> None:
        """`gradients`, `parameters`: SharedVectors."""
        self._world, self._gradients, self._parameters = world, gradients, parameters
        self._numbers = world.shared_vector(torch.zeros(world.size, dtype=torch.float64))

    def reduce_(self, gradient: Tensor) -> None:
        """As Slices'."""
        with self._world.waiting("mean of a slice in shared memory"):
            self._gradients.mean_of_slice_()

    def gather_(self, vector: Tensor) -> None:
        """As Slices'. `vector` is one of the two that are shared."""
        is_gradient = vector.data_ptr() == self._gradients.mine.data_ptr()
        with self._world.waiting("gather of slices in shared memory"):
            (self._gradients if is_gradient else self._parameters).gather_slices_()

    def sum(self, number: float) -> float:
        """As Slices'. Not twice without another of these between: somebody may not have read yet."""
        self._numbers[self._world.rank] = number
        with self._world.waiting("sum in shared memory"):
            self._gradients.meet()
        return float(sum(self._numbers.tolist()))


class _Summed:
    """What is summed by messages."""

    _world: World

    def sum(self, number: float) -> float:
        """As Slices'."""
        return float(self._world.sum_(torch.tensor([number], dtype=torch.float64), "sum over slices"))


class MessageSlices(_Summed):
    """Over MPI: MPI_Reduce_scatter and MPI_Allgatherv. Vectors of a GPU are staged through host memory."""

    def __init__(self, world: World) -> None:
        """Nothing sent yet."""
        self._world = world

    def reduce_(self, gradient: Tensor) -> None:
        """As Slices'."""
        counts, mine = self._counts(gradient), self._mine(gradient)
        host = gradient.detach().cpu()
        found = torch.empty(mine.stop - mine.start, dtype=host.dtype)
        with self._world.waiting("reduce-scatter of the gradient"):
            self._world.comm.Reduce_scatter(host.numpy(), found.numpy(), counts)
        gradient[mine].copy_(found.div_(self._world.size))

    def gather_(self, vector: Tensor) -> None:
        """As Slices'."""
        from mpi4py import MPI

        counts = self._counts(vector)
        host = vector.detach().cpu()
        with self._world.waiting("allgather of slices"):
            self._world.comm.Allgatherv(MPI.IN_PLACE, [host.numpy(), counts])
        if host.data_ptr() != vector.data_ptr():
            vector.detach().copy_(host)

    def _mine(self, vector: Tensor) -> slice:
        return slice_of(vector.numel(), self._world.rank, self._world.size)

    def _counts(self, vector: Tensor) -> list[int]:
        parts = (slice_of(vector.numel(), rank, self._world.size) for rank in range(self._world.size))
        return [part.stop - part.start for part in parts]


class HorovodSlices(_Summed):
    """Over Horovod (NCCL, MPI or Gloo): reducescatter and allgather."""

    def __init__(self, world: World) -> None:
        """Start Horovod. Blocks; every rank must call it."""
        self._world, self._hvd = world, world.horovod()

    def reduce_(self, gradient: Tensor) -> None:
        """As Slices'."""
        with self._world.waiting("horovod reducescatter of the gradient"):
            found = self._hvd.reducescatter(gradient, name="hvdvae.slices.reduce", op=self._hvd.Average)
        gradient[slice_of(gradient.numel(), self._world.rank, self._world.size)].copy_(found)

    def gather_(self, vector: Tensor) -> None:
        """As Slices'."""
        mine = vector.detach()[slice_of(vector.numel(), self._world.rank, self._world.size)]
        with self._world.waiting("horovod allgather of slices"):
            vector.detach().copy_(self._hvd.allgather(mine, name="hvdvae.slices.gather"))
