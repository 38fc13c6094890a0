"""What a server's rank does from the meeting with the workers to their end."""

import sys

import torch

from hvdvae.flat_layout import Runs
from hvdvae.ps.channel import Channel
from hvdvae.ps.hello import server_hello
from hvdvae.ps.link import Link
from hvdvae.ps.meeting import meet, partners
from hvdvae.ps.plan import Plan
from hvdvae.ps.recruiter import Recruiter
from hvdvae.ps.replica import Backup, Primary
from hvdvae.ps.server import Server
from hvdvae.ps.shards import pieces
from hvdvae.ps.weights import Weights
from hvdvae.signals import Caught, caught
from hvdvae.world import World


def serve(world: World, plan: Plan) -> None:
    """Be a server until the workers have ended. Blocks; every server must call it, while workers build the strategy.

    Raises WorldError where ranks differ.
    """
    torch.set_num_threads(1)
    meeting = meet(world, server_hello(plan), plan)
    channel, shards = meeting.channel, len(meeting.shards)
    number = world.rank % shards
    shard, is_last = meeting.shards[number], number == shards - 1
    buffers = meeting.hello["buffers"] if is_last else 0
    weights = Weights(
        plan,
        workers=channel.workers,
        buffers=buffers,
        pieces=pieces(meeting.groups, shard),
        dtype=channel.dtype,
        length=shard.stop - shard.start,
        optimizer=meeting.hello["optimizer"],
        clip_norm=meeting.hello["clip_norm"],
        sum_over_servers=lambda value: value if shards == 1 else world.sum_(value, "norm of the gradient"),
    )
    world.starting = False
    recruiter = Recruiter(channel, meeting.hello) if plan.replace_workers else None
    # A signal ends the workers' runs, which hear of it with their next answers, and those end this one.
    with caught() as flag:
        holders = partners(channel.workers, shards, plan)[number]
        link = _link(channel, shard, is_last, buffers, holders, plan, flag, meeting.runs)
        Server(link, weights, plan, world.watchdog, flag, recruiter).run()
    if plan.replicas:
        world.shrink()  # A server may have died, and not all that are left need to know.
    with world.watchdog.waiting("workers that take the last answers", patient=True):
        channel.close()


def _link(
    channel: Channel,
    shard: slice,
    is_last: bool,
    buffers: int,
    holders: list[int],
    plan: Plan,
    flag: Caught,
    runs: Runs,
) -> Link:
    if len(holders) == 1:
        return Link(channel, shard, is_last=is_last, buffers=buffers, plan=plan, runs=runs)
    primary, backup = holders
    if channel.rank == primary:
        return Primary(channel, shard, is_last=is_last, buffers=buffers, backup=backup, flag=flag)
    return Backup(channel, shard, is_last=is_last, buffers=buffers, primary=primary, flag=flag)


def serve_and_exit(world: World, plan: Plan) -> None:
    """Serve, then end this process: what a server's rank does in a program that was written for workers."""
    serve(world, plan)
    world.close()
    sys.exit(0)
