"""How fast hosts reach each other: a message there and back between every two of them, at the start of a run.

Protocol, on a communicator of the first rank of each host; in round r every host meets one other, as in a tournament:

    tag    direction                payload, uint8
    PING   lower -> higher, back    1 byte, LATENCY_TRIPS times; then BANDWIDTH_BYTES, BANDWIDTH_TRIPS times
"""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from hvdvae.world import World

PING = 1
LATENCY_TRIPS, BANDWIDTH_TRIPS = 10, 3
BANDWIDTH_BYTES = 1 << 20
SLOW = 3.0
"""So many times slower than the median pair is worth a warning."""
SLOW_BYTES_PER_SECOND = 0.9e9 / 8
"""Below this a link is slow whatever the others do: less than Gigabit Ethernet."""


class Pair(NamedTuple):
    """What was measured between two hosts."""

    hosts: tuple[str, str]
    seconds: float
    """One way, of a byte."""
    bytes_per_second: float
    """One way, of a MiB."""


def probe_hosts(world: World) -> list[Pair]:
    """Every two hosts of a job, servers' too, on all ranks. Blocks; every rank must call it. Empty without MPI."""
    comm = world.everyone
    if comm is None or comm.size == 1:
        return []
    with world.watchdog.waiting("probe of the hosts"):
        hosts = _gathered(comm, world.host)
        if len(set(hosts)) == 1:
            return []
        leads = hosts.index(world.host) == comm.rank
        leaders = comm.Split(int(leads), comm.rank)
        try:
            mine = _measure(leaders, _gathered(leaders, world.host)) if leads else []
        finally:
            leaders.Free()
        return [Pair((pair[0][0], pair[0][1]), *pair[1:]) for found in _gathered(comm, mine) for pair in found]


def slow_pairs(pairs: Sequence[Pair]) -> list[str]:
    """A warning for each two hosts that reach each other slowly. Pure."""
    if not pairs:
        return []
    usual_seconds, usual_rate = median(p.seconds for p in pairs), median(p.bytes_per_second for p in pairs)
    warnings = []
    for pair in pairs:
        slower = usual_rate / pair.bytes_per_second
        if slower > SLOW or pair.bytes_per_second < SLOW_BYTES_PER_SECOND or pair.seconds > SLOW * usual_seconds:
            warnings.append(
                f"{pair.hosts[0]} and {pair.hosts[1]} reach each other slowly: {8e-6 * pair.bytes_per_second:.0f} "
                f"Mbit/s, {1e6 * pair.seconds:.0f} us; the median pair has {8e-6 * usual_rate:.0f} Mbit/s, "
                f"{1e6 * usual_seconds:.0f} us. Look at the link, or send less: --compression, --strategy local-sgd"
            )
    return warnings


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Every pair of `count` once, in rounds in which nobody is in two pairs. Pure."""
    players = list(range(count + count % 2))  # The one beyond the last is nobody.
    found = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        found.append([(min(pair), max(pair)) for pair in pairs if max(pair) < count])
        players = [players[0], players[-1], *players[1:-1]]
    return found


def _measure(leaders: Any, hosts: list[str]) -> list[Pair]:
    """The pairs in which this host is the lower."""
    found = []
    for pairs in rounds(leaders.size):
        # Together: a pair that is still busy would slow down the others' round.
        leaders.Barrier()
        for low, high in pairs:
            if leaders.rank not in (low, high):
                continue
            seconds = min(_trips(leaders, low, high, 1, LATENCY_TRIPS)) / 2
            lasted = min(_trips(leaders, low, high, BANDWIDTH_BYTES, BANDWIDTH_TRIPS)) / 2
            if leaders.rank == low:
                found.append(Pair((hosts[low], hosts[high]), seconds, BANDWIDTH_BYTES / lasted))
    return found


def _trips(comm: Any, low: int, high: int, nbytes: int, count: int) -> list[float]:
    """Seconds of each message there and back; the first, for which connections are made, is left out."""
    message, lasted = np.zeros(nbytes, np.uint8), []
    for _ in range(count + 1):
        begin = time.perf_counter()
        if comm.rank == low:
            comm.Send(message, high, PING)
            comm.Recv(message, high, PING)
        else:
            comm.Recv(message, low, PING)
            comm.Send(message, low, PING)
        lasted.append(time.perf_counter() - begin)
    return lasted[1:]


def _gathered(comm: Any, record: Any) -> list[Any]:
    from hvdvae.world.mpi import gather_json

    return gather_json(comm, record)
