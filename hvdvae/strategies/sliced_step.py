"""Every rank averages and steps its slice of the parameters, and gets the others'.

    gradients (P,)      --- reduce-scatter --->  mean of my slice (P/N,)
    my slice's step     --- allgather -------->  parameters (P,) on all ranks

The bytes of an allreduce, and 1/N of the optimizer's work. Exact for elementwise optimizers. Where the optimizer's
state is kept: sharded.py (each rank has its own slice of it), allreduce_shared.py (once for all ranks of a host).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.strategies.flat_optimizer import flat_optimizer
from hvdvae.strategies.overlap import overlap, within
from hvdvae.strategies.slices import Slices, slices_of
from hvdvae.strategies.strategy import Strategy
from hvdvae.world import World
from hvdvae.world.collectives import slice_of


class SlicedStep(Strategy):
    """Synchronous SGD whose step is split over the ranks."""

    steps_whole = False

    def __init__(self, optimizer: Optimizer, model: nn.Module, world: World, *, engine: str, **options: Any) -> None:
        """As Strategy, of an elementwise optimizer; `engine`: mpi or horovod."""
        super().__init__(optimizer, model, world, **options)
        flat = self.flat
        self.part = slice_of(flat.parameters.numel(), world.rank, world.size)
        self._whole = self.inner
        """Over all parameters: saves and loads the state, and never steps."""
        self._slices: Slices = self._carrier(engine)
        self.follow_parameters()
        self._places = [overlap(group, self.part) for group in flat.group_slices]
        """What my slice has of each group, in the whole vector."""
        self.inner = flat_optimizer(optimizer, flat, self._places)
        self._take_gradient()
        self._take_state()

    def exchange(self, gradient: Tensor) -> None:
        """The mean over ranks of this rank's slice, in place."""
        self._slices.reduce_(gradient)
        self.moved.steps += 1
        self._count(gradient.nbytes)

    def synchronize(self) -> None:
        """As Strategy's: all of `.grad` holds the mean. `step` alone does without the rest."""
        if not self._exchanged:
            super().synchronize()
            self._slices.gather_(self.flat.gradient)
            self._count(self.flat.gradient.nbytes)

    def squared_norm(self, gradient: Tensor) -> float:
        """As Strategy's: a sum over the ranks' slices."""
        places = [overlap(place, self.part) for place in self.own]
        return self._slices.sum(sum(float(torch.dot(gradient[place], gradient[place])) for place in places))

    def update(self) -> None:
        """Step this rank's slice, and get the others'. Blocks; every rank must call it."""
        super().update()
        self._spread()

    @property
    def inner_places(self) -> list[slice]:
        """As Strategy's."""
        return self._places

    def traffic(self) -> dict[str, float]:
        """As Strategy's."""
        return self.moved.metrics()

    def _take_gradient(self) -> None:
        """Point the optimizer at this rank's slice of it. Local."""
        for group, place in zip(self.inner.param_groups, self._places, strict=True):
            group["params"][0].grad = self.flat.gradient[place]

    def _take_state(self) -> None:
        """Let this rank's slice begin with what the whole optimizer's state has of it. Local."""
        self.inner.state.clear()
        for whole, mine, piece in self._groups():
            for key, value in self._whole.state.get(whole, {}).items():
                self.inner.state[mine][key] = value[piece].clone() if is_vector(value, whole) else value

    def _spread(self) -> None:
        """All ranks' slices of the parameters to all. Blocks; every rank must call it."""
        self._slices.gather_(self.flat.parameters)
        self._count(self.flat.parameters.nbytes)

    def _carrier(self, engine: str) -> Slices:
        return slices_of(self.flat, self.world, engine)

    def _count(self, nbytes: int) -> None:
        # A reduce-scatter is the first half of a ring, an allgather the second.
        self.moved.ring(nbytes // 2, self.world.size)

    def _groups(self) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Of each group the whole vector, my part of it, and where that stands in it."""
        groups = zip(self._whole.param_groups, self.inner.param_groups, strict=True)
        for (whole, mine), group, place in zip(groups, self.flat.group_slices, self._places, strict=True):
            yield whole["params"][0], mine["params"][0], within(place, group)


def is_vector(value: object, like: Tensor) -> bool:
    """Whether an entry of a state is one number an element."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == like.shape
