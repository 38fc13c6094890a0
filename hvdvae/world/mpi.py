"""Collectives over MPI, on a communicator of our own, and the questions that watchdogs ask each other.

Protocol of the watchdogs, on a second communicator of their own so that no user message is ever met:

    tag       direction                 payload, uint8
    ASK       late rank -> every other  empty
    ANSWER    other -> late rank        JSON of the other's state (deadline.State)
    END       rank that ends -> other   JSON of the exit status with which the other shall end, too
    LEFT      rank that leaves -> other JSON of how far it came (deadline.Departure)
"""

import json
import os
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI

from hvdvae.deadline import Departure, State
from hvdvae.world.collectives import Array, unequal_lengths

if TYPE_CHECKING:
    from collections.abc import Callable

ASK, ANSWER, END, LEFT = 1, 2, 3, 4

# MPI counts are 32-bit in most installed libraries; longer vectors go in pieces.
MAX_COUNT = 2**30


class MpiCollectives:
    """The contract of collectives.Collectives over a duplicate of `comm`."""

    def __init__(self, comm: MPI.Comm, *, is_ours: bool = False) -> None:
        """Duplicate `comm` (collective over it), so that no message of the user's can be mistaken for one of ours.

        `is_ours`: nobody else has it.
        """
        self.comm = comm if is_ours else comm.Dup()
        self.rank: int = self.comm.rank
        self.size: int = self.comm.size

    def sum_(self, array: Array) -> None:
        """MPI_Allreduce, in place."""
        self._reduce(array, MPI.SUM)

    def max_(self, array: Array) -> None:
        """MPI_Allreduce with MAX, in place."""
        self._reduce(array, MPI.MAX)

    def _reduce(self, array: Array, op: MPI.Op) -> None:
        flat = array.reshape(-1)
        for start in range(0, flat.size, MAX_COUNT):
            self.comm.Allreduce(MPI.IN_PLACE, flat[start : start + MAX_COUNT], op)

    def broadcast_(self, array: Array, root: int) -> None:
        """MPI_Bcast."""
        flat = array.reshape(-1)
        for start in range(0, flat.size, MAX_COUNT):
            self.comm.Bcast(flat[start : start + MAX_COUNT], root)

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """As the function."""
        return gather_bytes(self.comm, data)

    def gather_rows(self, row: Array, rows: Array) -> None:
        """MPI_Allgather."""
        for start in range(0, row.size, MAX_COUNT):
            part = slice(start, start + MAX_COUNT)
            if row.size <= MAX_COUNT:
                self.comm.Allgather(row, rows)
            else:  # Pieces of rows do not lie side by side.
                piece = np.empty((self.size, row[part].size), row.dtype)
                self.comm.Allgather(row[part], piece)
                rows[:, part] = piece

    def exchange_rows(self, rows: Array, found: Array) -> None:
        """MPI_Alltoall."""
        length = rows.shape[1]
        for start in range(0, length, MAX_COUNT):
            part = slice(start, start + MAX_COUNT)
            if length <= MAX_COUNT:
                self.comm.Alltoall(rows, found)
            else:  # Pieces of rows do not lie side by side.
                piece = np.empty((self.size, rows[0, part].size), rows.dtype)
                self.comm.Alltoall(np.ascontiguousarray(rows[:, part]), piece)
                found[:, part] = piece

    def barrier(self) -> None:
        """MPI_Barrier."""
        self.comm.Barrier()

    def revoke(self) -> None:
        """End every other rank's wait on this communicator with an error (ULFM). Local."""
        self.comm.Revoke()

    def shrink(self) -> None:
        """Go on without the ranks that have died (ULFM). Blocks; every living rank must call it."""
        self.comm = self.comm.Shrink()
        self.rank, self.size = self.comm.rank, self.comm.size


def gather_bytes(comm: Any, data: bytes) -> list[bytes]:
    """Every rank's bytes: MPI_Allgather of the lengths, then MPI_Allgatherv. Blocks; every rank of `comm` must call."""
    lengths = np.zeros(comm.size, np.int64)
    comm.Allgather(np.array([len(data)], np.int64), lengths)
    everything = np.empty(int(lengths.sum()), np.uint8)
    comm.Allgatherv(np.frombuffer(data, np.uint8), [everything, lengths])
    return [everything[part].tobytes() for part in unequal_lengths(lengths.tolist())]


def gather_json(comm: Any, record: Any) -> list[Any]:
    """The same of JSON-able records."""
    return [json.loads(data) for data in gather_bytes(comm, json.dumps(record).encode())]


def tells_of_a_death(error: Exception) -> bool:
    """Whether this is how MPI says that a rank has died (ULFM).

    Now and then Open MPI 5 gives ERR_OTHER where the connection to a dead rank breaks before its death is known.
    """
    deaths = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED, MPI.ERR_OTHER)
    return isinstance(error, MPI.Exception) and error.Get_error_class() in deaths


