"""Headers and vectors between workers and servers: MPI messages, and shared memory where both are on one host."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import Tensor

from hvdvae.ps.doorbell import Doorbell
from hvdvae.ps.protocol import HEADER, VECTOR, Header
from hvdvae.ps.seating import Seat
from hvdvae.world.mpi import MAX_COUNT, acknowledged_deaths


class PeersDied(Exception):
    """Some ranks have died, and MPI lets the others go on (ULFM)."""

    def __init__(self, ranks: set[int]) -> None:
        """`ranks`: those that were not known to be dead."""
        super().__init__(f"ranks {sorted(ranks)} have died")


class Channel:
    """One process's end. Ranks are those of `comm`: workers first, then servers."""

    def __init__(
        self,
        comm: Any,
        rank: int,
        *,
        workers: int,
        dtype: torch.dtype,
        bell: Doorbell,
        vectors: dict[int, tuple[Tensor, Tensor]],
        sharing: Iterable[int] = (),
        seat: Seat | None = None,
    ) -> None:
        """Take the parts; ps/opening.py makes them.

        `vectors`: of this rank, and of the workers that share memory with it; `sharing`: ranks that do. `seat`: left
        at the end.
        """
        self.comm, self.rank, self.workers, self.dtype = comm, rank, workers, dtype
        self.vectors = vectors
        """Outgoing and incoming."""
        self._bell, self._sharing = bell, set(sharing)
        self.seat = seat or Seat()
        self._sends: list[tuple[int, Any, MPI.Request, Any]] = []
        self._routes: dict[int, tuple[Any, int]] = {}
        """Ranks that `comm` does not reach: a communicator that does, and the rank there."""
        self._failed: set[int] = set()
        """Ranks of `comm`."""
        self.dead: set[int] = set()
        """Those that nobody has taken the place of."""

    def shares_memory(self, other: int) -> bool:
        """Whether vectors between this rank and `other` need no message."""
        return other in self._sharing

    def admit(self, number: int, comm: Any, rank: int) -> None:
        """Reach a rank by another communicator: one that has joined since, and nobody rings for."""
        self._bell.expect_strangers()
        self._sharing.discard(number)
        self._routes[number] = (comm, rank)
        self.dead.discard(number)

    def send(self, to: int, header: Header, tag: int = HEADER) -> None:
        """Send a small array. Does not wait for the receiver; the array may be changed after."""
        self._post(header.copy(), to, tag)

    def send_text(self, to: int, record: Any, tag: int) -> None:
        """Send a JSON-able record."""
        self._post(np.frombuffer(json.dumps(record).encode(), np.uint8), to, tag)

    def send_vector(self, to: int, vector: Tensor, tag: int = VECTOR) -> None:
        """Send a vector, which must not change until `flush` has returned."""
        array = vector.numpy()
        for start in range(0, array.size, MAX_COUNT):
            self._post(array[start : start + MAX_COUNT], to, tag)

    def flush(self, to: int) -> None:
        """Return when all that was sent to this rank may be changed. Blocks; on nobody else, who may have stopped."""
        while any(receiver == to for receiver, *_ in self._unfinished_sends()):
            self._bell.sleep()

    def receive_vector(self, source: int, into: Tensor, tag: int = VECTOR) -> None:
        """Receive a vector. Blocks."""
        array = into.numpy()
        comm, rank = self._route(source)
        for start in range(0, array.size, MAX_COUNT):
            try:
                request = comm.Irecv(array[start : start + MAX_COUNT], rank, tag)
                while not request.Test():
                    self._bell.sleep()
            except MPI.Exception as error:
                raise self._death(comm, error) from None
        self._bell.ring(source)  # It may wait in `flush`.

    def receive_text(self, source: int, tag: int) -> Any:
        """Receive a JSON record. Blocks."""
        return json.loads(self._receive(source, tag, np.uint8)[1].tobytes())

    def receive(self, source: int = MPI.ANY_SOURCE, tag: int = HEADER) -> tuple[int, Header]:
        """The next header, and who sent it. Blocks; sleeps meanwhile."""
        return self._receive(source, tag, np.float64)

    def next_tag(self, source: int) -> int:
        """The tag of the next message of a rank. Blocks."""
        comm, rank = self._route(source)
        status = MPI.Status()
        while True:
            try:
                if comm.Iprobe(rank, MPI.ANY_TAG, status) or comm.Iprobe(rank, MPI.ANY_TAG, status):
                    return status.tag
            except MPI.Exception as error:
                raise self._death(comm, error) from None
            self._bell.sleep()

    def close(self) -> None:
        """Take the bell down once all that was sent has left. Blocks. The memory is given back when MPI ends."""
        while self._unfinished_sends():
            self._bell.sleep()
        self._bell.close()
        self.seat.leave()

    def _route(self, other: int) -> tuple[Any, int]:
        """The communicator that reaches a rank, and its rank there."""
        return self._routes.get(other, (self.comm, other))

    def _reached_by(self, comm: Any) -> set[int]:
        """Ranks that only this communicator reaches."""
        # A list first: `admit` may be called meanwhile.
        return {number for number, (other, _) in list(self._routes.items()) if other is comm}

    def _receive(self, source: int, tag: int, dtype: type[np.generic]) -> tuple[int, NDArray[Any]]:
        """The next message of a rank (or of any), and who sent it. Blocks."""
        comm, message, status = self._await(source, tag)
        array = np.empty(status.Get_count(MPI.BYTE) // np.dtype(dtype).itemsize, dtype)
        try:
            message.Recv(array)
        except MPI.Exception as error:
            raise self._death(comm, error) from None
        return next(iter(self._reached_by(comm)), status.source), array

    def _await(self, source: int, tag: int) -> tuple[Any, MPI.Message, MPI.Status]:
        """A message, taken off the queue: of a rank that has died since, MPI would refuse to receive it by its name."""
        status = MPI.Status()
        while True:
            routes = [self._route(source)]
            if source == MPI.ANY_SOURCE:
                routes += list(self._routes.values())
            for comm, rank in routes:
                try:
                    # Twice: MPI looks first, and only then at what has come in meanwhile.
                    message = comm.Improbe(rank, tag, status) or comm.Improbe(rank, tag, status)
                except MPI.Exception as error:
                    raise self._death(comm, error) from None
                if message is not None:
                    return comm, message, status
            self._bell.sleep()

    def _death(self, comm: Any, error: MPI.Exception) -> PeersDied:
        new = self._note_deaths(comm, error)
        return PeersDied(new)

    def _note_deaths(self, comm: Any, error: MPI.Exception) -> set[int]:
        failed = acknowledged_deaths(comm, error)
        new = self._reached_by(comm)
        for number in new:
            del self._routes[number]
        if not new:
            new = failed - self._failed
            self._failed |= new
        self.dead |= new
        return new

    def _unfinished_sends(self) -> list[tuple[int, Any, MPI.Request, Any]]:
        left = []
        for to, comm, request, kept in self._sends:
            try:
                if not request.Test():
                    left.append((to, comm, request, kept))
            except MPI.Exception as error:
                self._note_deaths(comm, error)
        self._sends = left
        return left

    def _post(self, array: NDArray[Any], to: int, tag: int) -> None:
        self._unfinished_sends()
        comm, rank = self._route(to)
        try:
            self._sends.append((to, comm, comm.Isend(array, rank, tag), array))
            self._bell.ring(to)
        except MPI.Exception as error:
            self._note_deaths(comm, error)
