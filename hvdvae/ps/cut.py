"""A consistent copy of all servers: which pushes belong to it, and which wait until it is made. Pure.

The worker that wants one tells all servers to hold back pushes, learns how far each has come, and names the largest
clocks of all: what lies before them is applied on every server, then all copy. Nobody but those whose push is held back
waits.
"""

from collections.abc import Mapping
from typing import NamedTuple

from hvdvae.ps.protocol import Header


class Asked(NamedTuple):
    """Who wants a copy, by which request, and after which clock of each worker."""

    worker: int
    request: Header
    clocks: list[int]


class Cut:
    """One server's part in it."""

    def __init__(self) -> None:
        """Nobody wants one."""
        self.frozen = False
        """Whether pushes are held back."""
        self.asked: Asked | None = None
        self._held: dict[int, Header] = {}
        """In the order in which they came."""

    def hold(self, worker: int, request: Header) -> None:
        """Hold back a push; one that is sent again takes the place of the first."""
        self._held[worker] = request

    def forget(self, worker: int) -> None:
        """This worker has died: its push does not come any more."""
        self._held.pop(worker, None)

    def forget_pushes(self) -> None:
        """Those that were held back come again."""
        self._held.clear()

    def due(self, clocks: Mapping[int, int]) -> list[tuple[int, Header]]:
        """Pushes that belong to the copy, in the order in which they came; they are held back no longer."""
        if self.asked is None:
            return []
        target = self.asked.clocks
        found = [(worker, push) for worker, push in self._held.items() if clocks.get(worker, 0) < target[worker]]
        for worker, _ in found:
            del self._held[worker]
        return found

    def is_complete(self, clocks: Mapping[int, int]) -> bool:
        """Whether all that belongs to the copy is applied."""
        return self.asked is not None and all(clocks[worker] >= self.asked.clocks[worker] for worker in clocks)

    def end(self) -> list[tuple[int, Header]]:
        """The copy is made: hold back nothing. Returns the pushes that were."""
        held, self._held = list(self._held.items()), {}
        self.frozen, self.asked = False, None
        return held