def agree(comm: Any, ready: bool) -> bool:
    """Whether no rank has died, and every one has called this as `ready`; the same answer on all that live (ULFM).

    Blocks; every living rank must call it. A communicator that was revoked may still be asked.
    """
    try:
        # Where other threads send, too (Horovod's), Open MPI 5.0 loses all votes of an agreement now and then, and
        # tells all alike 0, which nobody has voted: they ask again.
        while (found := comm.Agree(_READY if ready else _AGAINST)) == 0:
            continue
    except MPI.Exception as error:
        if not tells_of_a_death(error):
            raise
        return False
    return bool(found == _READY)


_READY, _AGAINST = 3, 2
"""Votes, of which an agreement tells the bits that all have."""


def acknowledged_deaths(comm: Any, error: MPI.Exception) -> set[int]:
    """Ranks of `comm` that have died, where that is what an error says (ULFM); any other error is raised again."""
    if error.Get_error_class() not in (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING):
        raise error
    return dead_ranks(comm)


def dead_ranks(comm: Any) -> set[int]:
    """Ranks of `comm` that this one knows to have died; from now on it is not told of them again (ULFM)."""
    comm.Ack_failed()
    failed = comm.Get_failed()
    return set(failed.Translate_ranks(list(range(failed.size)), comm.Get_group()))


class MpiInquiry:
    """Lets watchdog threads ask each other what their ranks are doing. Needs MPI_THREAD_MULTIPLE."""

    def __init__(self, comm: MPI.Comm) -> None:
        """Duplicate `comm` (collective over it)."""
        self._comm: Any = comm.Dup()
        self.lost: set[int] = set()
        self.departed: dict[int, Departure] = {}

    def leave(self, departure: Departure) -> None:
        """As Inquiry's."""
        for other in self._others():
            self._send(json.dumps(asdict(departure)).encode(), other, LEFT)

    def answer(self, state: "Callable[[], State]") -> None:
        """Answer every question that has come in, and end this process where it is told to. Does not block."""
        status = MPI.Status()
        if self._has_come(END, status):
            data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            self._comm.Recv(data, status.source, END)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(json.loads(data.tobytes()))
        while self._has_come(LEFT, status):
            data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            self._comm.Recv(data, status.source, LEFT)
            self.departed[status.source] = Departure(**json.loads(data.tobytes()))
        while self._has_come(ASK, status):
            self._comm.Recv(np.empty(0, np.uint8), status.source, ASK)
            self._send(json.dumps(state().__dict__).encode(), status.source, ANSWER)

    def end_others(self, code: int) -> None:
        """Have every other rank end with this exit status as soon as it listens. Does not block."""
        for other in self._others():
            self._send(json.dumps(code).encode(), other, END)

    def _others(self) -> list[int]:
        return [rank for rank in range(self._comm.size) if rank != self._comm.rank and rank not in self.lost]

    def ask(self, state: "Callable[[], State]", seconds: float) -> dict[int, State]:
        """Ask every other rank; answer theirs meanwhile. Blocks for at most `seconds`; the silent are left out."""
        others = self._others()
        for other in others:
            self._send(b"", other, ASK)
        answers: dict[int, State] = {}
        give_up = time.monotonic() + seconds
        while len(answers) < len(others) and time.monotonic() < give_up:
            self.answer(state)
            status = MPI.Status()
            if self._has_come(ANSWER, status):
                data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
                self._comm.Recv(data, status.source, ANSWER)
                answers[status.source] = State(**json.loads(data.tobytes()))
            else:
                time.sleep(0.02)
        return answers

    def _has_come(self, tag: int, status: MPI.Status) -> bool:
        try:
            return bool(self._comm.Iprobe(MPI.ANY_SOURCE, tag, status))
        except MPI.Exception as error:
            self.lost |= acknowledged_deaths(self._comm, error)
            return False

    def _send(self, data: bytes, to: int, tag: int) -> None:
        # Small messages are sent eagerly; a request that never completes (its receiver is gone) is freed, not waited
        # for.
        try:
            request: Any = self._comm.Isend(np.frombuffer(data, np.uint8), to, tag)
            request.Free()
        except MPI.Exception as error:
            self.lost |= acknowledged_deaths(self._comm, error)


def library_version() -> str:
    """The MPI library's own first line."""
    return MPI.Get_library_version().splitlines()[0].strip("\0 ")


def can_ask_from_threads() -> bool:
    """Whether MPI gave MPI_THREAD_MULTIPLE, which the watchdogs' questions need."""
    return bool(MPI.Query_thread() >= MPI.THREAD_MULTIPLE)
