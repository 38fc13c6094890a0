"""What the cells of a study say, and no more: medians over seeds, and differences where spreads do not overlap. Pure.

A condition is a scenario at a world size. One process alone belongs to every size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.statistics_of_rounds import Rounds, Spread, paired_ratios, spread
from benchmarks.study.numbers import crossing, height, height_at
from benchmarks.study.study_file import Study

Cells = Sequence[Mapping[str, Any]]
LEAST_SEEDS = 3


@dataclass(frozen=True)
class Row:
    """One contender under one condition."""

    contender: str
    cells: Cells
    """In the order of seeds; those that failed too."""
    alone: bool
    """Whether it is one process, whatever the world size."""
    steps_together: bool
    seconds: Rounds
    """To the target; None for a seed that failed or did not get there."""
    examples: Rounds

    @property
    def failed(self) -> int:
        """Cells."""
        return sum(cell["failed"] is not None for cell in self.cells)

    @property
    def rates(self) -> list[float]:
        """Examples/s of all ranks, of the cells that did not fail."""
        return [cell["examples_per_second"] for cell in self.cells if cell["failed"] is None]

    @property
    def arrived(self) -> bool:
        """Whether every seed that was to run got to the target."""
        return all(value is not None for value in self.seconds)


@dataclass(frozen=True)
class Condition:
    """One scenario at one world size."""

    scenario: str
    size: int
    bound: str
    target: float | None
    """Least height of the bound (numbers.height), nats; None where what sets it did not get so far."""
    rows: list[Row]
    """In the study's order."""


def conditions(study: Study, cells: Cells) -> list[Condition]:
    """All conditions of which there are cells."""
    found = []
    for scenario in study.scenarios:
        for size in study.world_sizes:
            mine = [cell for cell in cells if cell["scenario"] == scenario and cell["size"] in (size, 1)]
            if any(cell["size"] == size for cell in mine):
                target = target_of(study, cells, scenario, size)
                found.append(Condition(scenario, size, study.target.bound, target, _rows(study, mine, target, size)))
    return found


def _rows(study: Study, mine: Cells, target: float | None, size: int) -> list[Row]:
    rows = []
    for name, contender in study.contenders.items():
        own_size = 1 if contender.alone else size
        cells = sorted(
            (cell for cell in mine if (cell["contender"], cell["size"]) == (name, own_size)),
            key=lambda cell: int(cell["seed"]),
        )
        if cells:
            together = contender.peer is not None or contender.config.strategy != "ps"
            seconds, examples = (_times(cells, target, key, study.target.bound) for key in ("seconds", "examples"))
            rows.append(Row(name, cells, contender.alone, together, seconds, examples))
    return rows


def _times(cells: Cells, target: float | None, key: str, bound: str) -> Rounds:
    return [
        None if cell["failed"] is not None or target is None else crossing(cell["points"], target, key, bound)
        for cell in cells
    ]


def target_of(study: Study, cells: Cells, scenario: str, size: int) -> float | None:
    """What everybody is to reach: as the study says, or the median over seeds of what its contender reached.

    Of this scenario; where that contender did not get so far in it, of the first scenario in which it did.
    """
    target = study.target
    if target.nats is not None:
        return height({target.bound: target.nats}, target.bound)
    assert target.epochs is not None
    assert target.contender is not None
    own_size = 1 if study.contenders[target.contender].alone else size
    for name in (scenario, *study.scenarios):
        reached = [
            height_at(cell["points"], target.epochs * cell["epoch_examples"], target.bound)
            for cell in cells
            if (cell["scenario"], cell["contender"], cell["size"]) == (name, target.contender, own_size)
            and cell["failed"] is None
        ]
        found = spread(reached)
        if found is not None:
            return found.median
    return None


def apart(one: Rounds, other: Rounds) -> bool:
    """Whether two sets of measurements can be told apart: at least three of each, and their ranges do not overlap."""
    a, b = spread(one), spread(other)
    if a is None or b is None or min(_count(one), _count(other)) < LEAST_SEEDS:
        return False
    return a.high < b.low or b.high < a.low


def _count(rounds: Rounds) -> int:
    return sum(value is not None for value in rounds)


def sooner(one: Row, other: Row) -> Spread | None:
    """How many times sooner `one` is at the target than `other`, seed by seed."""
    shared = min(len(one.seconds), len(other.seconds))
    return spread(paired_ratios(other.seconds[:shared], one.seconds[:shared]))


def ranking(condition: Condition) -> list[Row]:
    """Those whose every seed reached the target, the first one first."""
    arrived = [row for row in condition.rows if row.arrived]
    return sorted(arrived, key=lambda row: _median(row.seconds))


def _median(rounds: Rounds) -> float:
    found = spread(rounds)
    return found.median if found is not None else float("inf")


def sentence(condition: Condition) -> str:
    """Who wins, by how much, and whom it cannot be told from; in plain words."""
    if condition.target is None:
        return "What sets the target did not get so far: nothing can be said."
    order = ranking(condition)
    late = [row.contender for row in condition.rows if not row.arrived and row.failed < len(row.cells)]
    skipped = [row.contender for row in condition.rows if any(_is_skipped(cell) for cell in row.cells)]
    dead = [row.contender for row in condition.rows if row.failed and row.contender not in skipped]
    rest = f" Not in every seed: {', '.join(late)}." if late else ""
    rest += f" Failed: {', '.join(dead)}." if dead else ""
    rest += f" Skipped: {', '.join(skipped)}." if skipped else ""
    if not order:
        return f"Nobody reached {goal(condition)}.{rest}"
    best = order[0]
    least = min(_count(row.seconds) for row in order)
    if least < LEAST_SEEDS:
        return (
            f"{best.contender} came first to {goal(condition)}, but with {least} "
            f"{'seed' if least == 1 else 'seeds'} nothing is claimed; at least {LEAST_SEEDS} are needed.{rest}"
        )
    same = [row for row in order[1:] if not apart(best.seconds, row.seconds)]
    others = [row for row in order[1:] if row not in same]
    if same:
        names = ", ".join(row.contender for row in [best, *same])
        text = f"No difference seen between {names}: they reach {goal(condition)} first"
    else:
        text = f"{best.contender} reaches {goal(condition)} first"
    found = spread(best.seconds)
    assert found is not None
    text += f", after {shown(found, digits_of(found.median))} s"
    against = _against(best, others)
    return f"{text}{'; ' + against if against else ''}.{rest}"


def goal(condition: Condition) -> str:
    """The target in words."""
    assert condition.target is not None
    return f"an NLL of {-condition.target:.2f} nats" if condition.bound == "nll" else f"{condition.target:.2f} nats"


def _against(best: Row, others: Sequence[Row]) -> str:
    """The next one, and the next that steps together if the winner does not."""
    named = others[:1]
    if not best.steps_together and named and not named[0].steps_together:
        named = [*named, *[row for row in others if row.steps_together][:1]]
    return ", ".join(f"{shown(sooner(best, row), 2)} times sooner than {row.contender}" for row in named)


def shown(found: Spread | None, digits: int) -> str:
    """Median [least, greatest]."""
    if found is None:
        return "-"
    return f"{found.median:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _is_skipped(cell: Mapping[str, Any]) -> bool:
    return str(cell["failed"]).startswith("skipped")


def digits_of(value: float) -> int:
    """Behind the point, for three figures in all. Pure."""
    return max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
