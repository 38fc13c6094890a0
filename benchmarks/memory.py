"""Memory of a rank that trains: before the data, with it, and at its peak. Started by throughput.py.

In processes of its own, where no other side has left its traces.
"""

import gc
import json
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from benchmarks.sides_trainer import train
from benchmarks.task import Task, open_splits
from hvdvae import World

STEPS = 50


@dataclass(frozen=True)
class Footprint:
    """One rank, in bytes."""

    rank: int
    data: int
    """All splits as uint8."""
    before_data: int
    """Resident with all libraries loaded."""
    with_data: int
    """Resident once the data are open."""
    training: int
    """Resident after some steps."""
    peak: int
    """Most that was ever resident, reading the files included."""


def footprint(world: World, *, engine: str, model: str, batch: int, data: str | None) -> Footprint:
    """Open the data and train a little. Blocks; every rank must call it."""
    before = _resident()
    splits, _ = open_splits(data)
    gc.collect()
    opened = _resident()
    run = train(Task(model, splits[0], batch), world, strategy="allreduce", engine=engine)
    run(STEPS)
    return Footprint(
        rank=world.rank,
        data=sum(split.nbytes for split in splits),
        before_data=before,
        with_data=opened,
        training=_resident(),
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def main(plan: dict[str, Any]) -> None:
    """Write the footprints of all ranks to plan["result"]. Every rank must call it."""
    torch.set_num_threads(1)
    world = World.create(device="cpu", deadline=60.0)
    result = Path(plan.pop("result"))
    everyone = world.gather_objects(asdict(footprint(world, **plan)))
    if world.is_first:
        result.write_text(json.dumps(everyone))
    world.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
