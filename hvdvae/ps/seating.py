"""Workers keep to cores of their own where servers have none left to be on.

A server that wakes takes a core from a worker for a moment. Left to itself, the scheduler then moves workers about, and
each finds its caches cold; a worker that has a place of its own comes back to it. Servers go where a worker waits for
them (doorbell.py).
"""

import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from hvdvae.cores import available_cores, in_neighbourhood


def take_seat(host: Any, *, serves: bool) -> Callable[[], None]:
    """Keep this process to its share of cores, if it is one of `host`'s that trains; returns how to leave it again.

    `host`: a communicator of the ranks of one host. Blocks; all of them must call it.
    """
    cores = available_cores()
    seats = np.zeros((host.size, 2), np.int64)
    host.Allgather(np.array([serves, zlib.crc32(repr(sorted(cores)).encode())], np.int64), seats)
    alike = bool((seats[:, 1] == seats[0, 1]).all())
    if not alike or not hasattr(os, "sched_setaffinity"):
        return _nothing  # A launcher, or `hvdvae.cores`, has placed them.
    place = int((seats[: host.rank, 0] == 0).sum())
    servers = int(seats[:, 0].sum())
    own = seat(place, host.size - servers, servers, in_neighbourhood(cores)) if not serves else set()
    if not own or torch.get_num_threads() > len(own):
        return _nothing
    with suppress(OSError):  # Where a rank may not choose, it computes as well where it is put.
        os.sched_setaffinity(0, own)
        return lambda: os.sched_setaffinity(0, cores)
    return _nothing


def seat(place: int, workers: int, servers: int, ordered: Sequence[int]) -> set[int]:
    """The cores of a worker among its host's; empty: all, since servers have room, or workers have none. Pure."""
    each = len(ordered) // workers
    if servers == 0 or len(ordered) >= workers + servers or each == 0:
        return set()
    return set(ordered[place * each : (place + 1) * each])


def _nothing() -> None:
    """Nothing was changed."""
