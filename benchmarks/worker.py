"""A process of a team: opens the data once, then measures what it is ordered to. Started by team_process.py.

    python -m benchmarks.worker TEAM '{"batch": 128, "data": null, "tune_peers": false}'

    order                                               answer
    {"model": M, "seconds": S, "round": R}              {"sides": {KEY: blocks.Result}, "others": cores}
    {"finish": true}                                    {"peaks": [bytes, one a rank]}

The first answer, without an order, tells that it is ready: the data and the memory that they take.
"""

import gc
import json
import resource
import sys
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from benchmarks.blocks import in_turns, together
from benchmarks.crew import Crew
from benchmarks.neighbours import Neighbours
from benchmarks.task import Task, open_splits
from benchmarks.teams import ALL, Team
from hvdvae.allocator import keep_freed_memory


def main(team: Team, batch: int, data: str | None, tune_peers: bool) -> None:
    """Serve until the input ends. Every rank must call it.

    `tune_peers`: settings that the Trainer makes for its process, this one gets too.
    """
    torch.set_num_threads(1)
    crew = _crew(team.ranks, as_trainer=team.joins_as_trainer or tune_peers)
    before = _resident()
    splits, description = open_splits(data)
    gc.collect()
    memory = {"data": sum(split.nbytes for split in splits), "before_data": before, "with_data": _resident()}
    crew.answer({"data": description, "memory": crew.gather(memory)})
    if tune_peers:
        keep_freed_memory()
    for order in crew.orders():
        if "finish" in order:
            crew.answer({"peaks": crew.gather(_peak())})
        else:
            crew.answer(_measure(team, crew, Task(order["model"], splits[0], batch), order))


def _measure(team: Team, crew: Crew, task: Task, order: dict[str, Any]) -> dict[str, Any]:
    gc.collect()  # What the last block left behind is not to be freed on this one's time.
    neighbours = Neighbours(crew)
    sides = team.sides_of(task.model)
    if team.ranks > 1:
        results = {sides[0].key: together(sides[0], task, order["seconds"], crew)}
    else:
        results = in_turns(sides, task, order["seconds"], order["round"])
    return {"sides": results, "others": neighbours.cores()}


def _crew(ranks: int, *, as_trainer: bool) -> Crew:
    if ranks == 1:
        return Crew()
    if as_trainer:
        from hvdvae import World

        World.create(device="cpu").close()
    from mpi4py import MPI

    return Crew(MPI.COMM_WORLD)


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(next(team for team in ALL if team.name == sys.argv[1]), **json.loads(sys.argv[2]))
