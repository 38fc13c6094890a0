"""Who takes part in a World, where ranks may die while the others go on, and new ones come.

    died                   MPI (ULFM), or an elastic horovodrun, says so: the others meet anew (`recover`)
    started in its place   with --replace-workers (spawn.py)
    added                  on hosts that an elastic horovodrun has found

A new rank opens its data and builds its model by itself, as if it were alone, and speaks to the others from `enter` on.
They wait for it there, in what they do first after `recover`.
"""

import os
from typing import TYPE_CHECKING, NamedTuple

from hvdvae.world.collectives import Alone, Collectives

if TYPE_CHECKING:
    from hvdvae.world import World
    from hvdvae.world.gloo import HostChanges

MOST_STARTED = 5
"""Ranks that are started in the place of dead ones: what keeps dying has a reason that new processes do not cure."""


class Change(NamedTuple):
    """Who is no longer there, and who is new; ranks as "rank 1 (host)", by their ranks when they started."""

    died: list[str]
    added: list[str]


class Members:
    """What one rank knows of all. One a World."""

    def __init__(self, name: str) -> None:
        """`name`: of this rank, for messages."""
        self.name = name
        self.replaces = False
        """Whether `recover` starts new ranks in the place of the dead."""
        self.changes: HostChanges | None = None
        """What an elastic horovodrun tells of its hosts."""
        self.names: list[str] = []
        """Of all that live, by rank."""
        self.hosts: list[str] = []
        """Of trainers and servers, as they were started."""
        self._started = 0
        """Ranks that were started so far."""
        self._waiting: Collectives | None = None
        """What a new rank will speak by."""

    def start_elastic(self, world: "World") -> None:
        """Under an elastic horovodrun: hear of its hosts, and find out who trains already. Blocks; all must call it."""
        from hvdvae.world.gloo import HostChanges

        self.changes = HostChanges()
        self.meet_those_that_train(world)

    def meet_those_that_train(self, world: "World", *, device_is_free: bool = True) -> None:
        """Whoever meets ranks that train already waits with all else until `enter`. Blocks; all must call it.

        Not `device_is_free`: this rank takes the first place on its host that no other has.
        """
        self.name = f"rank {world.rank} ({world.host}, process {os.getpid()})"
        trains, place = self.meet(world, trains=False)
        if not device_is_free:
            world.local_rank = place
        if trains:
            world.joins, self._waiting = True, world.carrier
            world.carrier = Alone()

    def enter(self, world: "World") -> None:
        """Speak to the others from now on: what they do next, this rank does with them. Local."""
        if self._waiting is not None:
            world.carrier, world.joins = self._waiting, False

    def meet(self, world: "World", *, trains: bool) -> tuple[bool, int]:
        """Whether some train already, and the first free place on this host for a rank that does not.

        Blocks; every rank must call it.
        """
        mine = [self.name, trains, world.host, world.local_rank, self._started]
        found = world.gather_objects(mine, "names of those that take part")
        self.names = [name for name, *_ in found]
        # Whether once more a rank is to be started is decided by all alike, also by those that were.
        self._started = max(started for *_, started in found)
        here = [(rank, already, place) for rank, (_, already, host, place, _) in enumerate(found) if host == world.host]
        taken = {place for _, already, place in here if already}
        free = [place for place in range(len(found)) if place not in taken]
        newcomers = [rank for rank, already, _ in here if not already]
        place = free[newcomers.index(world.rank)] if world.rank in newcomers else world.local_rank
        return any(already for _, already, *_ in found), place

    def recover(self, world: "World", *, trains: bool) -> Change:
        """Shrink the World to those that live, and let new ranks in. Blocks; every living rank must call it."""
        if self.changes is not None:
            self.changes.heard = False
        before, size = self.names, world.size
        world.shrink()
        if self.replaces and world.comm is not None and world.size < size and self._started < MOST_STARTED:
            self._start(world, size - world.size)
        world.everyone = world.comm
        self.meet(world, trains=trains)
        died = [name for name in before if name not in self.names]
        return Change(died, [name for name in self.names if name not in before])

    def _start(self, world: "World", count: int) -> None:
        from hvdvae.world.mpi import MpiCollectives
        from hvdvae.world.spawn import start_ranks

        self._started += count
        with world.waiting("start of new ranks", patient=True):
            everyone = start_ranks(world.comm, count)
            if everyone is not None:
                world.take(MpiCollectives(everyone))
