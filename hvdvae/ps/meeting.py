"""How workers and servers meet: all say what they are, compare, and open the channel between them."""

from typing import NamedTuple

import torch

from hvdvae.errors import ConfigError
from hvdvae.flat_layout import Runs
from hvdvae.ps.channel import Channel
from hvdvae.ps.hello import Hello, check_hello
from hvdvae.ps.opening import open_channel, open_joining_channel
from hvdvae.ps.plan import Plan
from hvdvae.ps.shards import cut
from hvdvae.world import World
from hvdvae.world.mpi import can_ask_from_threads


class Meeting(NamedTuple):
    """What all ranks agreed on."""

    channel: Channel
    shards: list[slice]
    """Of the parameter vector, one a server."""
    groups: list[slice]
    """Of the parameter vector, one a parameter group."""
    hello: Hello
    """Of worker 0; every worker said the same."""

    @property
    def runs(self) -> Runs:
        """Of the parameter vector, what its parameters are, without the gaps between them."""
        return Runs([slice(start, stop) for start, stop in self.hello["runs"]], self.hello["parameters"])


def meet(world: World, hello: Hello, plan: Plan) -> Meeting:
    """Compare hellos and open the channel. Blocks; workers and servers must call it.

    Raises WorldError on all of them where they differ, ConfigError for what outlives deaths where any ends the job.
    """
    if (plan.replicas or plan.replace_workers) and not world.survives_deaths:
        raise ConfigError(
            "--replicas and --replace-workers need an MPI that lets the others go on when a rank dies: start with "
            "mpirun --with-ft ulfm (Open MPI 5)"
        )
    if plan.replace_workers and not can_ask_from_threads():
        raise ConfigError(
            "--replace-workers needs an MPI with MPI_THREAD_MULTIPLE: a server starts workers in a thread; leave it"
        )
    hellos = world.gather_from_everyone(hello, "meeting of workers and parameter servers")
    workers = world.everyone.size - world.servers
    check_hello(hellos, workers)
    first = hellos[0]
    groups = [slice(start, stop) for start, stop in first["groups"]]
    shards = plan.shards(world.servers)
    if world.role == "server":
        peers = {*range(workers), *partners(workers, shards, plan)[world.rank % shards]}
    else:
        peers = set(range(workers, world.everyone.size))
    with world.watchdog.waiting("memory shared by workers and parameter servers"):
        lengths = (first["parameters"], first["buffers"])
        dtype = getattr(torch, first["dtype"])
        channel = open_channel(
            world.everyone,
            workers=workers,
            lengths=lengths,
            dtype=dtype,
            peers=peers,
            may_share=plan.compression == "none",
        )
    return Meeting(channel, cut(groups, shards), groups, first)


def meet_running(world: World, hello: Hello, plan: Plan) -> Meeting:
    """As `meet`, of a worker that takes a dead one's place: it meets the server alone, which compares. Local."""
    channel = open_joining_channel(
        world.everyone,
        world.rank,
        workers=world.size,
        lengths=(hello["parameters"], hello["buffers"]),
        dtype=getattr(torch, hello["dtype"]),
    )
    groups = [slice(start, stop) for start, stop in hello["groups"]]
    return Meeting(channel, cut(groups, 1), groups, hello)


def partners(workers: int, shards: int, plan: Plan) -> list[list[int]]:
    """Ranks that hold each shard, the primary first: after the workers come all primaries, then all backups."""
    return [[workers + shard + shards * copy for copy in range(1 + plan.replicas)] for shard in range(shards)]
