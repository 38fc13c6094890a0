"""A model that ranks hold together outlives their deaths, as long as every part of it has one rank left.

    dp = 2, pp = 2:   copy 0   0 1    1 dies:        0 .    2 and 3 go on, and 0, which no copy needs, leaves
                      copy 1   2 3                   2 3
                                      1 and 2 die:   0 .    0 and 3 are a copy from now on
                                                     . 3

Copies hold the same after each step, so any ranks that hold all parts make a copy. As many go on as the rarest part has
ranks, whole ones first: their ranks may share a host. That is so only where no part is a step further than the others:
ranks that have the mean gradient do not step before all that live have theirs (`commit`).

On each communicator of all ranks every one takes part in exactly one agreement that fails, its last there; it fails on
all that live. So they come to the next one together, also where one more dies while new groups are made.
"""

import sys
from typing import Any

from mpi4py import MPI

from hvdvae.abort import LEFT
from hvdvae.errors import PartLost
from hvdvae.parallel.mesh import Groups, Mesh, places_of
from hvdvae.world import deaths
from hvdvae.world.mpi import MpiCollectives, agree


class Survival:
    """This rank's say in whether all go on. ULFM only."""

    def __init__(self, groups: Groups) -> None:
        """Local."""
        self._groups = groups
        self._ended: Any = None
        """The communicator on which an agreement has failed."""

    def commit(self, what: str) -> None:
        """Return on all ranks that live, or raise RankLost on all of them. Blocks; every one must call it."""
        world = self._groups.whole
        with world.watchdog.waiting(f"agreement on {what}"):
            agreed = agree(world.comm, True)
        if not agreed:
            self._ended = world.comm
            deaths.end_waits(world)
            raise deaths.lost(world, what)

    def withdraw(self) -> None:
        """This rank has met a death: no `commit` of these ranks succeeds any more. Blocks for the others to hear it."""
        world = self._groups.whole
        if self._ended is not world.comm:
            self._ended = world.comm
            with world.watchdog.waiting("agreement that a rank has died"):
                agree(world.comm, False)

    def regroup(self) -> None:
        """Make copies of the model of those that live, after World.recover. Blocks; every one must call it.

        Ends the process of whom no copy needs. Raises PartLost on all where a part is left to nobody.
        """
        groups = self._groups
        whole, old = groups.whole, groups.mesh
        parts = old.pp * old.tp
        mine = [groups.stages.rank * old.tp + groups.layers.rank, groups.replicas.rank, MPI.COMM_WORLD.rank]
        found: list[list[int]] = whole.gather_objects(mine, "parts of those that are left")
        held = [part for part, *_ in found]
        new = Mesh(min(held.count(part) for part in range(parts)), old.pp, old.tp)
        if new.dp == 0:
            _, stage, piece = old.place(next(part for part in range(parts) if part not in held))
            raise PartLost(
                f"nobody is left who holds slice {piece} of stage {stage} of the model: continue from the last "
                "checkpoint with --resume"
            )
        places = places_of([(part, copy) for part, copy, _ in found], parts)
        place = places[whole.rank]
        stays = place < new.size
        colors = (0, *new.groups(place)) if stays else (MPI.UNDEFINED,) * len(groups.worlds)
        # Nobody speaks in a new group before all know that all of them are made: who failed to make one would be
        # waited for there.
        with whole.waiting("groups of those that go on"):
            comms = [whole.comm.Split(color, place) for color in colors]
        self.commit("groups of those that go on")
        if not stays:
            whole.watchdog.stop()
            sys.stderr.write(f"hvdvae: {whole.members.name} leaves: no whole copy of the model needs it any more\n")
            raise SystemExit(0)
        gone = {one for (*_, one), number in zip(found, places, strict=True) if number >= new.size}
        LEFT.update(gone)
        whole.watchdog.forget(gone)
        names = dict(zip(places, whole.members.names, strict=True))
        whole.members.names = [names[number] for number in range(new.size)]
        for world, comm in zip(groups.worlds, comms, strict=True):
            world.take(MpiCollectives(comm, is_ours=True))
        whole.everyone, groups.mesh = whole.comm, new
