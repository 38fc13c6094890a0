"""Throughput of this library against raw Horovod, PyTorch DDP, one process, and pythae where it is installed.

    python benchmarks/throughput.py                  # about ten minutes; the machine should do nothing else
    python benchmarks/throughput.py --quick          # does it run?

All sides are measured in one run, in blocks that alternate over several rounds, and ratios compare blocks of
the same round. Prints a table with targets and writes throughput.json and throughput.png into --output. Exits
with 0 also where a target was missed; with 1 where a side failed.
"""

import argparse
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if (
    __name__ == "__main__"
):  # A script's own folder is on the path; the modules beside it are a package of the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.launch_ranks import ROOT, TIMED_OUT, launch_ranks
from benchmarks.plot_throughput import plot
from benchmarks.report import failures, report

MODELS = ("mlp", "conv")
ENGINES = ("mpi", "horovod")
BATCH = 128
RANKS = 2


def options() -> argparse.Namespace:
    """The command line; exits with 2 on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="blocks of each side [7]")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a block, warm-up not counted [2]")
    parser.add_argument("--models", default=",".join(MODELS), help="which, with commas between [mlp,conv]")
    parser.add_argument("--data", help="images of 28x28, as of hvdvae train, or synthetic [mnist, else synthetic]")
    parser.add_argument("--output", type=Path, help="folder [benchmarks/results/throughput-DATE]")
    parser.add_argument("--quick", action="store_true", help="one round of 0.2 s: a test, no measurement")
    found = parser.parse_args()
    found.models = found.models.split(",")
    unknown = [model for model in found.models if model not in MODELS]
    if unknown:
        parser.error(f"--models: found {unknown[0]!r}, expected some of {','.join(MODELS)}")
    if found.quick:
        found.rounds, found.seconds = 1, 0.2
    if found.rounds < 1 or not found.seconds > 0:
        parser.error(f"--rounds and --seconds: found {found.rounds} and {found.seconds:g}, expected numbers above 0")
    return found


def measure(asked: argparse.Namespace, result: Path) -> dict[str, Any]:
    """Run the ranks; the result file with what is known, also if they crashed.

    Blocks. Raises RuntimeError if nothing is known.
    """
    plan = {
        "models": asked.models,
        "rounds": asked.rounds,
        "seconds": asked.seconds,
        "batch": BATCH,
        "data": asked.data,
        "result": str(result),
    }
    # A side takes its block and warm-up, and some seconds to start; a busy machine takes several times that.
    limit = 180 + len(asked.models) * asked.rounds * 12 * (4 * asked.seconds + 10)
    status = launch_ranks("benchmarks.ranks", plan, ranks=RANKS, seconds=limit)
    if not result.exists():
        raise RuntimeError(f"the ranks ended with status {status} before anything was measured; see above")
    content: dict[str, Any] = json.loads(result.read_text())
    content["crash"] = ""
    if status:
        ended = f"did not end within {limit:.0f} s" if status == TIMED_OUT else f"ended with status {status}"
        content["crash"] = f"the ranks {ended} in: {content['running'] or 'their end'} (their words are above)"
    return content


def measure_memory(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Footprints of our ranks, by engine; an engine that failed is left out. Blocks."""
    found = {}
    for engine in ENGINES:
        plan = {"engine": engine, "model": "mlp", "batch": BATCH, "data": asked.data, "result": str(scratch)}
        if launch_ranks("benchmarks.memory", plan, ranks=RANKS, seconds=120) == 0:
            found[engine] = json.loads(scratch.read_text())
        scratch.unlink(missing_ok=True)
    return found


def main() -> int:
    """Measure, print, write. The exit status."""
    asked = options()
    folder = asked.output or ROOT / "benchmarks" / "results" / f"throughput-{datetime.now(UTC):%Y-%m-%d}"
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "throughput.json"
    result.unlink(missing_ok=True)
    try:
        content = measure(asked, result)
    except (FileNotFoundError, RuntimeError) as error:
        print(f"throughput: error: {error}", file=sys.stderr)
        return 1
    content["memory"] = measure_memory(asked, folder / "memory.json")
    content["memory_failed"] = [engine for engine in ENGINES if engine not in content["memory"]]
    content["command"] = shlex.join(["python", "benchmarks/throughput.py", *sys.argv[1:]])
    result.write_text(json.dumps(content, indent=1) + "\n")
    print("\n" + report(content))
    try:
        plot(content, result.with_suffix(".png"))
    except ImportError:
        print("no picture: matplotlib is not installed")
    print(f"\nwritten to {folder}")
    return 1 if failures(content) else 0


if __name__ == "__main__":
    sys.exit(main())
