"""One side of parallelism.py on one rank: trains on synthetic images for some seconds, and prints what it did (rank 0).

mpirun -n 2 python benchmarks/parallelism_rank.py '{"hidden": [2000, 2000], "batch_size": 64, "seconds": 3, ...}'
"""

import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if (
    __name__ == "__main__"
):  # A script's own folder is on the path; the modules beside it are a package of the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from hvdvae.cli import assemble
from hvdvae.config import TrainConfig
from hvdvae.parallel.stages import finish
from hvdvae.stepper import mixed_precision
from hvdvae.world import World

SHAPE = (1, 28, 28)
WARM_UP, ROUNDS = 5, 30


def main(order: dict[str, Any]) -> None:
    """Train, and print."""
    torch.set_num_threads(1)
    world = World.create(deadline=120)
    device = world.device
    independent = order.pop("independent", False)
    seconds = order.pop("seconds")
    if order.get("strategy") != "local":
        # On GPUs NCCL, which Horovod brings.
        order["engine"] = "mpi" if device.type == "cpu" else "horovod"
    config = TrainConfig(model="mlp", latent=[20], activation="relu", nll_samples=0, **order)
    mine = World.alone(device=str(device)) if independent else world
    groups = assemble.mesh(config, mine)
    model = assemble.model(config, SHAPE, device)
    parts, pipeline = assemble.split(config, model, groups) if groups is not None else (None, None)
    replicas = mine if groups is None else groups.replicas
    optimizer = assemble.distributed(config, model, replicas, parts)
    objective = assemble.objective(config)
    batch = torch.rand(config.batch_size * config.accumulate, *SHAPE, device=device)
    arithmetic = mixed_precision(config.precision, device)

    def step() -> None:
        optimizer.zero_grad()
        if pipeline is not None:
            pipeline.run(batch, 0.0, config.accumulate, arithmetic)
        else:
            for micro in batch.chunk(config.accumulate):
                with arithmetic:
                    loss = objective(model, micro, 0.0)["loss"]
                loss.backward()
        optimizer.step()

    for _ in range(WARM_UP):
        step()
    if pipeline is not None:
        pipeline.forget()
    finish(device)
    sums = Sums(groups.layers if groups is not None and groups.mesh.tp > 1 else mine)
    world.barrier()
    begin = time.perf_counter()
    steps = 0
    for steps in itertools.count(1):
        step()
        # Rank 0's clock is everybody's: all take as many steps.
        over = torch.tensor([float(time.perf_counter() - begin > seconds)])
        if steps % 5 == 0 and float((world.broadcast_(over) if not independent else over)[0]):
            break
    finish(device)
    took = time.perf_counter() - begin
    state = sum(value.nbytes for entries in optimizer.inner.state.values() for value in entries.values() if value.dim())
    found = {
        "rate": steps * len(batch) / took,
        "waited": sums.seconds / took,
        "parameters": optimizer.results().get("weight_bytes", optimizer.flat.parameters.nbytes),
        "state": state,
    }
    nbytes, alone = sums.of_a_step(steps)
    rows = world.gather_objects(found)
    staged = pipeline.results() if pipeline is not None else None
    if world.is_first:
        copies = world.size if independent else replicas.size
        total = sum(row["rate"] for row in rows) / len(rows) * copies
        most = {key: max(row[key] for row in rows) for key in ("parameters", "state")}
        counted = {"sum_bytes": nbytes, "sum_seconds": alone}
        waited = sum(row["waited"] for row in rows) / len(rows)
        print(json.dumps({**most, "rate": total, "waited": waited, "pipeline": staged, **counted}))
    world.close()


class Sums:
    """Looks on as layers are summed over the ranks that share them."""

    def __init__(self, layers: World) -> None:
        """Mutates `layers`, which tells from now on."""
        self.seconds = 0.0
        """In sums so far."""
        self._sizes: list[int] = []
        self._world, self._sum = layers, layers.sum_
        layers.sum_ = self._noted  # type: ignore[method-assign]

    def _noted(self, tensor: torch.Tensor, what: str = "sum") -> torch.Tensor:
        finish(tensor.device)
        begin = time.perf_counter()
        try:
            return self._sum(tensor, what)
        finally:
            self.seconds += time.perf_counter() - begin
            self._sizes.append(tensor.numel())

    def of_a_step(self, steps: int) -> tuple[int, float]:
        """Bytes that each of so many steps has summed, and seconds that this takes where nothing else is done.

        Blocks; every rank must call it.
        """
        vectors = [torch.zeros(size, device=self._world.device) for size in self._sizes[: len(self._sizes) // steps]]
        times = []
        for _ in range(ROUNDS):
            self._world.barrier()
            begin = time.perf_counter()
            for vector in vectors:
                self._sum(vector)
            times.append(time.perf_counter() - begin)
        return sum(vector.nbytes for vector in vectors), statistics.median(times)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
