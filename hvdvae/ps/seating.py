"""Workers keep to cores of their own where servers have none left, and a server goes where it is waited for.

A server that wakes takes a core from a worker for a moment. Left to itself, the scheduler takes any, and then moves
workers about, who find their caches cold. So each worker has a place of its own to come back to, and the server of a
host, if it has one, goes on at the core of the worker that it has heard from, which nobody else wants: the worker waits
for the answer, and has just written there what is to be read. With the answer the server gives the core back: what it
has left to do it may do elsewhere.
"""

import os
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hvdvae.cores import available_cores, in_neighbourhood


class Seat:
    """Where one process computes."""

    def __init__(self, cores: dict[int, set[int]] | None = None, own: set[int] | None = None) -> None:
        """`cores`: of each worker on a server's host; `own`: those that a worker keeps to from now on."""
        self._cores = cores or {}
        self._before = available_cores()
        self._at: set[int] = self._before
        self._move(own or self._before)

    def join(self, worker: int) -> None:
        """A server goes on where this worker is; not where it is on another host. Local."""
        self._move(self._cores.get(worker, self._before))

    def rise(self) -> None:
        """A server may be moved to another core from now on. Local."""
        self._move(self._before)

    def leave(self) -> None:
        """Be free again. Local."""
        self._move(self._before)

    def _move(self, cores: set[int]) -> None:
        if cores == self._at:
            return
        try:
            os.sched_setaffinity(0, cores)
            self._at = cores
        except OSError:  # Where a process may not choose, it computes as well where it is put.
            self._cores = {}


def take_seat(host: Any, rank: int, *, workers: int) -> Seat:
    """This process's place among those of `host`, a communicator of the ranks of one host; workers come first.

    Blocks; all of them must call it.
    """
    cores, threads = available_cores(), torch.get_num_threads()
    seats = np.zeros((host.size, 3), np.int64)
    host.Allgather(np.array([rank, threads, zlib.crc32(repr(sorted(cores)).encode())], np.int64), seats)
    if not hasattr(os, "sched_setaffinity") or len(set(seats[:, 2].tolist())) > 1:
        return Seat()  # A launcher, or hvdvae/cores.py, has placed them.
    here = [int(number) for number in seats[:, 0] if number < workers]
    shares = worker_cores(len(here), host.size - len(here), in_neighbourhood(cores))
    # Servers have one thread, and no say.
    if not shares or max(seats[seats[:, 0] < workers, 1]) > min(map(len, shares)):
        return Seat()
    places = dict(zip(here, shares, strict=True))
    if rank in places:
        return Seat(own=places[rank])
    # A worker waits for all servers at once: they would only stand in each other's way.
    return Seat(places if host.size == len(here) + 1 else None)


def worker_cores(workers: int, servers: int, ordered: Sequence[int]) -> list[set[int]]:
    """The cores of each worker of a host; none, where servers have room, or workers have less than one each. Pure."""
    if workers == 0 or servers == 0 or not workers <= len(ordered) < workers + servers:
        return []
    each = len(ordered) // workers
    return [set(ordered[place * each : (place + 1) * each]) for place in range(workers)]
