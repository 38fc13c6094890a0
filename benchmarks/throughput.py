"""Throughput of this library against raw Horovod, PyTorch DDP, one process, and pythae where it is installed.

    python benchmarks/throughput.py                  # about ten minutes; the machine should do nothing else
    python benchmarks/throughput.py --quick          # does it run?

All sides are measured in one run, in blocks that alternate over several rounds, and ratios compare blocks of the same
round. Prints a table with targets and writes throughput.json and throughput.png into --output. Exits with 0 also where
a target was missed; with 1 where a side failed.
"""

import argparse
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

if (
    __name__ == "__main__"
):  # A script's own folder is on the path; the modules beside it are a package of the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.machine import machine
from benchmarks.plot_throughput import plot
from benchmarks.record import Record
from benchmarks.report import report
from benchmarks.rounds import measure
from benchmarks.teams import installed

MODELS = ("mlp", "conv")
BATCH = 128
QUICK_ROUNDS, QUICK_SECONDS = 1, 0.2
RESULTS = Path(__file__).resolve().parent / "results"


def options() -> argparse.Namespace:
    """The command line; exits with 2 on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="blocks of each side [7]")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a block, warm-up not counted [2]")
    parser.add_argument("--models", default=",".join(MODELS), help="which, with commas between [mlp,conv]")
    parser.add_argument("--data", help="images of 28x28, as of hvdvae train, or synthetic [mnist, else synthetic]")
    parser.add_argument("--tune-peers", action="store_true", help="give peers the Trainer's settings of malloc and MPI")
    parser.add_argument("--output", type=Path, help="folder [benchmarks/results/throughput-DATE]")
    parser.add_argument("--quick", action="store_true", help="one round of 0.2 s: a test, no measurement")
    found = parser.parse_args()
    found.models = found.models.split(",")
    unknown = [model for model in found.models if model not in MODELS]
    if unknown:
        parser.error(f"--models: found {unknown[0]!r}, expected some of {','.join(MODELS)}")
    if found.quick:
        found.rounds, found.seconds = QUICK_ROUNDS, QUICK_SECONDS
    if found.rounds < 1 or not found.seconds > 0:
        parser.error(f"--rounds and --seconds: found {found.rounds} and {found.seconds:g}, expected numbers above 0")
    return found


def main() -> int:
    """Measure, print, write. The exit status."""
    asked = options()
    folder = asked.output or RESULTS / f"throughput-{datetime.now(UTC):%Y-%m-%d}"
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "throughput.json"
    config = {
        "command": shlex.join(["python", "benchmarks/throughput.py", *sys.argv[1:]]),
        "models": asked.models,
        "rounds": asked.rounds,
        "seconds": asked.seconds,
        "batch": BATCH,
        "tune_peers": asked.tune_peers,
    }
    record = Record(machine(), config)
    workers = {"batch": BATCH, "data": asked.data, "tune_peers": asked.tune_peers}
    measure(installed(), record, workers, lambda: record.write(result), lambda line: print(line, flush=True))
    record.write(result)
    print("\n" + report(record.content))
    try:
        plot(record.content, result.with_suffix(".png"))
    except ImportError:
        print("no picture: matplotlib is not installed")
    print(f"\nwritten to {folder}")
    return 1 if record.content["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
