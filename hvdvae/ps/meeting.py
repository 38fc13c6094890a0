"""How workers and servers meet: all say what they are, compare, and open the channel between them.

A hello is JSON: a server's has "version" and "plan", a worker's also its model's lengths, dtype, groups and layout, its
optimizer's class, and the norm at which the servers clip.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from hvdvae.errors import ConfigError, WorldError
from hvdvae.flat import FlatModel
from hvdvae.ps.channel import Channel
from hvdvae.ps.plan import Plan
from hvdvae.ps.shards import cut
from hvdvae.version import __version__
from hvdvae.world import World

Hello = dict[str, Any]


class Meeting(NamedTuple):
    """What all ranks agreed on."""

    channel: Channel
    shards: list[slice]
    """Of the parameter vector, one a server."""
    groups: list[slice]
    """Of the parameter vector, one a parameter group."""
    hello: Hello
    """Of worker 0; every worker said the same."""


def server_hello(plan: Plan) -> Hello:
    """What a server says of itself."""
    return {"version": __version__, "plan": asdict(plan)}


def worker_hello(plan: Plan, flat: FlatModel, optimizer: str, clip_norm: float | None) -> Hello:
    """What a worker says of itself. `clip_norm`: where the servers clip, None if they do not."""
    return {
        **server_hello(plan),
        "parameters": flat.parameters.numel(),
        "buffers": flat.buffers.numel(),
        "dtype": str(flat.parameters.dtype).removeprefix("torch."),
        "groups": [[part.start, part.stop] for part in flat.group_slices],
        "optimizer": optimizer,
        "layout": flat.digest(),
        "clip_norm": clip_norm,
    }


def meet(world: World, hello: Hello, plan: Plan) -> Meeting:
    """Compare hellos and open the channel. Blocks; workers and servers must call it.

    Raises WorldError on all of them where they differ, ConfigError for backups where any death ends the job.
    """
    if plan.replicas and not world.survives_deaths:
        raise ConfigError(
            "--replicas 1 needs an MPI that lets the others go on when a rank dies: start with mpirun --with-ft ulfm "
            "(Open MPI 5)"
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
        channel = Channel(world.everyone, workers, lengths, getattr(torch, first["dtype"]), peers)
    return Meeting(channel, cut(groups, shards), groups, first)


def partners(workers: int, shards: int, plan: Plan) -> list[list[int]]:
    """Ranks that hold each shard, the primary first: after the workers come all primaries, then all backups."""
    return [[workers + shard + shards * copy for copy in range(1 + plan.replicas)] for shard in range(shards)]


def check_hello(hellos: Sequence[Hello], workers: int) -> None:
    """Compare what all ranks say of themselves, workers first; all get the same list, so all raise alike.

    Raises WorldError naming the rank and what differs: version, options, model or optimizer.
    """
    for rank, hello in enumerate(hellos):
        for key in ("version", "plan") if rank >= workers else hellos[0].keys():
            if hello[key] != hellos[0][key]:
                mine, theirs = _shortened(hellos[0][key], hello[key])
                raise WorldError(
                    f"rank {rank} joins the parameter server with {key} {theirs}, rank 0 has {mine}: start all ranks "
                    "with the same program and options"
                )


def _shortened(first: Any, other: Any) -> tuple[Any, Any]:
    if isinstance(first, dict) and isinstance(other, dict):
        odd = [key for key in first if first[key] != other.get(key)]
        return {key: first[key] for key in odd}, {key: other.get(key) for key in odd}
    return first, other
