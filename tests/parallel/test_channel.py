"""What a rank of the parameter server has sent arrives, though it leaves at once."""

import time

import pytest
import torch

from hvdvae.world import World

pytest.importorskip("mpi4py")

ELEMENTS = 1_000_003
"""So many that MPI does not copy them, but sends them once the receiver takes them."""


def test_what_was_sent_last_arrives_whole_though_its_sender_leaves_at_once(world: World) -> None:
    """A server answers a worker that comes too late, and ends: the memory it answers from is given back."""
    if world.comm is None or world.size == 1:
        pytest.skip("needs MPI, and a rank that sends")
    from hvdvae.ps.opening import open_channel

    workers = world.size - 1
    channel = open_channel(
        world.comm,
        workers=workers,
        lengths=(ELEMENTS, 0),
        dtype=torch.float32,
        peers=range(world.size),
        may_share=False,
    )
    if world.rank == workers:
        sent = torch.arange(ELEMENTS, dtype=torch.float32)
        for worker in range(workers):
            channel.send_vector(worker, sent)
        channel.close()
        sent.fill_(-1)
    else:
        time.sleep(0.2)
        received = torch.empty(ELEMENTS)
        channel.receive_vector(workers, received)
        assert torch.equal(received, torch.arange(ELEMENTS, dtype=torch.float32))
        channel.close()
