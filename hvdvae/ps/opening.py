"""How a channel is opened: memory and bells that processes of one host share, under names that are forgotten at once.

Shapes: P parameters, F elements of float buffers (the last shard's push carries them behind its slice).
A worker has two vectors: `outgoing` (P + F), what it pushes, and `incoming` (P), what it pulls.
"""

import secrets
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hvdvae.flat_layout import ALIGNED
from hvdvae.ps import memory
from hvdvae.ps.channel import Channel
from hvdvae.ps.doorbell import Doorbell
from hvdvae.ps.seating import take_seat
from hvdvae.world.shared_memory import fits


def open_channel(
    comm: Any,
    *,
    workers: int,
    lengths: tuple[int, int],
    dtype: torch.dtype,
    peers: Iterable[int],
    may_share: bool,
) -> Channel:
    """Open this rank's end, on a duplicate of `comm`. `lengths`: P and F; `peers`: ranks that it will hear of.

    `may_share`: whether vectors may be exchanged in shared memory, as they are.
    Blocks; every rank of `comm` must call it.
    """
    comm = comm.Dup()
    rank: int = comm.rank
    token = _token(comm)
    host: Any = comm.Split_type(MPI.COMM_TYPE_SHARED)
    ranks = np.zeros(host.size, np.int64)
    host.Allgather(np.array([rank], np.int64), ranks)
    neighbours = ranks.tolist()
    seat = take_seat(host, rank, workers=workers)
    mine = _bytes_of(lengths, dtype) if rank < workers else 0
    largest = np.array([mine], np.int64)
    host.Allreduce(MPI.IN_PLACE, largest, op=MPI.MAX)
    shares = may_share and host.size > 1 and fits(host, int(largest[0]))
    bell = Doorbell(token, rank)
    vectors = {}
    if mine:
        created = memory.create(f"hvdvae-{token}-{rank}", mine) if shares else _own(mine)
        vectors[rank] = _halves(created, lengths, dtype)
    comm.Barrier()
    bell.connect(neighbours, all_peers_ring=set(peers) <= set(neighbours))
    if shares:
        for other in neighbours:
            if other < workers and other != rank:
                vectors[other] = _halves(memory.attach(f"hvdvae-{token}-{other}"), lengths, dtype)
    comm.Barrier()
    bell.unlink()
    memory.forget(f"hvdvae-{token}-{rank}")
    sharing = neighbours if shares else ()
    return Channel(comm, rank, workers=workers, dtype=dtype, bell=bell, vectors=vectors, sharing=sharing, seat=seat)


def open_joining_channel(
    comm: Any, worker: int, *, workers: int, lengths: tuple[int, int], dtype: torch.dtype
) -> Channel:
    """The end of a worker that joins a running job. `comm`: this process, and the server as its rank 1. Local."""
    bell = Doorbell(secrets.token_hex(8), worker)
    bell.unlink()
    vectors = {worker: _halves(_own(_bytes_of(lengths, dtype)), lengths, dtype)}
    channel = Channel(comm, worker, workers=workers, dtype=dtype, bell=bell, vectors=vectors)
    channel.admit(workers, comm, 1)
    return channel


def _token(comm: Any) -> str:
    """A random word, the same on all ranks."""
    random = np.frombuffer(secrets.token_bytes(8), np.uint8).copy()
    comm.Bcast(random)
    return random.tobytes().hex()


def _bytes_of(lengths: tuple[int, int], dtype: torch.dtype) -> int:
    parameters, buffers = lengths
    return (2 * parameters + _aligned(buffers, dtype)) * dtype.itemsize


def _own(size: int) -> Any:
    """Memory of this process, zeroed, that begins where torch's own does."""
    return torch.zeros(size, dtype=torch.uint8).numpy()


def _halves(buffer: Any, lengths: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both begin at a multiple of 64 bytes, as the parameters in them do; (P) is one already."""
    parameters, buffers = lengths
    behind = parameters + _aligned(buffers, dtype)
    whole = torch.frombuffer(buffer, dtype=dtype, count=behind + parameters)
    return whole[: parameters + buffers], whole[behind:]


def _aligned(count: int, dtype: torch.dtype) -> int:
    step = ALIGNED // dtype.itemsize
    return -(-count // step) * step
