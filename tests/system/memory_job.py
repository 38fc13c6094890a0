"""A few steps of a model, and what they took: python memory_job.py OPTIONS OF TRAIN...

Every rank prints a line: what was predicted for it, and by how much its resident memory grew at most.
"""

import json
import resource
import sys

import psutil
import torch

from hvdvae.cli import assemble
from hvdvae.cli.footprint import footprints
from hvdvae.cli.parser import parse
from hvdvae.cli.server_footprint import of_job
from hvdvae.config import TrainConfig
from hvdvae.parallel.mesh import Mesh
from hvdvae.ps.serve import serve
from hvdvae.trainer import Trainer
from hvdvae.world import World

SHAPE, STEPS = (1, 28, 28), 3


class Noise:
    """Batches of random images."""

    def __init__(self, config: TrainConfig) -> None:
        self._batch = config.batch_size * config.accumulate
        self.examples = STEPS * self._batch

    def steps(self, start: int = 0) -> int:
        return STEPS

    def epoch(self, epoch: int, start: int = 0):  # type: ignore[no-untyped-def]
        for _ in range(STEPS):
            yield torch.rand(self._batch, *SHAPE)

    def reshare(self, rank: int, size: int) -> None:
        """Nobody dies."""


def main(words: list[str]) -> None:
    """Train, and print."""
    torch.set_num_threads(1)
    _, asked = parse(["train", *words])
    config: TrainConfig = assemble.resolved(asked.config())
    by_servers = config.strategy == "ps"
    world = World.create(device="cpu", deadline=60, servers=config.servers if by_servers else 0)
    # What the first steps of any model load.
    warm = torch.nn.Linear(4, 4)
    warm(torch.rand(2, 4)).sum().backward()
    torch.optim.Adam(warm.parameters(), fused=True).step()
    me = psutil.Process()
    before = me.memory_info()
    if world.role == "server":
        serve(world, assemble.plan(config))
        alone = footprints(config, SHAPE, Mesh(1))[0]
        server = of_job(config, alone, world.everyone.size - world.servers, one_host=True)["server"]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        sys.stdout.write("\n" + json.dumps([{"predicted": server.total, "grew": peak - before.rss}]) + "\n")
        world.close()
        return
    groups = assemble.mesh(config, world)
    model = assemble.model(config, SHAPE, torch.device("meta") if groups is not None else world.device)
    parts, pipeline = None, None
    if groups is not None:
        parts, pipeline = assemble.split(config, model, groups)
        assemble.fill_part(config, model, parts.cuts, None, world.device)
    optimizer = assemble.distributed(config, model, world if groups is None else groups.replicas, parts)
    options = {"pipeline": pipeline, "ema_decay": config.ema, "precision": config.precision}
    Trainer(model, optimizer, assemble.objective(config), Noise(config), **options).fit(1)
    if by_servers and world.is_first:
        with optimizer.fetched(state=True):  # As a checkpoint does.
            pass
    optimizer.finish()
    mesh = Mesh.of(1 if by_servers else world.size, mesh=config.mesh, pipeline=config.pipeline, tensor=config.tensor)
    predicted = footprints(config, SHAPE, mesh)[0 if by_servers else mesh.place(world.rank)[1]]
    if by_servers:
        predicted = of_job(config, predicted, world.size, one_host=True)["worker 0" if world.is_first else "worker"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"predicted": predicted.total, "grew": peak - before.rss}
    rows = world.gather_objects(found)
    if world.is_first:
        sys.stdout.write("\n" + json.dumps(rows) + "\n")
    world.close()


if __name__ == "__main__":
    main(sys.argv[1:])
