"""The pictures of a report, by matplotlib: as SVG for the page, and as PNG, SVG and PDF files for papers."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from benchmarks.statistics_of_rounds import spread
from benchmarks.study.findings import Cells, Condition, Row, ranking
from benchmarks.study.numbers import SPLIT, height
from hvdvae.whole_file import write_whole

COLORS = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)), (0, (3, 1, 1, 1)))
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "++", "--")
"""Beside colors, for who sees none, or prints without."""
SPLIT_COLORS = dict(zip(SPLIT, ("#2b7a4b", "#c9c9c9", "#d9a520", "#3b6fb6", "#c0392b"), strict=True))
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "hvdvae",
    # Text stays text: it can be searched and read aloud.
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "hatch.linewidth": 0.4,
}
DOTS_PER_INCH = 110
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"dpi": DOTS_PER_INCH},
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
}
AXES = {"elbo": "ELBO", "nll": "-NLL"}


class Pictures:
    """Draws, keeps the SVG for the page, and writes files."""

    def __init__(self, folder: Path, contenders: Sequence[str]) -> None:
        """`contenders`: in the study's order; each has its color in all pictures."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._colors = {name: COLORS[(2 * place) % 20 + (2 * place) // 20] for place, name in enumerate(contenders)}
        self._dashes = {name: DASHES[place % len(DASHES)] for place, name in enumerate(contenders)}
        self._hatches = {name: HATCHES[place % len(HATCHES)] for place, name in enumerate(contenders)}

    def curves(self, name: str, condition: Condition, key: str) -> str:
        """The bound over `key` (seconds or examples): median over seeds, and a band from the least to the greatest."""

        def draw(axes: Axes) -> None:
            floor = _floor(condition)
            for row in condition.rows:
                found = over_seeds(row.cells, key, condition.bound)
                if found is None:
                    continue
                places, low, middle, high = found
                scale = 1 if key == "seconds" else 1000
                color = self._colors[row.contender]
                axes.plot(
                    places / scale,
                    middle,
                    color=color,
                    linestyle=self._dashes[row.contender],
                    linewidth=1.4,
                    label=row.contender,
                )
                axes.fill_between(places / scale, low, high, color=color, alpha=0.18, linewidth=0)
            if condition.target is not None:
                axes.axhline(condition.target, color="black", linewidth=0.8, linestyle="--")
                # Beside the curves, where none can pass.
                axes.annotate(
                    f"target\n{condition.target:.2f}",
                    (1.01, condition.target),
                    xycoords=("axes fraction", "data"),
                    ha="left",
                    va="center",
                    annotation_clip=False,
                )
            if floor is not None:
                axes.set_ylim(bottom=floor)
            axes.set_xlabel("seconds of training" if key == "seconds" else "examples, thousands, all ranks together")
            axes.set_ylabel(f"validation {AXES[condition.bound]} (nats per example)")
            _legend_below(axes)

        return self._draw(name, draw, (6.4, 4.4))

    def times(self, name: str, condition: Condition) -> str:
        """Seconds to the target: median, and least and greatest of the seeds; the first one on top."""
        order = ranking(condition)
        rows = [*order, *[row for row in condition.rows if row not in order]]

        def draw(axes: Axes) -> None:
            for place, row in enumerate(rows):
                found = spread(row.seconds)
                if row in order and found is not None:
                    error = [[found.median - found.low], [found.high - found.median]]
                    color, hatch = self._colors[row.contender], self._hatches[row.contender]
                    axes.barh(place, found.median, color=color, hatch=hatch, edgecolor="white", xerr=error, capsize=3)
                else:
                    why = "failed" if row.failed else "not reached within the budget"
                    axes.text(
                        0, place, f" {why} in {_missing(row)} of {len(row.cells)} seeds", va="center", style="italic"
                    )
            axes.set_yticks(range(len(rows)), [row.contender for row in rows])
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.grid(visible=False, axis="y")
            axes.set_xlabel("seconds to the target, median and range over seeds")

        return self._draw(name, draw, (6.4, 0.9 + 0.32 * len(rows)))

    def split(self, name: str, condition: Condition) -> str:
        """Where each rank's time went, mean over seeds."""
        bars = [
            (f"{row.contender}, rank {rank}" if rank == 0 else f"rank {rank}", shares)
            for row in condition.rows
            for rank, shares in enumerate(_mean_split(row))
        ]

        def draw(axes: Axes) -> None:
            left = np.zeros(len(bars))
            for part, hatch in zip(SPLIT, HATCHES, strict=False):
                width = np.array([shares[part] for _, shares in bars])
                look = {"color": SPLIT_COLORS[part], "hatch": hatch, "edgecolor": "white", "linewidth": 0}
                axes.barh(range(len(bars)), width, left=left, label=part, height=0.85, **look)
                left += width
            axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=7)
            axes.invert_yaxis()
            axes.set_xlim(0, 1)
            axes.grid(visible=False, axis="y")
            axes.set_xlabel("share of a rank's time")
            axes.legend(ncols=len(SPLIT), loc="lower center", bbox_to_anchor=(0.5, 1.0))

        return self._draw(name, draw, (6.4, 0.9 + 0.17 * len(bars)))

    def staleness(self, name: str, condition: Condition) -> str:
        """Updates between pull and push, of all pushes that were applied."""
        rows = [row for row in condition.rows if not row.steps_together and _staleness(row)]

        def draw(axes: Axes) -> None:
            width = 0.8 / max(len(rows), 1)
            top = max((_quantile(_staleness(row), 0.999) for row in rows), default=0)
            for place, row in enumerate(rows):
                counts = _staleness(row)
                total = sum(counts.values())
                values = range(top + 1)
                shares = [counts.get(value, 0) / total for value in values]
                shift = (place - (len(rows) - 1) / 2) * width
                axes.bar(
                    [value + shift for value in values],
                    shares,
                    width,
                    color=self._colors[row.contender],
                    hatch=self._hatches[row.contender],
                    edgecolor="white",
                    linewidth=0,
                    label=row.contender,
                )
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("staleness (updates between pull and push)")
            axes.set_ylabel("share of pushes")
            axes.legend()

        return self._draw(name, draw, (6.4, 2.8)) if rows else ""

    def scaling(self, name: str, scenario: str, found: Sequence[Condition], cores: int) -> str:
        """Throughput over world size, with the line of ideal scaling from one process, if there was one."""
        sizes = sorted({condition.size for condition in found})

        def draw(axes: Axes) -> None:
            alone = [rate for condition in found for row in condition.rows for rate in row.rates if row.alone]
            one = spread(alone)
            if one is not None:
                ends = [1, max(sizes)]
                axes.plot(
                    ends,
                    [one.median * end for end in ends],
                    color="black",
                    linestyle="--",
                    linewidth=0.8,
                    label="ideal",
                )
            for contender in self._colors:
                points = [
                    (1 if row.alone else condition.size, spread(row.rates))
                    for condition in found
                    for row in condition.rows
                    if row.contender == contender
                ]
                measured = [(size, rate) for size, rate in points if rate is not None]
                if not measured:
                    continue
                axes.errorbar(
                    [size for size, _ in measured],
                    [rate.median for _, rate in measured],
                    [
                        [rate.median - rate.low for _, rate in measured],
                        [rate.high - rate.median for _, rate in measured],
                    ],
                    color=self._colors[contender],
                    linestyle=self._dashes[contender],
                    marker="o",
                    markersize=4,
                    capsize=2,
                    label=contender,
                )
            if max(sizes) > cores:
                axes.axvspan(cores + 0.02, max(sizes) + 0.2, color="#f3e3d3", zorder=0)
                axes.annotate(
                    "more ranks than cores", (max(sizes) + 0.15, 0.02), xycoords=("data", "axes fraction"), ha="right"
                )
            axes.set_xticks(sorted({1, *sizes}))
            axes.set_ylim(bottom=0)
            axes.set_xlabel("ranks that train")
            axes.set_ylabel("examples per second")
            _legend_below(axes)

        return self._draw(name, draw, (6.4, 3.6))

    def _draw(self, name: str, draw: Callable[[Axes], None], inches: tuple[float, float]) -> str:
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=inches)
            draw(figure.add_subplot())
            kept = {}
            for kind, options in FORMATS.items():
                drawn = io.BytesIO()
                figure.savefig(drawn, format=kind, **options)
                kept[kind] = drawn.getvalue()
                write_whole(self._folder / f"{name}.{kind}", kept[kind])
        return _scoped(kept["svg"].decode("utf-8"), name)


