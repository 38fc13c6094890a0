"""What each rank does: rounds of blocks, in an order that turns from round to round.

Started by throughput.py.
Rank 0 writes what is known after every block, so that a crash costs one block and names its side.
"""

import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI  # before Horovod, which can be started anew only then

from benchmarks.blocks import Block, in_turns, together
from benchmarks.machine import machine
from benchmarks.neighbours import Neighbours
from benchmarks.sides import Unit, names, units
from benchmarks.statistics_of_rounds import rotated
from benchmarks.task import Task, open_splits
from hvdvae.allocator import keep_freed_memory


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    models: list[str]
    rounds: int
    seconds: float
    """Of a block."""
    batch: int
    """Examples a rank and step."""
    data: str | None
    result: str
    """JSON file that rank 0 writes."""


class Record:
    """The JSON file."""

    def __init__(self, plan: Plan, data: str) -> None:
        self._path = Path(plan.result)
        self.content: dict[str, Any] = {
            "config": {key: value for key, value in asdict(plan).items() if key != "result"},
            "data": data,
            **machine(),
            "running": "",
            "models": {
                model: {
                    "sides": {key: _empty(what, plan.rounds) for key, what in names(model).items()},
                    "order": [],
                }
                for model in plan.models
            },
        }

    def write(self) -> None:
        """Replace the file."""
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1))
        part.replace(self._path)

    def note(self, model: str, round_number: int, key: str, result: Block | Exception, others: float) -> None:
        """One block, or why there is none, and the cores that other processes used meanwhile."""
        side = self.content["models"][model]["sides"][key]
        if isinstance(result, Exception):
            side["failed"] = f"{type(result).__name__}: {result}"
            said = f"failed: {side['failed']}"
        else:
            side["examples_per_second"][round_number] = result.examples_per_second
            side["milliseconds_per_step"][round_number] = result.milliseconds_per_step
            side["steps"][round_number] = result.steps
            side["cores_of_others"][round_number] = others
            said = f"{result.examples_per_second:9,.0f} examples/s, {result.milliseconds_per_step:6.2f} ms a step"
        print(f"{model} round {round_number + 1}: {side['what']:<46} {said}", flush=True)


def _empty(what: str, rounds: int) -> dict[str, Any]:
    missing: list[None] = [None] * rounds
    return {
        "what": what,
        "examples_per_second": [*missing],
        "milliseconds_per_step": [*missing],
        "steps": [*missing],
        "cores_of_others": [*missing],
        "failed": "",
    }


@contextmanager
def others_asleep(world: MPI.Comm) -> Iterator[None]:
    """Rank 0 has the machine inside, while other ranks sleep at the end of the body. Every rank must enter it.

    MPI's own barrier would keep their cores busy.
    """
    yield
    everyone = world.Ibarrier()
    while not everyone.Test():
        time.sleep(0.005)


def measure(unit: Unit, task: Task, plan: Plan, world: MPI.Comm, round_number: int) -> dict[str, Block | Exception]:
    """The blocks of one unit. Every rank must call it; results are rank 0's."""
    if unit[0].ranks > 1:
        try:
            return {unit[0].key: together(unit[0], task, plan.seconds, world)}
        except Exception as error:
            return {unit[0].key: error}
    results: dict[str, Block | Exception] = {}
    with others_asleep(world):
        if world.rank == 0:
            results = in_turns(unit, task, plan.seconds, round_number)
    return results


def main(plan: Plan) -> None:
    """All rounds of all models. Every rank must call it."""
    torch.set_num_threads(1)
    # The Trainer does this for its process, and it cannot be undone: so all sides have it from the start.
    keep_freed_memory()
    world = MPI.COMM_WORLD.Dup()
    if world.rank == 0:  # It may download.
        splits, description = open_splits(plan.data)
    world.Barrier()
    if world.rank != 0:
        splits, description = open_splits(plan.data)
    record = Record(plan, description) if world.rank == 0 else None
    for model in plan.models:
        task = Task(model, splits[0], plan.batch)
        for round_number in range(plan.rounds):
            for unit in rotated(units(model), round_number):
                if record is not None:
                    record.content["running"] = f"{model}, {unit[0].what}"
                    record.write()
                gc.collect()  # What the last side left behind is not to be freed on this one's time.
                neighbours = Neighbours(world)
                results = measure(unit, task, plan, world, round_number)
                others = neighbours.cores()
                if record is not None:
                    for key, result in results.items():
                        record.note(model, round_number, key, result, others)
    if record is not None:
        record.content["running"] = ""
        record.write()


if __name__ == "__main__":
    main(Plan(**json.loads(sys.argv[1])))
