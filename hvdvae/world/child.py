"""What a rank's children have of its World: they are no ranks, whatever launcher's variables they inherit.

a program (subprocess)               a World of its own, of one process
multiprocessing, spawned or forked   the rank's place, for a script that cuts data by it when it is imported anew;
                                     whatever ranks do together is an error that says so
forked with the World in hand        the same
"""

import multiprocessing
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Never

from hvdvae.deadline import Watchdog
from hvdvae.errors import WorldError
from hvdvae.launcher import Launch, Parent, leave_launch, mark_rank
from hvdvae.world.collectives import Alone, Collectives
from hvdvae.world.join import choose_device

if TYPE_CHECKING:
    from hvdvae.world import World

_WORLDS: "weakref.WeakSet[World]" = weakref.WeakSet()
"""Of this process, which is a rank."""


class Apart:
    """The contract of collectives.Collectives in a process that is no rank: each raises WorldError."""

    def __init__(self, rank: int, size: int) -> None:
        """`rank`, `size`: of the rank that started this process."""
        self.rank, self.size = rank, size

    def _refuse(self, *_: object) -> Never:
        raise WorldError(
            f"process {os.getpid()} was started by rank {self.rank} of {self.size}, as workers that load data are, and "
            "takes no part in what ranks do together. Put what makes the optimizer and trains under "
            "`if __name__ == '__main__':`, where a script that workers import does not run"
        )

    sum_ = max_ = broadcast_ = gather_bytes = gather_rows = exchange_rows = barrier = revoke = shrink = _refuse


def world_of_child(kind: "type[World]", launch: Launch, parent: Parent, device: str) -> "World":
    """The World of a process that a rank has started. Local; mutates the environment (leave_launch)."""
    leave_launch(os.environ)
    if multiprocessing.parent_process() is None:
        return kind.alone(device=str(choose_device(device, parent.local_rank)))
    launch = Launch(
        launcher=parent.launcher,
        rank=parent.rank,
        size=parent.size,
        local_rank=parent.local_rank,
        local_size=parent.local_size,
        parent=parent,
    )
    watchdog = Watchdog(rank=parent.rank, size=parent.size, seconds=0.0)
    return kind(launch, _carrier(parent.rank, parent.size), choose_device(device, parent.local_rank), watchdog)


def note_rank(world: "World") -> None:
    """From now on children of this process are known as such. Local; mutates the environment."""
    _WORLDS.add(world)
    note_place(world)


def forget_rank(world: "World") -> None:
    """A World was closed: children are those of the rank that this process is in another, where it has one. Local."""
    _WORLDS.discard(world)
    if _WORLDS:
        note_place(max(_WORLDS, key=lambda other: other.size))


def note_place(world: "World") -> None:
    """Its children are those of the rank that it is now. Local; does nothing for a World of some of the ranks."""
    if world not in _WORLDS:
        return
    mark_rank(
        os.environ,
        Parent(
            rank=world.rank,
            size=world.size,
            local_rank=world.local_rank,
            local_size=world.local_size,
            launcher=world.launcher,
        ),
    )


def _carrier(rank: int, size: int) -> Collectives:
    return Alone() if size == 1 else Apart(rank, size)


def _part() -> None:
    """In a forked child: it must not speak for its rank, nor end the job where it fails."""
    for world in list(_WORLDS):
        world.leave_to_rank(_carrier(world.rank, world.size))
    if _WORLDS:
        sys.excepthook, threading.excepthook = sys.__excepthook__, threading.__excepthook__
    _WORLDS.clear()


os.register_at_fork(after_in_child=_part)
