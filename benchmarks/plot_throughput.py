"""The picture of a result file: a panel a model, a bar a side.

python -m benchmarks.plot_throughput RESULT.json
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.statistics_of_rounds import spread

OURS, PEERS = "#2a6f97", "#b0b7bf"


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: medians as bars, every round as a dot, twice one process as a line. Replaces the file.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = content["models"]
    figure, panels = pyplot.subplots(1, len(models), figsize=(8 * len(models), 4.5), squeeze=False)
    for axes, (model, measured) in zip(panels[0], models.items(), strict=True):
        _panel(axes, model, measured["sides"])
    hardware, config = content["hardware"], content["config"]
    figure.suptitle(
        f"{hardware['processor']}, {hardware['cores']} cores, one thread and batch {config['batch']} a rank; "
        f"median and all of {config['rounds']} rounds",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axes: Any, model: str, sides: Mapping[str, Any]) -> None:
    shown = [(key, side, found) for key, side in sides.items() if (found := spread(side["examples_per_second"]))]
    for place, (key, side, found) in enumerate(shown):
        axes.barh(place, found.median, color=OURS if side["what"].startswith("our") else PEERS, height=0.7)
        rounds = [value for value in side["examples_per_second"] if value is not None]
        axes.plot(rounds, [place] * len(rounds), ".", color="black", markersize=4)
        axes.text(0.01 * found.median, place, f"{found.median:,.0f}", va="center", color="white", fontsize=8)
        if key == "local":
            axes.axvline(2 * found.median, linestyle="--", color="black", linewidth=1)
            axes.text(1.98 * found.median, len(shown) - 0.45, "2 x one process", ha="right", fontsize=8)
    labels = [
        f"{side['what']} ({side['ranks']}{' ranks' if side['ranks'] > 1 else ' process'})" for _, side, _ in shown
    ]
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("examples/s, all ranks")
    axes.set_title(model)


if __name__ == "__main__":
    result = Path(sys.argv[1])
    try:
        plot(json.loads(result.read_text()), result.with_suffix(".png"))
    except ImportError:
        sys.exit("plot_throughput: matplotlib is not installed: pip install matplotlib")
