"""Print the results of several training runs side by side.

python launch/side_by_side.py FOLDER...      folders of hvdvae train
"""

import json
import sys
from pathlib import Path

ROWS = (
    ("strategy", "{}"),
    ("engine", "{}"),
    ("world_size", "{} workers"),
    ("servers", "{} server"),
    ("consistency", "{}"),
    ("epochs", "{:g}"),
    ("examples_per_second", "{:,.0f} examples/s"),
    ("training_seconds", "{:.1f} s of training"),
    ("staleness_mean", "{:.2f} updates"),
    ("test_nll", "{:.2f} nats"),
    ("rate", "{:.2f} nats"),
    ("distortion", "{:.2f} nats"),
)


def main(folders: list[str]) -> None:
    """One column a folder; a dash where a run has no such number."""
    runs = [json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8")) for folder in folders]
    table = [["", *(Path(folder).name for folder in folders)]]
    for key, form in ROWS:
        if any(run.get(key) is not None for run in runs):
            cells = ["-" if run.get(key) is None else form.format(run[key]) for run in runs]
            table.append([key.replace("_", " "), *cells])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("  " + "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main(sys.argv[1:])
