"""Which workers take part: who has died, who has come in a dead one's place, and who has ended its run. Pure."""

from hvdvae.ps.protocol import Header


class Attendance:
    """As one server knows it. Workers are numbers from 0."""

    def __init__(self, workers: int) -> None:
        """All take part."""
        self._workers = workers
        self.missing: set[int] = set()
        """Those that have died and whose place nobody has taken."""
        self.died: list[int] = []
        self.joined: list[int] = []
        """In the order in which it happened."""
        self.done: dict[int, Header] = {}
        """Those that push no more, and the request by which they said so."""
        self.unanswered: set[int] = set()
        """Those of them that have not been told that all have ended."""
        self.ended_at: dict[int, int] = {}
        """Clock of a worker when it ended or died."""

    def die(self, worker: int, clock: int) -> None:
        """A worker has died at this clock."""
        self.missing.add(worker)
        self.died.append(worker)
        self.done.pop(worker, None)
        self.unanswered.discard(worker)
        self.ended_at[worker] = clock

    def join(self, worker: int) -> None:
        """Somebody takes its place."""
        self.missing.discard(worker)
        self.joined.append(worker)

    def end(self, worker: int, request: Header, clock: int) -> None:
        """A worker pushes no more, for now; or says so again."""
        self.done[worker] = request
        self.unanswered.add(worker)
        self.ended_at[worker] = clock

    @property
    def all_have_ended(self) -> bool:
        """Whether no worker pushes any more."""
        return bool(self.done) and len(self.done) == self._workers - len(self.missing)

    def begin_again(self) -> dict[int, int]:
        """All had ended, and one pushes: another run of the same job, by all of them, from these clocks."""
        clocks = {worker: self.ended_at[worker] for worker in sorted(self.done)}
        self.done.clear()
        return clocks
