"""What of a strategy is kept: its state_dict, its pieces of a checkpoint, and what it takes back of them.

Strategies that split state over ranks, or remember more than an optimizer does, override what differs.
"""

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.checkpoint import Piece
from hvdvae.errors import ConfigError, CopyError
from hvdvae.flat import FlatModel
from hvdvae.strategies.optimizer_state import (
    Entries,
    Groups,
    Scalars,
    entries_of,
    load_state,
    load_whole,
    own_state,
    pack,
    pieces_of,
    take_groups,
)
from hvdvae.strategies.parameter_states import GivenNumbers, ParameterStates
from hvdvae.strategies.quiet_optimizer import QuietOptimizer
from hvdvae.strategies.wrapping import StepGuard, without_state

_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
"""Of the wrapped optimizer, and this one's, whichever they are registered with."""


class SavedOptimizer(QuietOptimizer):
    """A torch optimizer that steps vectors (`inner`) in the place of one that was wrapped."""

    model: nn.Module
    inner: Optimizer
    flat: FlatModel
    numbers: list[int]
    """Of trained parameters, as the wrapped optimizer numbers all. Frozen ones are nobody's to change."""
    _wrapped: Optimizer
    _is_flat: bool
    is_replaced = False
    """Whether another strategy has taken the wrapped optimizer."""
    own_memory: tuple[str, ...] = ()
    """Names in `memory` of what differs from rank to rank while a run goes on."""

    @abstractmethod
    def fetched(self, *, state: bool = False) -> AbstractContextManager[Tensor]:
        """Inside, the model holds what is to be evaluated or saved; with `state`, `state_dict` may be asked for."""

    @property
    def wrapped(self) -> Optimizer:
        """The torch optimizer that was wrapped; its groups are this one's."""
        return self._wrapped

    @property
    def numbered(self) -> dict[int, str]:
        """Names of the trained parameters, by their number in the optimizer."""
        return dict(zip(self.numbers, self.flat.names, strict=True))

    @property
    def state(self) -> Any:
        """By parameter, as any torch optimizer's: entries are views. Raises ConfigError where this rank has none."""
        return self._states if self._is_flat else self._wrapped.state

    @state.setter
    def state(self, value: Any) -> None:
        if "_states" not in self.__dict__:
            return  # torch's optimizer begins with an empty one.
        if value:
            raise ConfigError("optimizer.state = ... of a wrapped optimizer: use optimizer.load_state_dict()")
        self.state.clear()

    def keep_states(self) -> None:
        """Show the state by parameters from now on, also as the wrapped optimizer's, whose own it was. Local."""
        self._states = ParameterStates(self.flat.tensors, self._find_states, self._signature, self._forget_states)
        self._given = GivenNumbers()
        for name in _HOOKS:
            setattr(self, name, getattr(self._wrapped, name))
        self.hold_again()

    def hold_again(self) -> None:
        """Take the wrapped optimizer, and show it the state. Mutates it."""
        self.is_replaced = False
        self.guard = StepGuard(self._wrapped)
        if self._is_flat:
            self._wrapped.state = self._states  # type: ignore[assignment]

    def let_go(self) -> None:
        """Leave the wrapped optimizer to another strategy, without the state; this one steps no more. Mutates it."""
        self.is_replaced = True
        self.guard.remove()
        if self._is_flat:
            self._wrapped.state = without_state()

    @property
    def is_flat(self) -> bool:
        """Whether `inner` steps vectors; else it is the wrapped optimizer itself."""
        return self._is_flat

    @property
    def stateful(self) -> Optimizer:
        """The optimizer over vectors that holds the state of all that is trained, where this rank has it."""
        return self.inner

    def state_is_elsewhere(self) -> str:
        """Why this rank does not have the optimizer's state now, and what to do; empty where it has. Local."""
        return ""

    def check_state_is_here(self) -> None:
        """Raises ConfigError where this rank does not have the optimizer's state."""
        if reason := self.state_is_elsewhere():
            raise ConfigError(
                f"{reason}: call optimizer.checkpoint() on all ranks, which puts all of it together on rank 0"
            )

    def take_writes(self) -> None:
        """Follow what was loaded into the wrapped optimizer, or written into numbers that were given out. Local."""
        if self.is_replaced:
            raise ConfigError(
                "this optimizer was wrapped anew since, and the new one has its state: use what DistributedOptimizer "
                "returned last"
            )
        self._take_loaded()
        self._states.forget()
        if self._given:
            self._given.take()

    def _take_loaded(self) -> None:
        wrapped = self._wrapped
        if wrapped.param_groups is not self.param_groups:
            loaded, wrapped.param_groups = wrapped.param_groups, self.param_groups
            take_groups(wrapped, loaded)
        if self._is_flat and wrapped.state is not self._states:
            loaded_state, wrapped.state = wrapped.state, self._states  # type: ignore[assignment]
            every = [parameter for group in self.param_groups for parameter in group["params"]]
            number_of = {id(parameter): number for number, parameter in enumerate(every)}
            self.load_entries(
                pack(self.param_groups), entries_of({number_of[id(p)]: s for p, s in loaded_state.items()})
            )

    def state_dict(self) -> dict[str, Any]:
        """As a plain torch optimizer of the wrapped class would save it: loads there, and into any other strategy.

        "strategy" has besides what the strategy remembers on this rank (codecs, local-sgd, diloco). Local. Raises
        ConfigError where this rank does not have the state: `checkpoint` gathers it.
        """
        self.take_writes()
        if self._is_flat:
            for before in self._optimizer_state_dict_pre_hooks.values():
                before(self)
            self.check_state_is_here()
            found: dict[str, Any] = {"state": self.own_state(), "param_groups": pack(self.param_groups)}
        else:
            found = self.inner.state_dict()
        if memory := self.memory():
            found["strategy"] = memory
        if self._is_flat:
            for after in self._optimizer_state_dict_post_hooks.values():
                result = after(self, found)
                found = found if result is None else result
        return found

    def own_state(self) -> dict[Any, Any]:
        """The state by numbers of parameters, as views, where this rank has it. Local; runs no hooks."""
        state = own_state(self._wrapped, self.flat, self.stateful, self.numbers)
        if self._is_flat:
            places = {number: place for place, number in enumerate(self.numbers)}
            self._given.note(self.stateful, self.flat, {places[number]: found for number, found in state.items()})
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of any strategy, or of the plain torch optimizer, saved. Local: call it on all ranks.

        Raises CheckpointError where groups or shapes do not fit this model.
        """
        found = dict(state_dict)
        if self._is_flat:
            for before in self._optimizer_load_state_dict_pre_hooks.values():
                result = before(self, found)
                found = found if result is None else result
            self.load_entries(found["param_groups"], entries_of(found["state"]))
        else:
            load_whole(self.inner, {key: value for key, value in found.items() if key != "strategy"})
        self.take_memory(found.get("strategy", {}), source="the state_dict")
        self._given = GivenNumbers()
        if self._is_flat:
            for after in self._optimizer_load_state_dict_post_hooks.values():
                after(self)

    def take_memory(self, saved: dict[str, Tensor], *, source: str) -> None:
        """Remember what a strategy of the same kind did, by name; a warning names `source` where that does not fit."""
        memory = self.memory()
        if {name: tensor.shape for name, tensor in saved.items()} == {name: t.shape for name, t in memory.items()}:
            for name, tensor in saved.items():
                memory[name].copy_(tensor)
            self.remembered()
        elif saved:
            warnings.warn(
                f"what {source} remembers ({', '.join(saved)}) is of another strategy, or of other trained parameters: "
                "this one begins with nothing remembered",
                stacklevel=4,
            )

    def remembered(self) -> None:
        """Called once `memory` was overwritten by what this rank, or the first, had saved. Local."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: a copy would share the model and the ranks, without the state. Raises CopyError."""
        raise CopyError(
            "a distributed optimizer cannot be copied or pickled, as it belongs to this process among its ranks: save "
            "optimizer.checkpoint() (all ranks call it), build the same again, and restore() it"
        )

    def _find_states(self) -> dict[int, dict[str, Any]]:
        places = {number: place for place, number in enumerate(self.numbers)}
        return {places[number]: found for number, found in self.own_state().items()}

    def _signature(self) -> list[int]:
        self._take_loaded()
        self.check_state_is_here()
        return [id(value) for entries in self.stateful.state.values() for value in entries.values()]

    def _forget_states(self) -> None:
        self.load_entries(pack(self.param_groups), iter(()))

    def saving(self) -> AbstractContextManager[Tensor]:
        """As `fetched(state=True)`; inside, `pieces` may be asked for."""
        return self.fetched(state=True)

    def pieces(self) -> tuple[dict[str, Piece], Scalars]:
        """The state for a checkpoint: tensors as NUMBER/ENTRY, which may be asked for inside `saving`, and scalars."""
        return pieces_of(self.own_state())

    def load_entries(self, groups: Groups, entries: Entries) -> None:
        """As `load_state_dict`: the groups, and the state, entry by entry. Local; `entries` may block."""
        load_state(self._wrapped, self.inner, self.flat, self.numbers, groups, entries)

    def check_loadable(self) -> None:
        """Raises ConfigError where no state can be taken any more. Local."""

    def restored(self) -> None:
        """Called once weights, state and memory are those of a checkpoint, on all ranks. Local."""

    def master_weights(self) -> dict[str, Piece]:
        """Weights that are kept in more digits than the model's, by name; for a checkpoint, inside `saving`."""
        return {}

    def load_master_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take them from a checkpoint's, by name, after the model has taken its own. Local; `weights` may block."""

    def memory(self) -> dict[str, Tensor]:
        """What else a run needs to continue, by name: the same on all ranks inside `fetched(state=True)`. No copies.

        Whoever resumes writes into these tensors.
        """
        return {}
