"""Bytes that a strategy's collectives move, counted on the buffers that they are given."""


class Traffic:
    """Of one rank, in both directions; whoever exchanges counts, once a collective."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.sent = self.received = 0

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

    def metrics(self, steps: int) -> dict[str, float]:
        """In all, and for each of so many steps."""
        steps = max(steps, 1)
        return {
            "bytes_sent": self.sent,
            "bytes_received": self.received,
            "bytes_sent_per_step": self.sent / steps,
            "bytes_received_per_step": self.received / steps,
        }
