"""`--strategy allreduce --engine mpi` on one host: each rank averages and steps its slice, in memory that all see.

    gradients of all (N, P)    each reads its slice of all      mean of my slice (P/N,)
    optimizer's state (P,)     once for all, each its slice     my slice's step
    parameters of all (N, P)   each reads the others' slices    what all have stepped (P,)

What every rank would do with all of the vector (allreduce_mpi.py), each does with 1/N of it: less to compute, and less
to push what the next forward pass needs out of caches. As with any allreduce every rank can save the whole optimizer.
Not where others go on when a rank dies: it may have died amid its slice.
"""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.strategies.flat_optimizer import is_elementwise
from hvdvae.strategies.optimizer_state import Entries, Groups, load_state
from hvdvae.strategies.sliced_step import SlicedStep, is_vector
from hvdvae.world import World

_STATE_VECTORS = 4
"""That an optimizer may have, and Adam with amsgrad one less."""


def can_share(optimizer: Optimizer, model: nn.Module, world: World) -> bool:
    """Whether ranks can step this way. Blocks; every rank must call it."""
    if not is_elementwise(optimizer) or world.survives_deaths:
        return False
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return world.shares_memory(2 * nbytes + _STATE_VECTORS * nbytes // world.size)


class SharedAllreduce(SlicedStep):
    """Synchronous SGD: every rank steps its slice on the mean of all gradients."""

    name = "allreduce"
    engine = "mpi"

    def __init__(self, optimizer: Optimizer, model: nn.Module, world: World, **options: Any) -> None:
        """As Strategy, where `can_share`."""
        self._homes: dict[tuple[int, str], Tensor] = {}
        """Of each group and entry of the optimizer's state: the vector that all ranks see."""
        self._seen: list[tuple[dict[str, Any], str, Any]] = []
        """Entries of this rank's slice that all see: where they stand, their names, and what stood there."""
        super().__init__(optimizer, model, world, engine="mpi", **options)

    def update(self) -> None:
        """As SlicedStep's."""
        self.step_inner()
        known = sum(map(len, self.inner.state.values())) == len(self._seen)
        if not known or any(entries[key] is not value for entries, key, value in self._seen):
            self._share_state()
        self._spread()

    @property
    def stateful(self) -> Optimizer:
        """As Strategy's; before this rank's next step no other takes one."""
        return self._whole

    def take_writes(self) -> None:
        """As Strategy's; before the state is shared, this rank's slice is a copy."""
        super().take_writes()
        if not self._seen and self._whole.state:
            self._take_state()

    def load_entries(self, groups: Groups, entries: Entries) -> None:
        """As Strategy's."""
        load_state(self._wrapped, self._whole, self.flat, self.numbers, groups, entries)
        self._take_state()
        self._seen = []

    def _share_state(self) -> None:
        """Let all ranks see this rank's slice of the state. Blocks where an entry is new, which it is on all."""
        self._seen = []
        for group, (whole, mine, piece) in enumerate(self._groups()):
            entries = self.inner.state.get(mine, {})
            for key in sorted(entries):
                value = entries[key]
                if is_vector(value, mine):
                    home = self._home(group, key, value, whole)
                    if value.data_ptr() != home[piece].data_ptr():
                        home[piece] = value
                        entries[key] = home[piece]
                    value = home
                self._whole.state[whole][key] = value
                self._seen.append((entries, key, entries[key]))

    def _home(self, group: int, key: str, value: Tensor, whole: Tensor) -> Tensor:
        if (group, key) not in self._homes:
            self._homes[group, key] = self.world.shared_vector(whole.detach().to(value.dtype))
        return self._homes[group, key]
