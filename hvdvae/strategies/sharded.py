"""`--strategy sharded`: as sliced_step.py, and every rank keeps the optimizer's state of its slice alone.

ZeRO stage 1 (Rajbhandari et al. 2020, arXiv:1910.02054). A checkpoint holds the whole state, as any strategy's, and
loads at any number of ranks.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.checkpoint import Piece
from hvdvae.strategies.flat_optimizer import COUNTERS, check_elementwise, check_shape, counter
from hvdvae.strategies.optimizer_state import Entries, Groups, Scalars, of_trained, take_groups
from hvdvae.strategies.overlap import overlap, within
from hvdvae.strategies.sliced_step import SlicedStep, is_vector
from hvdvae.world import World


class Sharded(SlicedStep):
    """Synchronous SGD whose optimizer is split over the ranks."""

    name = "sharded"

    def __init__(self, optimizer: Optimizer, model: nn.Module, world: World, *, engine: str, **options: Any) -> None:
        """As SlicedStep. Raises ConfigError for optimizers that are not elementwise."""
        check_elementwise(optimizer, "--strategy sharded steps slices of the parameter vector")
        super().__init__(optimizer, model, world, engine=engine, **options)

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

    @property
    def stateful(self) -> Optimizer:
        """As Strategy's: on rank 0 inside `fetched(state=True)`, or where there is one rank."""
        return self.inner if self.world.size == 1 else self._whole

    def begin_state(self) -> None:
        """As Strategy's: a slice is no state that could be broadcast."""
        if self.world.size == 1:
            super().begin_state()

    def state_is_elsewhere(self) -> str:
        """As Strategy's."""
        if self.world.size == 1 or self._whole.state or not any(self.inner.state.values()):
            return ""
        return f"--strategy sharded keeps a slice of the optimizer's state on each of {self.world.size} ranks"

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
                if is_vector(value, mine):
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
                state.setdefault(key, counter(key, value, mine, bool(inner.get("fused"))))
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

    def results(self) -> dict[str, Any]:
        """As Strategy's, and the bytes of the optimizer's state on this rank."""
        tensors = [value for entries in self.inner.state.values() for value in entries.values()]
        nbytes = sum(value.nbytes for value in tensors if isinstance(value, Tensor))
        return {**super().results(), "optimizer_state_bytes": nbytes}

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

    def _take_state(self) -> None:
        super()._take_state()
        self._whole.state.clear()

    def _gather_state(self) -> None:
        """Rank 0 puts the whole together, one vector after the other. Blocks; every rank must call it."""
        for whole, mine, piece in self._groups():
            for key, value in sorted(self.inner.state.get(mine, {}).items()):
                entry = value
                if is_vector(value, mine):
                    entry = torch.zeros_like(whole, dtype=value.dtype, requires_grad=False)
                    entry[piece] = value
                    self.world.sum_(entry, "gather of the optimizer's state")
                if self.world.is_first:
                    self._whole.state[whole][key] = entry
