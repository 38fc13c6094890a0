"""What a World does about ranks that have died, where MPI (ULFM) or an elastic horovodrun lets the others go on."""

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from hvdvae.errors import RankLost
from hvdvae.launcher import survives_deaths

if TYPE_CHECKING:
    from hvdvae.world import World

DEPARTURE_SECONDS = 2.0
"""Within which a rank that has left Horovod says so; watchdogs look twice a second."""
DETECTION_SECONDS = 3.0
"""Within which MPI tells who has died, once a message to them has failed."""


def tells_of_a_death(error: Exception) -> bool:
    """Whether this is how MPI (ULFM), or Horovod, says that a rank has died."""
    if type(error).__name__ == "HorovodInternalError":
        return True
    if "mpi4py.MPI" not in sys.modules:
        return False
    from hvdvae.world import mpi

    return mpi.tells_of_a_death(error)


def lost(world: "World", what: str) -> RankLost:
    """The error of a death during `what`. Before training it has names, and may block for some seconds until told."""
    if starting := [one for one in world.kin if one.starting]:
        everyone, hosts = starting[0].everyone, starting[0].members.hosts
        died = [f"rank {rank} ({hosts[rank]})" for rank in sorted(_dead(everyone))] if everyone is not None else []
        return RankLost(
            f"{', '.join(died) or 'a rank'} has died before training began, during {what}: start the job again"
        )
    return RankLost(
        f"a rank died during {what}, step {world.watchdog.step}: continue from the last checkpoint with --resume"
    )


def departed(world: "World", error: Exception) -> str:
    """Which rank has left for good, where a wait has failed for that; empty: none. Blocks for some seconds.

    Horovod ends all ranks' waits where one rank's program ends, which says so itself a moment later.
    """
    is_horovod = type(error).__name__ == "HorovodInternalError"
    give_up = time.monotonic() + (DEPARTURE_SECONDS if is_horovod and not world.survives_deaths else 0.0)
    while not (left := world.watchdog.departed()) and time.monotonic() < give_up:
        time.sleep(0.02)
    return left


def failed(world: "World", what: str, error: Exception) -> RankLost:
    """The error where nobody can go on, nor tell whether a rank has died or two disagree. Local."""
    if "shut down" in str(error):
        return RankLost(
            f"a rank has left Horovod, and this one waits for it in {what}, step {world.watchdog.step}: its loop has "
            "ended (give all ranks as many batches), or it has died (continue from the last checkpoint with --resume)"
        )
    return RankLost(
        f"{type(error).__name__} during {what}, step {world.watchdog.step} ({str(error).strip().splitlines()[0]}): "
        "where a rank has died, continue from the last checkpoint with --resume"
    )


def end_waits(world: "World") -> None:
    """End the others' waits for this rank, which leaves what it is in, as a rank has died. Blocks for Horovod."""
    for one in world.kin:
        one.carrier.revoke()
        for comm in one.revocable:
            comm.Revoke()
    if len(world.kin) > 1:  # Who shares Horovod with this rank may have met no death.
        for one in world.kin:
            one.stop_horovod()


def missing(world: "World") -> dict[int, str]:
    """Ranks that have died, with their names when they started (ULFM). Blocks for some seconds until it is told."""
    if world.comm is None or not survives_deaths(os.environ):
        return {}
    return {rank: world.members.names[rank] for rank in sorted(_dead(world.comm))}


def _dead(comm: Any) -> set[int]:
    from hvdvae.world.mpi import dead_ranks

    give_up = time.monotonic() + DETECTION_SECONDS
    while not (dead := dead_ranks(comm)) and time.monotonic() < give_up:
        time.sleep(0.01)
    return dead
