"""What a server counts."""

from collections import Counter

import pytest

from hvdvae.ps.ledger import Ledger, quantiles
from hvdvae.ps.protocol import Answer


def test_a_push_that_is_dropped_waits_as_one_that_is_applied() -> None:
    ledger = Ledger(workers=3)
    ledger.updated({0: 0, 2: 4})
    ledger.dropped_push(1)
    ledger.totals[Answer.QUEUE_SECONDS] = 0.3
    found = ledger.summary()
    assert found["queue_seconds_mean"] == pytest.approx(0.1)
    assert (found["updates"], found["pushes"], found["dropped_pushes"]) == (1, 2, 1)
    assert (found["applied_by_worker"], found["dropped_by_worker"]) == ([1, 0, 1], [0, 1, 0])
    assert (found["staleness_mean"], found["staleness_histogram"]) == (2, {"0": 1, "4": 1})


def test_quantiles_are_the_least_values_that_cover_the_share() -> None:
    assert quantiles(Counter({0: 50, 1: 40, 7: 9, 30: 1})) == {"0.5": 0, "0.9": 1, "0.99": 7, "1": 30}
    assert quantiles(Counter()) == {"0.5": 0, "0.9": 0, "0.99": 0, "1": 0}
