"""The processes that measure a side: one, or ranks under mpirun; and the orders that they sleep for.

Protocol with throughput.py, on rank 0's standard input and output:

    direction    line
    in           an order as JSON; the end of the input ends the crew
    out          ANSWER, then JSON; other lines are meant for people

Rank 0 hands each order on to the others, who look for it now and then: waiting in MPI would keep a core busy.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

ANSWER = "benchmark answers "
ORDER_TAG = 1
PERIOD_SECONDS = 0.02


class Crew:
    """One process, or all ranks of `comm` (an mpi4py communicator, which it duplicates)."""

    def __init__(self, comm: Any = None) -> None:
        """Blocks; every rank must call it."""
        self._comm: Any = comm.Dup() if comm is not None else None
        self.rank = int(comm.rank) if comm is not None else 0
        self.size = int(comm.size) if comm is not None else 1

    def orders(self) -> Iterator[dict[str, Any]]:
        """Orders as they come, the same on every rank, until the input ends. Sleeps between them."""
        while True:
            order = self._from_input() if self.rank == 0 else self._from_first()
            if order is None:
                return
            yield order

    def answer(self, content: dict[str, Any]) -> None:
        """Rank 0 writes the line; the others do nothing."""
        if self.rank == 0:
            print(ANSWER + json.dumps(content), flush=True)

    def barrier(self) -> None:
        """Return once every rank has called."""
        if self._comm is not None:
            self._comm.Barrier()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on all ranks. Blocks; every rank must call it."""
        return list(self._comm.allgather(value)) if self._comm is not None else [value]

    def _from_input(self) -> dict[str, Any] | None:
        line = sys.stdin.readline()
        order = json.loads(line) if line.strip() else None
        for other in range(1, self.size):
            self._comm.send(order, other, ORDER_TAG)
        return order

    def _from_first(self) -> dict[str, Any] | None:
        while not self._comm.Iprobe(0, ORDER_TAG):
            time.sleep(PERIOD_SECONDS)
        order: dict[str, Any] | None = self._comm.recv(source=0, tag=ORDER_TAG)
        return order
