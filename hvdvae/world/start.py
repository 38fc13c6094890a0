"""How a process comes into a World.

meet_all         the launcher's ranks meet, each of its role
replace_worker   a worker in the place of one that died: it meets the server that started it
come_to_those    a rank in the place of one that died, or on a host that was added: it meets those that train
"""

import faulthandler
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from hvdvae.deadline import Watchdog
from hvdvae.errors import RankLost
from hvdvae.launcher import Launch, is_elastic, rank_variable, survives_deaths
from hvdvae.world import deaths
from hvdvae.world.collectives import Alone
from hvdvae.world.join import Joined, check_servers, choose_device, join_gloo, join_mpi, join_parent, split_roles
from hvdvae.world.roll_call import watched
from hvdvae.world.uncaught import end_job_on_uncaught_exception

if TYPE_CHECKING:
    from hvdvae.world import World


def meet_all(kind: "type[World]", launch: Launch, device: str, deadline: float, servers: int) -> "World":
    """The World of all that were started. Blocks; every rank must call it. Arguments and errors: World.create."""
    check_servers(servers, launch)
    # No watchdog can run before the ranks have met; this one needs no Python, as MPI_Init holds its lock.
    faulthandler.dump_traceback_later(deadline, exit=True)
    try:
        if launch.launcher == "horovodrun-gloo":
            joined = Joined(join_gloo(), local_rank=launch.local_rank, local_size=launch.local_size)
        else:
            with _roll_call(launch):
                joined = join_mpi(launch, servers)
        everyone, comm = joined.everyone, joined.comm
        serves = everyone.rank >= everyone.size - servers
        carrier = split_roles(comm, serves) if servers else everyone
    except Exception as error:
        if not (survives_deaths(os.environ) and deaths.tells_of_a_death(error)):
            raise
        raise RankLost("a rank has died before the ranks had met: start the job again") from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    watchdog = Watchdog(rank=everyone.rank, size=everyone.size, seconds=deadline, inquiry=joined.inquiry)
    launch = replace(launch, local_rank=joined.local_rank, local_size=joined.local_size)
    if joined.comm is None and launch.launcher != "horovodrun-gloo":
        launch = replace(launch, launcher="none")  # One process, without MPI.
    # GPUs are for those that train.
    chosen = choose_device("cpu" if serves else device, launch.local_rank)
    world = kind(launch, carrier, chosen, watchdog, getattr(carrier, "comm", None), comm, servers)
    if everyone.size > 1 or is_elastic(os.environ):
        _watch(world)
    if world.survives_deaths and everyone.size > 1:
        world.members.hosts = world.gather_from_everyone(world.host, "hosts of all ranks")
        world.members.meet(world, trains=True)
    elif is_elastic(os.environ):
        world.members.start_elastic(world)
    return world


def _roll_call(launch: Launch) -> AbstractContextManager[None]:
    """Looks for ranks that are gone before MPI can say so, where no launcher ends the job for one."""
    variable = rank_variable(os.environ)
    others_go_on = survives_deaths(os.environ) or launch.launcher == "srun"
    if not others_go_on or variable is None or "mpi4py.MPI" in sys.modules:
        return nullcontext()
    # Slurm's count of tasks is another on each host, and said of the first.
    return watched(os.environ, variable, 0 if launch.launcher == "srun" else launch.local_size, launch.size)


def replace_worker(kind: "type[World]", launch: Launch, device: str, deadline: float) -> "World":
    """The World of a worker that its server has started. Blocks for that server."""
    watchdog = Watchdog(rank=launch.rank, size=launch.size, seconds=deadline)
    chosen = choose_device(device, launch.local_rank)
    world = kind(launch, Alone(), chosen, watchdog, None, join_parent(), servers=1)
    world.rank, world.size = launch.rank, launch.size
    _watch(world)
    return world


def come_to_those(kind: "type[World]", launch: Launch, device: str, deadline: float) -> "World":
    """The World of a rank that others have started while they train. Blocks for them."""
    from hvdvae.world.mpi import MpiCollectives
    from hvdvae.world.spawn import join_those_that_started_me

    carrier = MpiCollectives(join_those_that_started_me())
    watchdog = Watchdog(rank=carrier.rank, size=carrier.size, seconds=deadline)
    world = kind(launch, carrier, choose_device("cpu", 0), watchdog, carrier.comm, carrier.comm)
    _watch(world)
    world.members.meet_those_that_train(world, device_is_free=False)
    world.device = choose_device(device, world.local_rank)
    return world


def _watch(world: "World") -> None:
    world.watchdog.start()
    world.leave_at_exit()
    end_job_on_uncaught_exception(world.rank, world.host)
