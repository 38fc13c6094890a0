"""How a process sleeps until a peer has sent it something, without burning a core and without being late.

MPI waits by spinning. Here a waiting process sleeps in the kernel instead, and who has sent it a message rings: an
empty datagram on a Unix socket, if both are on one host. From other hosts nobody can ring; then the sleep is short,
and the process looks again.
"""

import contextlib
import os
import select
import socket
from collections.abc import Iterable

NAP_SECONDS = 60e-6
"""Between two looks where a peer cannot ring: what a message waits on average is half of it, and the kernel's slack."""

LONG_SLEEP_SECONDS = 0.01
"""Where all peers can ring: a safety, should a ring have come before its message."""


class Doorbell:
    """One a process. `token` names the job, and is the same on all its ranks."""

    def __init__(self, token: str, rank: int, neighbours: Iterable[int], *, all_peers_ring: bool) -> None:
        """Open this rank's bell. `neighbours`: ranks on this host, which can be rung and can ring."""
        self._addresses = {other: _address(token, other) for other in neighbours if other != rank}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(_address(token, rank))
        self._sleep = LONG_SLEEP_SECONDS if all_peers_ring else NAP_SECONDS

    def ring(self, rank: int) -> None:
        """Wake that rank, if it is on this host. Does not block."""
        address = self._addresses.get(rank)
        if address is not None:
            # A full queue means that it was rung already; no listener, that it has ended.
            with contextlib.suppress(BlockingIOError, ConnectionRefusedError, FileNotFoundError):
                self._socket.sendto(b"\0", address)

    def sleep(self) -> None:
        """Return when rung, or after a while. Rings that came before are spent by it."""
        if select.select([self._socket], [], [], self._sleep)[0]:
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._socket.recv(1)

    def close(self) -> None:
        """Take the bell down."""
        self._socket.close()


def _address(token: str, rank: int) -> str:
    # The abstract namespace of Linux: no file that a killed process leaves behind.
    return f"\0hvdvae-{os.getuid()}-{token}-{rank}"
