"""`--strategy sharded`: every rank keeps the optimizer's state of its slice of the parameters, and steps that slice.

    gradients (P,)      --- reduce-scatter --->  mean of my slice (P/N,)
    my slice's step     --- allgather -------->  parameters (P,) on all ranks

The bytes of an allreduce, and 1/N of the optimizer's state and work: ZeRO stage 1 (Rajbhandari et al. 2020,
arXiv:1910.02054). A checkpoint holds the whole state, as any strategy's, and loads at any number of ranks.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.checkpoint import Piece
from hvdvae.errors import ConfigError
from hvdvae.strategies.flat_optimizer import COUNTERS, check_shape, counter, flat_optimizer, is_elementwise
from hvdvae.strategies.optimizer_state import Entries, Groups, Scalars, of_trained, take_groups
from hvdvae.strategies.slices import Slices, slices_of
from hvdvae.strategies.strategy import Strategy
from hvdvae.world import World
from hvdvae.world.collectives import slice_of


class Sharded(Strategy):
    """Synchronous SGD whose optimizer is split over the ranks."""

    name = "sharded"
    steps_whole = False

    def __init__(self, optimizer: Optimizer, model: nn.Module, world: World, *, engine: str, **options: Any) -> None:
        """As Strategy; `engine`: mpi or horovod. Raises ConfigError for optimizers that are not elementwise."""
        if not is_elementwise(optimizer):
            raise ConfigError(
                f"--strategy sharded steps slices of the parameter vector, and {type(optimizer).__name__} is not "
                "elementwise: use SGD, Adam, AdamW, RMSprop or Adagrad"
            )
        super().__init__(optimizer, model, world, **options)
        flat = self.flat
        self.part = slice_of(flat.parameters.numel(), world.rank, world.size)
        self._whole = self.inner
        """Over all parameters; has a state only while that is saved or loaded."""
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
        squares = sum(float(torch.dot(gradient[place], gradient[place])) for place in places)
        return float(self.world.sum_(torch.tensor([squares], dtype=torch.float64), "norm of the gradient"))

    def update(self) -> None:
        """Step this rank's slice, and get the others'. Blocks; every rank must call it."""
        super().update()
        self._spread()

    @contextmanager
    def fetched(self, *, state: bool = False) -> Iterator[Tensor]:
        """As Strategy's; with `state`, rank 0 has the whole optimizer's state inside, the others none."""
        with super().fetched(state=state) as rows:
            if state:
                self._gather_state()
            try:
                yield rows
            finally:
                self._whole.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """As Strategy's, on rank 0 inside `fetched(state=True)`; elsewhere without the state, which no rank has."""
        mine, self.inner = self.inner, self._whole
        try:
            return super().state_dict()
        finally:
            self.inner = mine

    def saving(self) -> AbstractContextManager[Tensor]:
        """As Strategy's: no rank has the whole state; its pieces are put together one by one."""
        return super().fetched()

    def pieces(self) -> tuple[dict[str, Piece], Scalars]:
        """As Strategy's; every rank must ask for them, in the order of names."""
        pieces: dict[str, Piece] = {}
        scalars: Scalars = {}
        for number, place, inner, group in self._parameters():
            like, mine = self.flat.tensors[number], inner["params"][0]
            for key, value in sorted(self.inner.state.get(mine, {}).items()):
                name = f"{self.numbers[number]}/{key}"
                if _is_vector(value, mine):
                    get = partial(self._put_together, "the optimizer's state", number, place, value, group)
                    pieces[name] = Piece(tuple(like.shape), value.dtype, get)
                elif isinstance(value, Tensor):
                    pieces[name] = Piece.of(value)
                else:
                    scalars.setdefault(str(self.numbers[number]), {})[key] = value
        return pieces, scalars

    def load_entries(self, groups: Groups, entries: Entries) -> None:
        """As Strategy's: keeps what belongs to this rank's slice."""
        take_groups(self._wrapped, groups)
        self.inner.state.clear()
        parameters = [*self._parameters()]
        for number, key, value in of_trained(self.numbers, entries):
            _, place, inner, group = parameters[number]
            mine = inner["params"][0]
            state = self.inner.state[mine]
            if not isinstance(value, Tensor) or key in COUNTERS:
                state.setdefault(key, counter(value, mine, bool(inner.get("fused"))))
                continue
            check_shape(value, self.flat.tensors[number].shape)
            if key not in state:
                state[key] = torch.zeros_like(mine, requires_grad=False)
            kept = state[key]
            shared = overlap(place, group)
            if shared.stop > shared.start:
                # In the order of the vector, which channels_last has otherwise.
                ordered = torch.empty(value.numel(), dtype=mine.dtype, device=mine.device)
                self.flat.view(ordered, number).copy_(value)
                kept[within(shared, group)] = ordered[within(shared, place)]

    def traffic(self) -> dict[str, float]:
        """As Strategy's."""
        return self.moved.metrics()

    def results(self) -> dict[str, Any]:
        """As Strategy's, and the bytes of the optimizer's state on this rank."""
        tensors = [value for entries in self.inner.state.values() for value in entries.values()]
        nbytes = sum(value.nbytes for value in tensors if isinstance(value, Tensor))
        return {**super().results(), "optimizer_state_bytes": nbytes}

    def _take_gradient(self) -> None:
        """Point the optimizer at this rank's slice of it. Local."""
        for group, place in zip(self.inner.param_groups, self._places, strict=True):
            group["params"][0].grad = self.flat.gradient[place]

    def _spread(self) -> None:
        """All ranks' slices of the parameters to all. Blocks; every rank must call it."""
        self._slices.gather_(self.flat.parameters)
        self._count(self.flat.parameters.nbytes)

    def _carrier(self, engine: str) -> Slices:
        return slices_of(self.flat, self.world, engine)

    def _count(self, nbytes: int) -> None:
        # A reduce-scatter is the first half of a ring, an allgather the second.
        self.moved.ring(nbytes // 2, self.world.size)

    def _parameters(self) -> Iterator[tuple[int, slice, dict[str, Any], slice]]:
        """Number, place in the vector, the group with my part of its vector, and where that part stands."""
        places, number = [*self.flat.places().values()], 0
        for index, parameters in enumerate(self.flat.groups):
            for _ in parameters:
                yield number, places[number], self.inner.param_groups[index], self._places[index]
                number += 1

    def _put_together(self, what: str, number: int, place: slice, mine: Tensor, group: slice) -> Tensor:
        """What ranks have of one parameter, or of an entry of its state. Blocks; every rank must call it."""
        whole = torch.zeros(place.stop - place.start, dtype=mine.dtype, device=mine.device)
        shared = overlap(place, group)
        whole[within(shared, place)] = mine[within(shared, group)]
        # However long whoever writes has been at the last one.
        self.world.barrier(f"gather of {what}", patient=True)
        self.world.sum_(whole, f"gather of {what}")
        return self.flat.view(whole, number)

    def _groups(self) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Of each group the whole vector, my part of it, and where that stands in it."""
        groups = zip(self._whole.param_groups, self.inner.param_groups, strict=True)
        for (whole, mine), group, place in zip(groups, self.flat.group_slices, self._places, strict=True):
            yield whole["params"][0], mine["params"][0], slice(place.start - group.start, place.stop - group.start)

    def _take_state(self) -> None:
        """Keep what the whole optimizer's state has of this rank's slice. Local."""
        self.inner.state.clear()
        for whole, mine, piece in self._groups():
            for key, value in self._whole.state.get(whole, {}).items():
                self.inner.state[mine][key] = value[piece].clone() if _is_vector(value, whole) else value
        self._whole.state.clear()

    def _gather_state(self) -> None:
        """Rank 0 puts the whole together, one vector after the other. Blocks; every rank must call it."""
        for whole, mine, piece in self._groups():
            for key, value in sorted(self.inner.state.get(mine, {}).items()):
                entry = value
                if _is_vector(value, mine):
                    entry = torch.zeros_like(whole, dtype=value.dtype, requires_grad=False)
                    entry[piece] = value
                    self.world.sum_(entry, "gather of the optimizer's state")
                if self.world.is_first:
                    self._whole.state[whole][key] = entry


def overlap(group: slice, part: slice) -> slice:
    """What lies in both; may be empty."""
    start = min(max(group.start, part.start), group.stop)
    return slice(start, max(start, min(group.stop, part.stop)))


def within(place: slice, whole: slice) -> slice:
    """The same, counted from the start of `whole`."""
    return slice(place.start - whole.start, place.stop - whole.start)


def _is_vector(value: object, like: Tensor) -> bool:
    """Whether an entry of a state is one number an element."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == like.shape
