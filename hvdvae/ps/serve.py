"""What a server's rank does from the meeting with the workers to their end."""

import sys
from typing import Any

import torch

from hvdvae.ps.meeting import meet, server_hello
from hvdvae.ps.plan import Plan
from hvdvae.ps.server import Server
from hvdvae.signals import caught
from hvdvae.world import World


def serve(world: World, plan: Plan) -> dict[str, Any]:
    """Be a server until the workers have ended. Blocks; every server must call it, while workers build the strategy.

    Returns the server's ledger. Raises WorldError where ranks differ.
    """
    torch.set_num_threads(1)
    meeting = meet(world, server_hello(plan))
    server = Server(
        meeting.channel,
        plan,
        groups=meeting.groups,
        shard=meeting.shards[world.rank],
        is_last=world.rank == world.size - 1,
        buffers=meeting.hello["buffers"],
        optimizer=meeting.hello["optimizer"],
        clip_norm=meeting.hello["clip_norm"],
        watchdog=world.watchdog,
        sum_over_servers=lambda value: world.sum_(value, "norm of the gradient"),
    )
    with caught():  # Signals end the workers' runs, and those end this one.
        server.run()
    meeting.channel.close()
    return server.ledger.summary()


def serve_and_exit(world: World, plan: Plan) -> None:
    """Serve, then end this process: what a server's rank does in a program that was written for workers."""
    serve(world, plan)
    world.close()
    sys.exit(0)