def over_seeds(
    cells: Cells, key: str, bound: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None:
    """Places on the axis of `key`, and least, median and greatest height there of the seeds that got so far.

    Between two looks a height is taken to be on a straight line. It ends where the first seed ends: beyond, a median of
    fewer would jump. None where no seed has two looks. Pure.
    """
    curves = []
    for cell in cells:
        looks = [(point[key], found) for point in cell["points"] if (found := height(point, bound)) is not None]
        if len(looks) > 1:
            curves.append(np.array(sorted(looks), dtype=np.float64).T)
    if not curves:
        return None
    first, last = max(curve[0, 0] for curve in curves), min(curve[0, -1] for curve in curves)
    places = np.unique(np.concatenate([curve[0] for curve in curves] + [np.array([first, last])]))
    places = places[(places >= first) & (places <= last)]
    if len(places) < 2:
        return None
    heights = np.stack([np.interp(places, curve[0], curve[1]) for curve in curves])
    return places, heights.min(0), np.median(heights, 0), heights.max(0)


def _legend_below(axes: Axes) -> None:
    """Outside, where no curve is."""
    figure = axes.get_figure()
    assert figure is not None
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=4, handlelength=3.2, fontsize=8)


def _scoped(svg: str, name: str) -> str:
    """An <svg> element whose ids are of this picture alone: a page has several."""
    svg = svg[svg.index("<svg") :]
    mark = re.sub(r"[^a-z0-9]+", "-", name.lower())
    svg = re.sub(r'\bid="', f'id="{mark}-', svg)
    svg = re.sub(r'href="#', f'href="#{mark}-', svg)
    return re.sub(r"url\(#", f"url(#{mark}-", svg)


def _floor(condition: Condition) -> float | None:
    """Lower end of what is worth drawing: first looks are far below all others."""
    late = [
        found
        for row in condition.rows
        for cell in row.cells
        for point in cell["points"][2:]
        if (found := height(point, condition.bound)) is not None
    ]
    return float(np.quantile(late, 0.05)) - 1.0 if late else None


def _missing(row: Row) -> int:
    return sum(value is None for value in row.seconds)


def _mean_split(row: Row) -> list[dict[str, float]]:
    """Of each rank."""
    splits = [cell["split"] for cell in row.cells if cell["failed"] is None]
    if not splits:
        return []
    ranks = min(len(split) for split in splits)
    return [{part: float(np.mean([split[rank][part] for split in splits])) for part in SPLIT} for rank in range(ranks)]


def _staleness(row: Row) -> dict[int, int]:
    counts: dict[int, int] = {}
    for cell in row.cells:
        found: Mapping[str, Any] = cell.get("staleness", {})
        for value, count in found.items():
            counts[int(value)] = counts.get(int(value), 0) + count
    return counts


def _quantile(counts: Mapping[int, int], share: float) -> int:
    left = share * sum(counts.values())
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return max(counts)
