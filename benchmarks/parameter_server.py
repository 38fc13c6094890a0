"""The parameter server against independent processes, and against a pickling server; what it costs, and where it ends.

    python benchmarks/parameter_server.py            # some minutes; the machine should do nothing else
    python benchmarks/parameter_server.py --quick    # does it run?

Two workers and a server train the 784-400-20 MLP with batches of 128, one thread a rank; sides take turns over several
rounds of one job, and ratios compare blocks of one round. A second job exchanges large vectors without computing.
Prints a table and writes parameter_server.json into --output. Exits with 0 also where a target was missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if (
    __name__ == "__main__"
):  # A script's own folder is on the path; the modules beside it are a package of the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.machine import machine
from hvdvae.cli import mpirun
from hvdvae.whole_file import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULT = "result "
Results = list[dict[str, Any]]


def options() -> argparse.Namespace:
    """The command line; exits with 2 on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="blocks of each side [7]")
    parser.add_argument("--steps", type=int, default=250, help="steps of a worker in a block [250]")
    parser.add_argument("--large", type=int, default=50_000_000, help="parameters of the large vector [50 million]")
    parser.add_argument("--data", help="images of 28x28, as of hvdvae train, or synthetic [mnist, else synthetic]")
    parser.add_argument("--output", type=Path, help="folder [benchmarks/results/parameter-server-DATE]")
    parser.add_argument("--quick", action="store_true", help="one short round: a test, no measurement")
    found = parser.parse_args()
    if found.quick:
        found.rounds, found.steps, found.large = 1, 10, 1_000_000
    if found.rounds < 1 or found.steps < 1 or found.large < 1:
        parser.error("--rounds, --steps and --large: expected numbers of at least 1")
    return found


def run(ranks: int, asked: argparse.Namespace) -> Results:
    """One job; returns what it measured. Blocks; raises CalledProcessError where it fails."""
    program = mpirun.find()
    if program is None:
        raise SystemExit("found no mpirun on PATH or beside this Python: run launch/install.sh, or load your MPI")
    environment = mpirun.environment(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    arguments = ["--rounds", str(asked.rounds), "--steps", str(asked.steps), "--large", str(asked.large)]
    command = [
        *mpirun.command(program, mpirun.name(program), ranks),
        *(sys.executable, "-m", "mpi4py", "-m", "benchmarks.parameter_server_ranks", *arguments),
        *(["--data", asked.data] if asked.data else []),
    ]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        found = []
        for line in job.stdout:
            print(line.rstrip(), flush=True)
            if line.startswith(RESULT):
                found.append(json.loads(line.removeprefix(RESULT)))
    if job.returncode:
        raise subprocess.CalledProcessError(job.returncode, command)
    return found


def report(results: Results) -> list[str]:
    """The table: what was measured, its target, and whether the median reached it."""
    speed = {
        kind: [r["examples_per_second"] for r in _of(results, "training") if r["kind"] == kind]
        for kind in ("apart", "asp", "asp, prefetch", "bsp", "pickling")
    }
    blocked = [r["blocked"] for r in _of(results, "training") if r["kind"] == "asp, prefetch"]
    memory, small = _of(results, "memory"), _of(results, "round trip")
    taken = {
        kind: [r["pushes_per_second"] for r in _of(results, "saturated") if r["kind"] == kind]
        for kind in ("asp", "pickling")
    }
    # What a server must move for a push: an Adam step, and the weights to the worker.
    bound = [1 / (m["adam_seconds"] + m["copy_seconds"]) for m in memory]
    alone, one, two = (
        [r["exchanges_per_second"] for r in _of(results, what)]
        for what in ("one worker, one server", "two workers, one server", "two workers, two servers")
    )
    return [
        _line("asp / two independent processes", _ratios(speed["asp"], speed["apart"]), 0.90),
        _line("asp with prefetch / two independent processes", _ratios(speed["asp, prefetch"], speed["apart"]), None),
        _line("bsp / two independent processes", _ratios(speed["bsp"], speed["apart"]), None),
        _line("a pickling server / two independent processes", _ratios(speed["pickling"], speed["apart"]), None),
        _line("asp / a pickling server, while training", _ratios(speed["asp"], speed["pickling"]), 4.0),
        _line("asp / a pickling server, nothing to compute", _ratios(taken["asp"], taken["pickling"]), None),
        _line("blocked share of a step, prefetch", blocked, 0.05, at_most=True),
        _line("cores that an idle server uses", [r["cores"] for r in _of(results, "idle server")], 0.05, at_most=True),
        _line("microseconds of a push and pull, 1,000 parameters", [r["microseconds"] for r in small], None),
        _line("large vector: one server / bound by memory", _ratios(alone, bound), 0.70),
        _line("large vector, two workers: two servers / one", _ratios(two, one), None),
    ]


def _of(results: Results, measured: str) -> Results:
    return [result for result in results if result["measured"] == measured]


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def _line(what: str, found: list[float], target: float | None, *, at_most: bool = False) -> str:
    middle = statistics.median(found)
    verdict = ""
    if target is not None:
        reached = middle <= target if at_most else middle >= target
        verdict = f"  {'at most' if at_most else 'at least'} {target:g}: {'reached' if reached else 'missed'}"
    return f"{what:<52}{middle:10.3f}  ({min(found):.3f} to {max(found):.3f}){verdict}"


def main() -> None:
    """Measure, print, write."""
    asked = options()
    results = run(3, asked) + run(4, asked)
    folder = asked.output or ROOT / "benchmarks" / "results" / f"parameter-server-{datetime.now(UTC):%Y-%m-%d}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = report(results)
    record = {**machine(), "rounds": asked.rounds, "steps": asked.steps, "results": results, "report": lines}
    write_whole(folder / "parameter_server.json", json.dumps(record, indent=2) + "\n")
    print("\n" + "\n".join(lines))
    print(f"\nwritten to {folder}")


if __name__ == "__main__":
    main()
