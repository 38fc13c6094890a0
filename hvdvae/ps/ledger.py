"""What a server counts: every push once, how stale it was, and what its worker said of its steps. Pure."""

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdvae.ps.protocol import BINS, REPORTED, TOTALS, Answer, Request


class Ledger:
    """Counts of one server since its start."""

    def __init__(self, workers: int) -> None:
        """All zero."""
        self.totals: NDArray[np.float64] = np.zeros(len(Answer))
        """In the fields of an answer, from UPDATES on."""
        self.histogram = np.zeros(BINS)
        self.staleness: Counter[int] = Counter()
        """Updates between pull and push -> pushes that were applied so."""
        self.applied: Counter[int] = Counter()
        self.dropped: Counter[int] = Counter()
        """Pushes, by worker."""
        self.skipped: Counter[int] = Counter()
        """Of whose steps nothing was pushed, as they were not finite."""
        self.duplicates = 0
        self.step_seconds = np.zeros(workers)
        """Of each worker's last steps."""

    def reported(self, worker: int, request: NDArray[np.float64]) -> None:
        """A worker said what it did since its last push."""
        self.totals[TOTALS] += request[REPORTED]
        if request[Request.STEPS]:
            self.step_seconds[worker] = request[Request.SECONDS] / request[Request.STEPS]
        self.totals[Answer.SIGNAL] = max(self.totals[Answer.SIGNAL], request[Request.SIGNAL])

    def updated(self, stalenesses: dict[int, int]) -> None:
        """One update was made of these workers' pushes, which were so stale."""
        self.totals[Answer.UPDATES] += 1
        for worker, staleness in stalenesses.items():
            self.applied[worker] += 1
            self.staleness[staleness] += 1
            self.histogram[min(staleness, BINS - 1)] += 1
            self.totals[Answer.PUSHES] += 1
            self.totals[Answer.STALENESS_SUM] += staleness
            self.totals[Answer.STALENESS_MAX] = max(self.totals[Answer.STALENESS_MAX], staleness)

    def dropped_push(self, worker: int) -> None:
        """A push was not applied."""
        self.dropped[worker] += 1
        self.totals[Answer.DROPPED] += 1

    def summary(self) -> dict[str, Any]:
        """JSON-able: what a run reports at its end."""
        return {
            "updates": int(self.totals[Answer.UPDATES]),
            "pushes": int(self.totals[Answer.PUSHES]),
            "dropped_pushes": int(self.totals[Answer.DROPPED]),
            "duplicate_pushes": self.duplicates,
            "bytes_pushed": int(self.totals[Answer.BYTES_PUSHED]),
            "bytes_pulled": int(self.totals[Answer.BYTES_PULLED]),
            "queue_seconds_mean": self.totals[Answer.QUEUE_SECONDS] / max(answered(self.totals), 1),
            "staleness_mean": self.totals[Answer.STALENESS_SUM] / max(self.totals[Answer.PUSHES], 1),
            "staleness_quantiles": quantiles(self.staleness),
            "staleness_histogram": {str(value): self.staleness[value] for value in sorted(self.staleness)},
            "applied_by_worker": [self.applied[worker] for worker in range(len(self.step_seconds))],
            "dropped_by_worker": [self.dropped[worker] for worker in range(len(self.step_seconds))],
            "skipped_by_worker": [self.skipped[worker] for worker in range(len(self.step_seconds))],
        }


def answered(totals: NDArray[np.float64]) -> float:
    """Pushes that waited for an answer, applied or not; `totals`: by the fields of an answer. Pure."""
    return float(totals[Answer.PUSHES] + totals[Answer.DROPPED])


def quantiles(counts: Counter[int]) -> dict[str, int]:
    """Smallest value that so large a share of the counts does not exceed, at 0.5, 0.9, 0.99 and 1."""
    found = {}
    for share in (0.5, 0.9, 0.99, 1.0):
        left = share * counts.total()
        value = 0
        for value in sorted(counts):
            left -= counts[value]
            if left <= 1e-9:
                break
        found[f"{share:g}"] = value
    return found
