"""What repeated measurements say: medians with their spread, and ratios of two sides of the same round.

A list holds one number a round; None stands for a round in which a side was not measured. A ratio compares
what was measured within seconds of each other, so a machine that is slower in one round than in the next does
not blur it.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Rounds = Sequence[float | None]


class Spread(NamedTuple):
    """The middle of some rounds, and how far they lie apart."""

    median: float
    low: float
    high: float


def spread(rounds: Rounds) -> Spread | None:
    """Median, least and greatest of the rounds that were measured; None where there is none."""
    values = [value for value in rounds if value is not None]
    return Spread(statistics.median(values), min(values), max(values)) if values else None


def paired_ratios(above: Rounds, below: Rounds, scale: float = 1.0) -> list[float | None]:
    """scale * above / below, round by round; None where one of the two is missing.

    Raises ValueError on unequal lengths.
    """
    return [None if a is None or b is None else scale * a / b for a, b in zip(above, below, strict=True)]


def rotated(items: Sequence[T], by: int) -> list[T]:
    """The same items, beginning with number `by` (modulo their count), so that each is first in turn."""
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]
