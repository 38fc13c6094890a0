"""Headers and vectors between workers and servers: MPI messages, and shared memory where both are on one host.

Shapes: P parameters, F elements of float buffers (the last shard's push carries them behind its slice).
A worker has two vectors: `outgoing` (P + F), what it pushes, and `incoming` (P), what it pulls.
"""

import json
import secrets
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import Tensor

from hvdvae.ps import memory
from hvdvae.ps.doorbell import Doorbell
from hvdvae.ps.protocol import HEADER, VECTOR, Header
from hvdvae.world.mpi import MAX_COUNT, acknowledged_deaths
from hvdvae.world.shared_memory import fits


class PeersDied(Exception):
    """Some ranks have died, and MPI lets the others go on (ULFM)."""

    def __init__(self, ranks: set[int]) -> None:
        """`ranks`: those that were not known to be dead."""
        super().__init__(f"ranks {sorted(ranks)} have died")
        self.ranks = ranks


class Channel:
    """One process's end. Ranks are those of `comm`: workers first, then servers."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        workers: int,
        lengths: tuple[int, int],
        dtype: torch.dtype,
        peers: Iterable[int],
    ) -> None:
        """Duplicate `comm` and map shared memory. `lengths`: P and F; `peers`: ranks that this one will hear of.

        Blocks; every rank of `comm` must call it.
        """
        self.comm: Any = comm.Dup()
        self.rank: int = self.comm.rank
        self.workers = workers
        self.dtype = dtype
        self.vectors: dict[int, tuple[Tensor, Tensor]] = {}
        """Outgoing and incoming vector of the workers that share memory with this rank, and of this rank."""
        random = np.frombuffer(secrets.token_bytes(8), np.uint8).copy()
        self.comm.Bcast(random)
        token = random.tobytes().hex()
        host: Any = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.neighbours: list[int] = host.allgather(self.rank)
        mine = (2 * lengths[0] + lengths[1]) * dtype.itemsize if self.rank < workers else 0
        self._shares = host.size > 1 and fits(host, host.allreduce(mine, MPI.MAX))
        self._bell = Doorbell(token, self.rank)
        if mine:
            created = memory.create(f"hvdvae-{token}-{self.rank}", mine) if self._shares else bytearray(mine)
            self.vectors[self.rank] = _halves(created, lengths, dtype)
        self.comm.Barrier()
        self._bell.connect(self.neighbours, all_peers_ring=set(peers) <= set(self.neighbours))
        for other in self.neighbours:
            if self._shares and other < workers and other != self.rank:
                self.vectors[other] = _halves(memory.attach(f"hvdvae-{token}-{other}"), lengths, dtype)
        self.comm.Barrier()
        self._bell.unlink()
        memory.forget(f"hvdvae-{token}-{self.rank}")
        self._sends: list[tuple[int, MPI.Request, Any]] = []
        self.dead: set[int] = set()

    def shares_memory(self, other: int) -> bool:
        """Whether vectors between this rank and `other` need no message."""
        return self._shares and other in self.neighbours

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
        while any(receiver == to for receiver, _, _ in self._unfinished_sends()):
            self._bell.sleep()

    def receive_vector(self, source: int, into: Tensor, tag: int = VECTOR) -> None:
        """Receive a vector. Blocks."""
        array = into.numpy()
        for start in range(0, array.size, MAX_COUNT):
            try:
                request = self.comm.Irecv(array[start : start + MAX_COUNT], source, tag)
                while not request.Test():
                    self._bell.sleep()
            except MPI.Exception as error:
                raise self._death(error) from None
        self._bell.ring(source)  # It may wait in `flush`.

    def receive_text(self, source: int, tag: int) -> Any:
        """Receive a JSON record. Blocks."""
        status = self._wait(source, tag)
        data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
        self.comm.Recv(data, source, tag)
        return json.loads(data.tobytes())

    def receive(self, source: int = MPI.ANY_SOURCE, tag: int = HEADER) -> tuple[int, Header]:
        """The next header, and who sent it. Blocks; sleeps meanwhile."""
        status = self._wait(source, tag)
        header = np.empty(status.Get_count(MPI.DOUBLE))
        self.comm.Recv(header, status.source, tag)
        return status.source, header

    def next_tag(self, source: int) -> int:
        """The tag of the next message of a rank. Blocks."""
        return self._wait(source, MPI.ANY_TAG).tag

    def close(self) -> None:
        """Take the bell down. The memory is given back when MPI ends."""
        self._bell.close()

    def _wait(self, source: int, tag: int) -> MPI.Status:
        status = MPI.Status()
        try:
            # Twice: MPI looks first, and only then at what has come in meanwhile.
            while not (self.comm.Iprobe(source, tag, status) or self.comm.Iprobe(source, tag, status)):
                self._bell.sleep()
        except MPI.Exception as error:
            raise self._death(error) from None
        return status

    def _death(self, error: MPI.Exception) -> PeersDied:
        new = acknowledged_deaths(self.comm, error) - self.dead
        self.dead |= new
        return PeersDied(new)

    def _unfinished_sends(self) -> list[tuple[int, MPI.Request, Any]]:
        left = []
        for to, request, kept in self._sends:
            try:
                if not request.Test():
                    left.append((to, request, kept))
            except MPI.Exception as error:
                self.dead |= acknowledged_deaths(self.comm, error)
        self._sends = left
        return left

    def _post(self, array: NDArray[Any], to: int, tag: int) -> None:
        self._unfinished_sends()
        try:
            self._sends.append((to, self.comm.Isend(array, to, tag), array))
            self._bell.ring(to)
        except MPI.Exception as error:
            self.dead |= acknowledged_deaths(self.comm, error)


def _halves(buffer: Any, lengths: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    parameters, buffers = lengths
    whole = torch.frombuffer(buffer, dtype=dtype, count=2 * parameters + buffers)
    return whole[: parameters + buffers], whole[parameters + buffers :]


def shard_vectors(channel: Channel, worker: int, shard: slice, *, is_last: bool) -> tuple[Tensor, Tensor] | None:
    """A worker's vectors as a server sees them: its slice of outgoing (the last's with buffers) and of incoming.

    None where they do not share memory.
    """
    if not channel.shares_memory(worker):
        return None
    outgoing, incoming = channel.vectors[worker]
    return outgoing[shard.start :] if is_last else outgoing[shard], incoming[shard]
