"""What splitting a model, or its optimizer, costs and saves, beside copies of the whole (allreduce).

    python benchmarks/parallelism.py
    python benchmarks/parallelism.py --ranks 4 --hidden 4000 4000 --rounds 7

All sides take turns in every round, each turn a job of its own on synthetic 28 x 28 images. Prints examples/s of all
ranks and their ratio to allreduce's, medians of rounds with the least and greatest, and MB of weights and of optimizer
state on the fullest rank. Then, against what theory allows:

    pipeline   independent processes, one a core, on micro-batches of the same size: what the cores give; times
               (1 - bubble) / imbalance, which GPipe's formula and the measured times of the stages say; and times
               (1 - bubble) alone
    tensor     the same on whole batches, and a step's sums of activations as they take alone, which is what their bytes
               cost; and what part of the time it really waited in them
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

if (
    __name__ == "__main__"
):  # A script's own folder is on the path; the modules beside it are a package of the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.statistics_of_rounds import Spread, paired_ratios, rotated, spread
from hvdvae.cli import mpirun
from hvdvae.parallel.mesh import Mesh

JOB = Path(__file__).with_name("parallelism_rank.py")
MICROS = 8
"""Micro-batches of a batch in stages."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="[2]")
    parser.add_argument("--hidden", type=int, nargs="+", default=[2000, 2000], help="units [2000 2000]")
    parser.add_argument("--batch", type=int, default=256, help="examples of a step, all ranks together [256]")
    parser.add_argument("--rounds", type=int, default=5, help="[5]")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn [4]")
    asked = parser.parse_args()
    sides = sides_of(asked.ranks, asked.batch)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(asked.rounds):
        for name in rotated(list(sides), number):
            ranks, order = sides[name]
            turns[name].append(turn(ranks, {"hidden": asked.hidden, "seconds": asked.seconds, **order}))
    cores = len(os.sched_getaffinity(0))
    print(f"{asked.ranks} ranks, {cores} cores, hidden {asked.hidden}, {asked.batch} examples a step")
    print(f"{'':<26}{'examples/s':>28}{'of allreduce':>22}{'weights MB':>12}{'state MB':>10}")
    rates = {name: [one["rate"] for one in found] for name, found in turns.items()}
    for name, found in turns.items():
        ratio = shown(spread(paired_ratios(rates[name], rates["allreduce"])), 2)
        rate, megabytes = shown(spread(rates[name]), 0), [found[0][key] / 1e6 for key in ("parameters", "state")]
        print(f"{name:<26}{rate:>28}{ratio:>22}{megabytes[0]:>12.1f}{megabytes[1]:>10.1f}")
    print()
    halved = paired_ratios(rates["sharded, weights too"], rates["allreduce, bf16"])
    print(f"sharded, weights too: {shown(spread(halved), 2)} of allreduce, bf16")
    for name, found in turns.items():
        if name.startswith("pipeline"):
            allowed = [
                one["rate"] * (1 - two["pipeline"]["bubble"]) / two["pipeline"]["imbalance"]
                for one, two in zip(turns["independent, micro-batches"], found, strict=True)
            ]
            idle = spread([one["pipeline"]["idle"] for one in found])
            even = [rate * one["pipeline"]["imbalance"] for rate, one in zip(allowed, found, strict=True)]
            print(
                f"{name}: {shown(spread(paired_ratios(rates[name], allowed)), 2)} of what is allowed, "
                f"{shown(spread(paired_ratios(rates[name], even)), 2)} were all stages alike; idle "
                f"{shown(idle, 2)}, bubble {found[0]['pipeline']['bubble']:.2f}, imbalance "
                f"{shown(spread([one['pipeline']['imbalance'] for one in found]), 2)}"
            )
        if name.startswith("tensor"):
            alone = [one["sum_seconds"] / asked.batch for one in found]
            free = [one["rate"] for one in turns["independent, whole batches"]]
            allowed = [1 / (1 / rate + seconds) for rate, seconds in zip(free, alone, strict=True)]
            share = spread([seconds * rate for seconds, rate in zip(alone, allowed, strict=True)])
            waited = spread([one["waited"] for one in found])
            print(
                f"{name}: {shown(spread(paired_ratios(rates[name], allowed)), 2)} of what is allowed; its sums, of "
                f"{found[0]['sum_bytes'] / 1e6:.1f} MB a step and rank, would take {shown(share, 2)} of the time, and "
                f"took {shown(waited, 2)}"
            )


def sides_of(ranks: int, batch: int) -> dict[str, tuple[int, dict[str, Any]]]:
    """Ranks and configuration of each side, by name."""
    share = batch // ranks
    cores = min(ranks, len(os.sched_getaffinity(0)))
    whole = {"independent": True, "strategy": "local"}
    sides: dict[str, tuple[int, dict[str, Any]]] = {
        "allreduce": (ranks, {"batch_size": share}),
        "sharded": (ranks, {"batch_size": share, "strategy": "sharded"}),
        "sharded, gradients too": (ranks, {"batch_size": share, "strategy": "sharded", "zero_stage": 2}),
        "allreduce, bf16": (ranks, {"batch_size": share, "precision": "bf16"}),
        "sharded, weights too": (
            ranks,
            {"batch_size": share, "strategy": "sharded", "zero_stage": 2, "precision": "bf16", "weights": "bf16"},
        ),
        "independent, whole batches": (cores, {**whole, "batch_size": batch}),
        "independent, micro-batches": (cores, {**whole, "batch_size": batch // MICROS, "accumulate": MICROS}),
    }
    for schedule in ("1f1b", "gpipe"):
        staged = {"pipeline": ranks, "micro_batches": MICROS, "pipeline_schedule": schedule, "cuts": "measured"}
        sides[f"pipeline, {schedule}"] = (ranks, {**staged, "batch_size": batch})
    sides["tensor"] = (ranks, {"tensor": ranks, "batch_size": batch})
    if ranks == 4:
        sides["tensor, " + str(Mesh(2, 1, 2))] = (ranks, {"mesh": "dp=2,tp=2", "batch_size": batch // 2})
        mixed = {"mesh": "dp=2,pp=2", "micro_batches": MICROS // 2, "cuts": "measured"}
        sides["stages, " + str(Mesh(2, 2, 1))] = (ranks, {**mixed, "batch_size": batch // 2})
    return sides


def turn(ranks: int, order: dict[str, Any]) -> dict[str, Any]:
    """What a job with this order did. Blocks."""
    program = mpirun.find()
    if program is None:
        raise SystemExit("no mpirun in this Python's environment nor on the PATH: `hvdvae doctor` says more")
    launch = mpirun.command(program, mpirun.name(program), ranks)
    environment = {**mpirun.environment(os.environ), "OMP_NUM_THREADS": "1"}
    command = [*launch, sys.executable, str(JOB), json.dumps(order)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"{order} ended with status {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    found: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return found


def shown(found: Spread | None, digits: int) -> str:
    """Median [least, greatest]."""
    assert found is not None
    return f"{found.median:,.{digits}f} [{found.low:,.{digits}f}, {found.high:,.{digits}f}]"


if __name__ == "__main__":
    main()
