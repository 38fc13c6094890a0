"""Buckets of gradients, and the order in which a rank sends them. Pure: who carries a message is not their affair.

    parameter vector   [ a | b | c | d | e ]       backward begins at e
    buckets            [   2   | 1 |   0   ]

Every rank sends bucket 0, 1, 2, 0, 1, ... in this order, whatever the order in which autograd finishes them. During
backward the next one is due once each of its members has arrived since it was sent last. A gradient that arrives for a
bucket that has been sent (a second backward, a layer used in two reentrant checkpoints) waits for the bucket's next
round. At the step the ranks agree on how often each bucket is sent: the largest of all ranks' `wanted`; `missing` is
what this rank still has to send of that. So no gradient is lost, and no rank sends what another does not, whatever
layers, passes and orders each of them has.
"""

from collections.abc import Iterator, Sequence


class Bucket:
    """Neighbours in the parameter vector whose gradients are sent together."""

    def __init__(self, stop: int) -> None:
        """Make one without members that ends at `stop`."""
        self.place = slice(stop, stop)
        """In the parameter vector, in elements."""
        self.members: dict[int, slice] = {}
        """Where each parameter stands in the bucket, by its number."""
        self.arrived: set[int] = set()
        """Members with a gradient since it was sent last."""
        self.sent = 0
        """Rounds since the last step."""

    @property
    def is_full(self) -> bool:
        """Whether each member has arrived."""
        return len(self.arrived) == len(self.members)


class Buckets:
    """All of a model. Iterates over them in the order in which they are sent."""

    def __init__(self, places: Sequence[slice], limit: int) -> None:
        """Divide a vector in which parameter n stands at `places[n]`. `limit`: elements of a bucket of several."""
        self._all: list[Bucket] = []
        self._of: dict[int, Bucket] = {}
        self._turn = 0
        """Buckets sent since the last step, of all rounds."""
        self.holds = False
        """Whether nothing is due before the step."""
        room = 0
        # From the end of the vector, since backward begins at the last layers.
        for number, place in reversed(list(enumerate(places))):
            size = place.stop - place.start
            if not self._all or size > room:
                self._all.append(Bucket(place.stop))
                room = limit
            room -= size
            bucket = self._all[-1]
            bucket.place = slice(place.start, bucket.place.stop)
            bucket.members[number] = place
            self._of[number] = bucket
        for bucket in self._all:
            start = bucket.place.start
            bucket.members = {n: slice(p.start - start, p.stop - start) for n, p in bucket.members.items()}

    def __iter__(self) -> Iterator[Bucket]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def of(self, number: int) -> Bucket:
        """The one with parameter `number`."""
        return self._of[number]

    def due(self) -> Iterator[Bucket]:
        """Those whose turn has come and that are full; count each as sent."""
        while not self.holds and (bucket := self._all[self._turn % len(self._all)]).is_full:
            yield self._send(bucket)

    def wanted(self) -> list[int]:
        """How often this rank has to send each bucket in this step: what it has sent, and once more what is left."""
        return [bucket.sent + bool(bucket.arrived) for bucket in self._all]

    def missing(self, agreed: Sequence[int], *, is_empty: bool = False) -> Iterator[Bucket]:
        """What this rank still has to send where all send bucket n `agreed[n]` times; count each as sent.

        In the order of rounds, so that all ranks send the same sequence. `is_empty`: without what has arrived.
        """
        for round_ in range(max(agreed)):
            for bucket, count in zip(self._all, agreed, strict=True):
                if bucket.sent <= round_ < count:
                    yield self._send(bucket, is_empty=is_empty)

    def drop(self) -> None:
        """Forget what has arrived and not been sent."""
        for bucket in self._all:
            bucket.arrived.clear()

    def begin_round(self) -> None:
        """Count what is sent anew; what has arrived stays."""
        self._turn, self.holds = 0, False
        for bucket in self._all:
            bucket.sent = 0

    def _send(self, bucket: Bucket, *, is_empty: bool = False) -> Bucket:
        if not is_empty:
            bucket.arrived.clear()
        bucket.sent += 1
        self._turn += 1
        return bucket
