"""What a strategy's collectives move: bytes, counted on the buffers that they are given, and what messages left out."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass
class Traffic:
    """Of one rank, in both directions; whoever exchanges counts, once a collective. A resumed run counts on."""

    sent: int = 0
    received: int = 0
    steps: int = 0
    averages: int = 0
    """Of weights, where ranks do not exchange at every step."""
    errors: float = 0.0
    """Sum over messages of the size of what each left out, as a part of the whole's."""

    def ring(self, nbytes: int, size: int) -> None:
        """An allreduce of so many bytes over `size` ranks: in and out of each rank, 2 (size - 1) / size times as many.

        No allreduce moves less (Patarasuk and Yuan 2009); in shared memory as much is read from and for the others.
        """
        moved = round(2 * nbytes * (size - 1) / size)
        self.sent += moved
        self.received += moved

    def gathered(self, nbytes: int, size: int) -> None:
        """A message of so many bytes to each of the others, and one from each."""
        self.sent += nbytes * (size - 1)
        self.received += nbytes * (size - 1)

    def told(self, nbytes: int, size: int, *, is_root: bool) -> None:
        """So many bytes from one rank to all others."""
        self.sent += nbytes * (size - 1) * is_root
        self.received += nbytes * (not is_root)

    def metrics(self) -> dict[str, float]:
        """In all, and a step."""
        steps = max(self.steps, 1)
        return {
            "bytes_sent": self.sent,
            "bytes_received": self.received,
            "bytes_sent_per_step": self.sent / steps,
            "bytes_received_per_step": self.received / steps,
        }

    def counts(self) -> dict[str, float]:
        """All of it, JSON-able."""
        return asdict(self)

    def count_on(self, counts: Mapping[str, float]) -> None:
        """From what `counts` told."""
        for name in self.counts().keys() & counts.keys():
            setattr(self, name, counts[name])
