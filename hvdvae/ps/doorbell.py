"""How a process sleeps until a peer has sent it something, without burning a core and without being late.

MPI waits by spinning. Here a waiting process sleeps in the kernel instead, and who has sent it a message rings: posts a
named semaphore, if both are on one host. From other hosts nobody can ring; then the sleep is short, and the process
looks again.

A semaphore and not a socket: a socket's wake-up tells the scheduler that the waker is about to sleep, so that the woken
one queues on its core. A server that has answered one worker goes on with the next, and the first would wait for that.
"""

import ctypes
import errno
import os
import time
from collections.abc import Iterable

NAP_SECONDS = 60e-6
"""Between two looks where a peer cannot ring: what a message waits on average is half of it, and the kernel's slack."""

LONG_SLEEP_SECONDS = 0.01
"""Where all peers can ring: a safety, should a ring have come before its message."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.sem_open.restype = ctypes.c_void_p
_libc.sem_open.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_uint)
for _name in ("sem_post", "sem_trywait", "sem_close"):
    getattr(_libc, _name).argtypes = (ctypes.c_void_p,)
_libc.sem_timedwait.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Timespec))
# The clock of sem_timedwait may be set back while somebody sleeps by it; glibc has this one from 2.30 on.
_sem_clockwait = getattr(_libc, "sem_clockwait", None)
if _sem_clockwait is not None:
    _sem_clockwait.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Timespec))


class Doorbell:
    """One a process. Hang it, let all hang theirs, connect it, let all connect, and take the name down."""

    def __init__(self, token: str, rank: int) -> None:
        """Hang this rank's bell. `token` names the job, and is the same on all its ranks."""
        self._token, self._rank = token, rank
        self._sleep = NAP_SECONDS
        self._mine = self._open(rank, os.O_CREAT | os.O_EXCL)
        self._others: dict[int, int] = {}

    def connect(self, neighbours: Iterable[int], *, all_peers_ring: bool) -> None:
        """Find the bells of the ranks on this host; `all_peers_ring`: nobody else will send anything."""
        self._others = {other: self._open(other, 0) for other in neighbours if other != self._rank}
        self._sleep = LONG_SLEEP_SECONDS if all_peers_ring else NAP_SECONDS

    def expect_strangers(self) -> None:
        """From now on somebody will send who cannot ring."""
        self._sleep = NAP_SECONDS

    def unlink(self) -> None:
        """Forget the name, which all have used; a killed process then leaves no file behind."""
        _libc.sem_unlink(self._name(self._rank))

    def ring(self, rank: int) -> None:
        """Wake that rank, if it is on this host. Does not block."""
        if rank in self._others:
            _libc.sem_post(self._others[rank])

    def sleep(self) -> None:
        """Return when rung, or after a while. Rings that came before are spent by it."""
        if self._is_rung():
            while _libc.sem_trywait(self._mine) == 0:
                pass

    def _is_rung(self) -> bool:
        clock = time.CLOCK_MONOTONIC if _sem_clockwait is not None else time.CLOCK_REALTIME
        until = time.clock_gettime(clock) + self._sleep
        limit = _Timespec(int(until), int(until % 1 * 1e9))
        if _sem_clockwait is not None:
            return bool(_sem_clockwait(self._mine, clock, ctypes.byref(limit)) == 0)
        return bool(_libc.sem_timedwait(self._mine, ctypes.byref(limit)) == 0)

    def close(self) -> None:
        """Let go of all bells."""
        for bell in (self._mine, *self._others.values()):
            _libc.sem_close(bell)
        self._others.clear()

    def _name(self, rank: int) -> bytes:
        return f"/hvdvae-{self._token}-{rank}".encode()

    def _open(self, rank: int, flags: int) -> int:
        bell: int | None = _libc.sem_open(self._name(rank), flags, 0o600, 0)
        if not bell:
            code = ctypes.get_errno()
            raise OSError(code, f"semaphore {self._name(rank).decode()}: {errno.errorcode.get(code, code)}")
        return bell
