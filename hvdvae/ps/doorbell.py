"""How a process sleeps until a peer has sent it something, without burning a core and without being late.

MPI waits by spinning. Here a waiting process sleeps in the kernel instead, and who has sent it a message rings, if both
are on one host. From other hosts nobody can ring; then the sleep is short, and the process looks again.

A server's bell is a pipe, a worker's a semaphore, for what they tell the scheduler. Who writes into a pipe is taken to
sleep soon, so that the woken one may queue on its core: a worker that has pushed waits for the answer, and the server
does best on just that core, which nobody else wants. A server that has answered goes on with the next worker, and the
first must not wait for that: a semaphore tells nothing.
"""

import ctypes
import errno
import os
import select
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Protocol

from hvdvae.ps import memory

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


class _Bell(Protocol):
    def ring(self) -> None: ...

    def wait(self, seconds: float) -> None: ...

    def close(self) -> None: ...


class _Semaphore:
    """A worker's bell."""

    def __init__(self, name: str, *, create: bool) -> None:
        bell: int | None = _libc.sem_open(f"/{name}".encode(), os.O_CREAT | os.O_EXCL if create else 0, 0o600, 0)
        if not bell:
            code = ctypes.get_errno()
            raise OSError(code, f"semaphore /{name}: {errno.errorcode.get(code, code)}")
        self._bell = bell

    @staticmethod
    def unlink(name: str) -> None:
        _libc.sem_unlink(f"/{name}".encode())

    def ring(self) -> None:
        _libc.sem_post(self._bell)

    def wait(self, seconds: float) -> None:
        if self._is_rung(seconds):
            while _libc.sem_trywait(self._bell) == 0:
                pass

    def _is_rung(self, seconds: float) -> bool:
        clock = time.CLOCK_MONOTONIC if _sem_clockwait is not None else time.CLOCK_REALTIME
        until = time.clock_gettime(clock) + seconds
        limit = _Timespec(int(until), int(until % 1 * 1e9))
        if _sem_clockwait is not None:
            return bool(_sem_clockwait(self._bell, clock, ctypes.byref(limit)) == 0)
        return bool(_libc.sem_timedwait(self._bell, ctypes.byref(limit)) == 0)

    def close(self) -> None:
        _libc.sem_close(self._bell)


class _Pipe:
    """A server's bell."""

    def __init__(self, name: str, *, create: bool) -> None:
        path = memory.FOLDER / name
        if create:
            os.mkfifo(path, 0o600)
        # For both directions: so it can be opened before anybody else has.
        self._pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    @staticmethod
    def unlink(name: str) -> None:
        memory.forget(name)

    def ring(self) -> None:
        with suppress(OSError):  # Full: it is rung.
            os.write(self._pipe, b".")

    def wait(self, seconds: float) -> None:
        if select.select([self._pipe], [], [], seconds)[0]:
            os.read(self._pipe, 65536)

    def close(self) -> None:
        os.close(self._pipe)


class Doorbell:
    """One a process. Hang it, let all hang theirs, connect it, let all connect, and take the name down."""

    def __init__(self, token: str, rank: int, *, workers: int) -> None:
        """Hang this rank's bell. `token` names the job, the same on all its ranks; servers come after workers."""
        self._token, self._rank, self._workers = token, rank, workers
        self._sleep = NAP_SECONDS
        self._mine = self._open(rank, create=True)
        self._others: dict[int, _Bell] = {}

    def connect(self, neighbours: Iterable[int], *, all_peers_ring: bool) -> None:
        """Find the bells of the ranks on this host; `all_peers_ring`: nobody else will send anything."""
        self._others = {other: self._open(other, create=False) for other in neighbours if other != self._rank}
        self._sleep = LONG_SLEEP_SECONDS if all_peers_ring else NAP_SECONDS

    def expect_strangers(self) -> None:
        """From now on somebody will send who cannot ring."""
        self._sleep = NAP_SECONDS

    def unlink(self) -> None:
        """Forget the name, which all have used; a killed process then leaves no file behind."""
        self._kind(self._rank).unlink(self._name(self._rank))

    def ring(self, rank: int) -> None:
        """Wake that rank, if it is on this host. Does not block."""
        if rank in self._others:
            self._others[rank].ring()

    def sleep(self) -> None:
        """Return when rung, or after a while. Rings that came before are spent by it."""
        self._mine.wait(self._sleep)

    def close(self) -> None:
        """Let go of all bells."""
        for bell in (self._mine, *self._others.values()):
            bell.close()
        self._others.clear()

    def _name(self, rank: int) -> str:
        return f"hvdvae-bell-{self._token}-{rank}"

    def _kind(self, rank: int) -> type[_Semaphore] | type[_Pipe]:
        return _Semaphore if rank < self._workers else _Pipe

    def _open(self, rank: int, *, create: bool) -> _Bell:
        return self._kind(rank)(self._name(rank), create=create)
