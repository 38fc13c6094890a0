"""Tables of a study: one line a cell as CSV, one line a contender for the page."""

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.statistics_of_rounds import Rounds, Spread, spread
from benchmarks.study.findings import Cells, Condition, Row, digits_of
from benchmarks.study.numbers import SPLIT, crossing
from benchmarks.study.study_file import Study
from hvdvae.whole_file import write_whole


@dataclass(frozen=True)
class Column:
    """A number of each cell."""

    title: str
    unit: str
    """Empty of a count or a ratio."""
    explained: str
    digits: int
    of: Callable[[Mapping[str, Any]], float | None]


def _mean_staleness(cell: Mapping[str, Any]) -> float:
    counts: dict[int, int] = {int(value): count for value, count in cell["staleness"].items()}
    return sum(value * count for value, count in counts.items()) / max(sum(counts.values()), 1)


def _share(part: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda cell: float(100 * sum(rank[part] for rank in cell["split"]) / len(cell["split"]))


def _best(cell: Mapping[str, Any]) -> float | None:
    return max((point["elbo"] for point in cell["points"] if point["elbo"] is not None), default=None)


def _payload(cell: Mapping[str, Any]) -> float | None:
    found = cell["payload_bytes_per_step"]
    return None if found is None else float(found) / 1e6


COLUMNS = (
    Column("best ELBO", "nats", "per example, validation", 2, _best),
    Column(
        "NLL", "nats", "per example, validation, importance-weighted, at the best ELBO", 2, lambda cell: cell["nll"]
    ),
    Column("examples/s", "", "all ranks together", 0, lambda cell: cell["examples_per_second"]),
    Column("step p50", "ms", "median time of a step", 2, lambda cell: 1000 * cell["latency_seconds"]["p50"]),
    Column("p95", "ms", "of the time of a step", 2, lambda cell: 1000 * cell["latency_seconds"]["p95"]),
    Column("p99", "ms", "of the time of a step", 2, lambda cell: 1000 * cell["latency_seconds"]["p99"]),
    Column(
        "throughput / latency",
        "1000/s²",
        "examples/s over seconds of the median step, in thousands",
        0,
        lambda cell: cell["throughput_over_latency"] / 1000,
    ),
    Column("staleness", "updates", "between pull and push, mean", 2, _mean_staleness),
    Column("dropped", "pushes", "that came too late, all ranks", 0, lambda cell: cell["dropped_pushes"]),
    Column("payload", "MB", "that a rank's exchange moves in a step, counted or computed for a ring", 2, _payload),
    Column(
        "network",
        "MB",
        "a rank and step through network interfaces, the loopback too; shared memory is none",
        3,
        lambda cell: cell["sent_bytes_per_step"] / 1e6,
    ),
    *(Column(part, "%", "of the ranks' time", 1, _share(part)) for part in SPLIT),
    Column("CPU", "cores", "kept busy by all ranks and servers", 2, lambda cell: sum(cell["cpu_cores"])),
    Column("memory", "MB", "peak of the largest process", 0, lambda cell: max(cell["peak_rss_bytes"]) / 1e6),
)
_TARGET = (
    ("to target", "s", "seconds of training"),
    ("to target", "1000 examples", "all ranks together"),
)
_EFFICIENCY = ("scaling efficiency", "", "throughput over that of as many processes alone")
HEADS = (*_TARGET, *((one.title, one.unit, one.explained) for one in COLUMNS), _EFFICIENCY)
"""Title, unit and explanation of each entry of `lines`."""
PARTS = {
    "Likelihood": ("to target", "best ELBO", "NLL"),
    "Speed": ("examples/s", "scaling efficiency", "step p50", "p95", "p99", "throughput / latency"),
    "Cost": ("staleness", "dropped", "payload", "network", "CPU", "memory"),
    "Where time went": tuple(SPLIT),
}
"""Tables that fit a page, and the titles of their columns."""


def parts() -> list[tuple[str, list[int]]]:
    """Title of each table of a page, and the places of its columns in HEADS. Pure."""
    return [
        (title, [place for name in names for place, head in enumerate(HEADS) if head[0] == name])
        for title, names in PARTS.items()
    ]


@dataclass(frozen=True)
class Entry:
    """A field of the page's table: what is read, and what is sorted by."""

    text: str
    key: float | None
    between: str = ""
    """Least and greatest of the seeds, where they differ."""


def lines(condition: Condition) -> list[tuple[str, list[Entry]]]:
    """A contender and its entries: time and examples to the target, then COLUMNS, then scaling efficiency."""
    found = []
    alone = [rate for row in condition.rows if row.alone for rate in row.rates]
    for row in condition.rows:
        measured = [cell for cell in row.cells if cell["failed"] is None]
        entries = [_entry(row.seconds, row), _entry([_thousands(value) for value in row.examples], row)]
        entries += [_spread_entry(spread([column.of(cell) for cell in measured]), column.digits) for column in COLUMNS]
        entries.append(_spread_entry(efficiency(row, alone, condition.size), 2))
        found.append((row.contender, entries))
    return found


def efficiency(row: Row, alone: Rounds, size: int) -> Spread | None:
    """Throughput over that of as many processes alone; by the median of these."""
    one = spread(alone)
    if one is None or row.alone:
        return None
    return spread([rate / (size * one.median) for rate in row.rates])


def _thousands(value: float | None) -> float | None:
    return None if value is None else value / 1000


def _entry(rounds: Rounds, row: Row) -> Entry:
    if row.failed == len(row.cells):
        return Entry("failed", None)
    missing = sum(value is None for value in rounds)
    if missing:
        return Entry(f"not in {missing} of {len(rounds)} seeds", None)
    found = spread(rounds)
    return _spread_entry(found, digits_of(found.median) if found else 0)


def _spread_entry(found: Spread | None, digits: int) -> Entry:
    if found is None:
        return Entry("-", None)
    if found.low == found.high:
        return Entry(f"{found.median:,.{digits}f}", found.median)
    between = f"[{found.low:,.{digits}f}, {found.high:,.{digits}f}]"
    return Entry(f"{found.median:,.{digits}f}", found.median, between)


def write_csv(path: Path, cells: Cells, targets: Mapping[tuple[str, int], float | None], study: Study) -> None:
    """One line a cell (of one process alone: one a world size, whose targets differ)."""
    names = [
        "scenario",
        "world_size",
        "contender",
        "seed",
        "failed",
        "target",
        "seconds_to_target",
        "examples_to_target",
        *(column.title.replace("/", " per ").replace(" ", "_") for column in COLUMNS),
    ]
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(names)
    for cell in cells:
        for size in study.world_sizes if cell["size"] == 1 else [cell["size"]]:
            target = targets.get((cell["scenario"], size))
            start = [cell["scenario"], size, cell["contender"], cell["seed"], cell["failed"] or "", target]
            if cell["failed"] is not None:
                writer.writerow(start)
                continue
            times = [
                None if target is None else crossing(cell["points"], target, key, study.target.bound)
                for key in ("seconds", "examples")
            ]
            writer.writerow([*start, *times, *(column.of(cell) for column in COLUMNS)])
    write_whole(path, file.getvalue())
