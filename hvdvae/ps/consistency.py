"""When a push is applied and when a worker is answered: BSP, BSP with backup workers, SSP, ASP. Pure.

A policy hears of events (a worker joins, pushes, leaves) and says what the server has to do, in order. No MPI, no
threads, no clocks: the same objects run in the server, in property tests and in a simulation.

clock: a worker's count of finished steps.

A worker that has pushed computes nothing until it is answered. Nobody waits for ever: a worker that is not answered
waits for another living one, which is answered or computes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Apply:
    """Make one update of these workers' pushes (of their mean, where they are several), in this order."""

    workers: tuple[int, ...]


@dataclass(frozen=True)
class Drop:
    """This worker's push came too late: count it and forget it."""

    worker: int


@dataclass(frozen=True)
class Answer:
    """Give this worker the present weights: it may compute on."""

    worker: int


Action = Apply | Drop | Answer


class Consistency(ABC):
    """The contract of a policy: each event returns what to do now, in order."""

    def __init__(self, workers: Iterable[int]) -> None:
        """`workers`: those that begin, at clock 0."""
        self.clocks: dict[int, int] = dict.fromkeys(workers, 0)
        """Finished steps of each living worker."""

    def join(self, worker: int, clock: int | None = None) -> list[Action]:
        """A worker begins, by default at the clock of the slowest, so that nobody waits for what it has missed."""
        self.clocks[worker] = min(self.clocks.values(), default=0) if clock is None else clock
        return [Answer(worker)]

    @abstractmethod
    def push(self, worker: int) -> list[Action]:
        """A worker has finished a step. Raises ValueError if nobody knows it."""

    @abstractmethod
    def leave(self, worker: int) -> list[Action]:
        """A worker has ended or died. What it pushed and was not applied yet is dropped."""

    def _finish_step(self, worker: int) -> None:
        if worker not in self.clocks:
            raise ValueError(f"a push of worker {worker}, expected one of {sorted(self.clocks)}")
        self.clocks[worker] += 1


class Asynchronous(Consistency):
    """ASP: a push is applied and answered as it comes (Downpour SGD, Dean et al. 2012)."""

    def push(self, worker: int) -> list[Action]:
        """Applied and answered at once."""
        self._finish_step(worker)
        return [Apply((worker,)), Answer(worker)]

    def leave(self, worker: int) -> list[Action]:
        """Nobody waits for it."""
        self.clocks.pop(worker, None)
        return []


class StaleSynchronous(Consistency):
    """SSP (Ho et al. 2013): applied as it comes; answered once no other is more than `staleness` clocks behind."""

    def __init__(self, workers: Iterable[int], staleness: int) -> None:
        """`staleness` >= 0: clocks that a worker which computes may be ahead of the slowest."""
        super().__init__(workers)
        self.staleness = staleness
        self.waiting: list[int] = []
        """Pushed and not answered yet, in order of arrival."""

    def push(self, worker: int) -> list[Action]:
        """Applied at once; whoever is within the bound now is answered."""
        self._finish_step(worker)
        self.waiting.append(worker)
        return [Apply((worker,)), *self._release()]

    def leave(self, worker: int) -> list[Action]:
        """Those that waited for it are answered."""
        self.clocks.pop(worker, None)
        self.waiting = [other for other in self.waiting if other != worker]
        return list(self._release())

    def _release(self) -> list[Answer]:
        limit = min(self.clocks.values(), default=0) + self.staleness
        free = [worker for worker in self.waiting if self.clocks[worker] <= limit]
        self.waiting = [worker for worker in self.waiting if self.clocks[worker] > limit]
        return [Answer(worker) for worker in free]


class BulkSynchronous(Consistency):
    """BSP: one update a step, of the mean of all workers' pushes, then everybody is answered.

    With `backup` workers (Chen et al. 2016) a step is done when all but so many have pushed. What the slowest push
    afterwards was computed with old weights: it is dropped and they are answered at once.
    """

    def __init__(self, workers: Iterable[int], backup: int = 0) -> None:
        """0 <= `backup` < number of workers. If workers leave, the number that a step needs stays while it can."""
        super().__init__(workers)
        self._needed = len(self.clocks) - backup
        self._step = 0
        self._computes = dict.fromkeys(self.clocks, 0)
        """The step for which each worker was given weights."""
        self._pushed: list[int] = []

    def join(self, worker: int, clock: int | None = None) -> list[Action]:
        """It computes for the present step."""
        self._computes[worker] = self._step
        return super().join(worker, clock)

    def push(self, worker: int) -> list[Action]:
        """Collected; the last that a step needs completes it. One for an earlier step is dropped."""
        self._finish_step(worker)
        if self._computes[worker] != self._step:
            self._computes[worker] = self._step
            return [Drop(worker), Answer(worker)]
        self._pushed.append(worker)
        return self._complete()

    def leave(self, worker: int) -> list[Action]:
        """The step may be complete without it. What it has pushed for this step is dropped."""
        self.clocks.pop(worker, None)
        dropped: list[Action] = [Drop(worker)] if worker in self._pushed else []
        self._pushed = [other for other in self._pushed if other != worker]
        return [*dropped, *self._complete()]

    def _complete(self) -> list[Action]:
        if not self._pushed or len(self._pushed) < min(self._needed, len(self.clocks)):
            return []
        # In the workers' order, not in that of arrival: the sum has the same bits however they came.
        members = tuple(sorted(self._pushed))
        self._step, self._pushed = self._step + 1, []
        self._computes.update(dict.fromkeys(members, self._step))
        return [Apply(members), *(Answer(worker) for worker in members)]


def policy(name: str, workers: Iterable[int], *, staleness: int = 0, backup: int = 0) -> Consistency:
    """The policy of `--consistency`: asp, ssp or bsp."""
    if name == "asp":
        return Asynchronous(workers)
    if name == "ssp":
        return StaleSynchronous(workers, staleness)
    return BulkSynchronous(workers, backup)
