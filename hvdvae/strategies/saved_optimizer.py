"""What of a strategy is kept: its state_dict, its pieces of a checkpoint, and what it takes back of them.

Strategies that split state over ranks, or remember more than an optimizer does, override what differs.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.checkpoint import Piece
from hvdvae.flat import FlatModel
from hvdvae.strategies.flat_optimizer import is_elementwise
from hvdvae.strategies.optimizer_state import (
    Entries,
    Groups,
    Scalars,
    entries_of,
    load_state,
    load_whole,
    pieces_of,
    save_state,
)
from hvdvae.strategies.quiet_optimizer import QuietOptimizer


class SavedOptimizer(QuietOptimizer):
    """A torch optimizer that steps vectors (`inner`) in the place of one that was wrapped."""

    model: nn.Module
    inner: Optimizer
    flat: FlatModel
    numbers: list[int]
    """Of trained parameters, as the wrapped optimizer numbers all. Frozen ones are nobody's to change."""
    _wrapped: Optimizer
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

    def state_dict(self) -> dict[str, Any]:
        """As a plain torch optimizer of the wrapped class would save it: loads there, and into any other strategy."""
        return save_state(self._wrapped, self.inner, self.flat, self.numbers)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of any strategy, or of the plain torch optimizer, saved. Local: call it on all ranks.

        Raises CheckpointError where groups or shapes do not fit this model.
        """
        if is_elementwise(self._wrapped):
            self.load_entries(state_dict["param_groups"], entries_of(state_dict["state"]))
        else:
            load_whole(self.inner, state_dict)

    def saving(self) -> AbstractContextManager[Tensor]:
        """As `fetched(state=True)`; inside, `pieces` may be asked for."""
        return self.fetched(state=True)

    def pieces(self) -> tuple[dict[str, Piece], Scalars]:
        """The state for a checkpoint: tensors as NUMBER/ENTRY, which may be asked for inside `saving`, and scalars."""
        return pieces_of(self.state_dict()["state"])

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
