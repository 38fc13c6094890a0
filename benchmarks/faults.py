"""What happens to a run when something breaks: every fault, every way of training, one job each.

    python benchmarks/faults.py                                    # all of them, most of an hour
    python benchmarks/faults.py --only 'killed / ps'               # by words of the names of faults and ways
    python benchmarks/faults.py --soak 100                         # random kills of random ways that survive them

For each: whether training went on, how many seconds after the fault the first beat was seen by this process (they come
every tenth of a second), how many steps were lost, and the exit status. Of faults that last, seconds count from their
end; of a torn checkpoint from the start of the resume. Steps lost are those of the last beat before the fault that were
taken anew, of a torn checkpoint thus all since the one before, and a step that was skipped. A job that hangs, ends
badly with status 0, or leaves no checkpoint that can be read is counted as broken; then the exit status is 1.

Digits, three ranks that train, or four that hold two copies of a model. Writes faults.json and faults.md, or soak.json
and soak.md, into --output. Needs Open MPI 5; link cuts and full disks need root, clock jumps libfaketime.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # A script's own folder is on the path; the packages are beside it.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.fault_kinds import (
    FAULTS,
    NAN_STEP,
    Skipped,
    cut_link,
    fake_clock,
    fill_disk,
    jump_clock,
    kill_rank_0,
    kill_server,
    kill_trainer,
    small_disk,
    spoil_gradient,
    two_hosts,
)
from benchmarks.fault_outcome import Outcome, outcome, row, table
from benchmarks.fault_run import started
from benchmarks.fault_ways import ROOT, WAYS, command, command_on
from benchmarks.machine import machine
from hvdvae.whole_file import write_whole

SOAK_EPOCHS = 20
# A checkpoint that was torn while its run was dead, and a link that is cut, are not done to one job on this host.
TORN, CUT = "the newest checkpoint is torn", "a link is cut for 10 s"


def measure(fault: str, name: str, folder: Path, more: str = "") -> Outcome:
    """One fault in one way of training. Blocks. `more`: options of the run."""
    way = replace(WAYS[name], options=f"{WAYS[name].options}{more}")
    inject = FAULTS[fault]
    if inject is kill_server and not way.extra:
        raise Skipped("has no server")
    environment = fake_clock(folder) if inject is jump_clock else {}
    with small_disk(folder) if inject is fill_disk else nullcontext():
        words = command(way, folder, nan_step=NAN_STEP if inject is spoil_gradient else 0, ranks_have=environment)
        with started(words, folder) as job:
            job.await_beats(5)
            time.sleep(random.uniform(0.0, 0.5))
            inject(job, way)
            return outcome(fault, name, job)


def measure_torn(name: str, folder: Path) -> Outcome:
    """A run is killed as a whole, its newest checkpoint cut short, and the run resumed. Blocks."""
    way = WAYS[name]
    with started(command(way, folder), folder) as job:
        job.await_beats(5)
        while len(list((job.out / "checkpoints").glob("step-*.safetensors"))) < 2 and job.process.poll() is None:
            time.sleep(0.05)
        last = job.beats()[-1][1]
    newest = max((folder / "run" / "checkpoints").glob("step-*.safetensors"))
    os.truncate(newest, newest.stat().st_size // 2)
    with started(command(way, folder, resume=True), folder) as job:
        job.now()
        job.step_before = last
        found = outcome(TORN, name, job)
        refused = any("refused" in line for _, line in job.said())
    words = "goes on from the one before" if refused and not found.broken else found.words
    return replace(found, words=words, broken=found.broken or not refused)


def measure_cut(name: str, folder: Path) -> Outcome:
    """Two hosts, and no link between them for ten seconds. Blocks."""
    with two_hosts() as hosts, started(command_on(hosts, WAYS[name], folder), folder) as job:
        job.await_beats(5)
        cut_link(job)
        return outcome(CUT, name, job)


def soak(kills: int, place: Path) -> Iterator[Outcome]:
    """Kill so many ranks at random moments of random ways that survive it."""
    choose = random.Random(kills)
    for number in range(kills):
        fault = choose.choice([name for name, fault in FAULTS.items() if fault in (kill_trainer, kill_rank_0)])
        name = choose.choice([name for name, way in WAYS.items() if way.survives])
        yield _measured(fault, name, _folder(place, f"soak-{number}"), f" --epochs {SOAK_EPOCHS}")


def every(only: str, place: Path, skipped: list[str]) -> Iterator[Outcome]:
    """All faults in all ways, those alone whose names have the words `only`. Adds what cannot be had to `skipped`."""
    fault_words, _, way_words = (part.strip() for part in only.partition("/"))
    for fault in [*FAULTS, TORN, CUT]:
        for name in WAYS:
            if fault_words not in fault or way_words not in name:
                continue
            try:
                yield _measured(fault, name, _folder(place, f"{fault} {name}"))
            except Skipped as reason:
                skipped.append(f"{fault}, {name}: {reason}")
                print(skipped[-1], file=sys.stderr)


def _measured(fault: str, name: str, folder: Path, more: str = "") -> Outcome:
    try:
        kinds = {TORN: measure_torn, CUT: measure_cut}
        return kinds[fault](name, folder) if fault in kinds else measure(fault, name, folder, more)
    except RuntimeError as error:
        print(f"{fault}, {name}: {error}", file=sys.stderr)
        return Outcome(fault, name, "did not start", broken=True)


def _folder(place: Path, name: str) -> Path:
    folder = place / "".join(letter if letter.isalnum() else "-" for letter in name)
    folder.mkdir(parents=True)
    return folder


def write(folder: Path, name: str, about: dict[str, Any], found: Sequence[Outcome]) -> None:
    """The record and the table of what is known so far."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {**about, "cells": [asdict(one) for one in found]}
    write_whole(folder / f"{name}.json", json.dumps(record, indent=2) + "\n")
    write_whole(folder / f"{name}.md", f"{table(found)}\n")


def main() -> int:
    """Break all, print the table, and write it. The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults and ways whose name has these words, as 'killed / ps'")
    parser.add_argument("--soak", type=int, default=0, help="random kills instead")
    parser.add_argument(
        "--output", type=Path, help="folder [benchmarks/results/faults-DATE; with --only nothing is written]"
    )
    asked = parser.parse_args()
    folder = asked.output
    if folder is None and not asked.only:
        folder = ROOT / "benchmarks" / "results" / f"faults-{datetime.now(UTC):%Y-%m-%d}"
    place = Path(tempfile.mkdtemp(prefix="hvdvae-faults-"))
    skipped: list[str] = []
    line = shlex.join(["python", "benchmarks/faults.py", *sys.argv[1:]])
    about = {**machine(), "command": line, "ways": {name: asdict(way) for name, way in WAYS.items()}}
    found: list[Outcome] = []
    for one in soak(asked.soak, place) if asked.soak else every(asked.only, place, skipped):
        found.append(one)
        print(row(one), flush=True)
        if folder is not None:
            write(folder, "soak" if asked.soak else "faults", {**about, "skipped": skipped}, found)
    broken = [one for one in found if one.broken]
    print(f"\n{table(found)}\n\n{len(broken)} of {len(found)} broken; logs: {place}")
    if not broken:
        shutil.rmtree(place, ignore_errors=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
