"""A rank of a cell: python -m benchmarks.study.job FOLDER, started by launch.py under mpirun.

    file of FOLDER     by                      holds
    order.json         the harness             what to measure (cells.order)
    rank-R.json        each rank that trains   processor, memory, bytes sent, what the contender counted
    rank-R.npy         each rank that trains   times of its steps (stopwatch.py)
    server-R.json      each rank that serves   processor, memory
    track.npz          rank 0                  looks at the model (loop.Track)
    meeting            DDP                     where its ranks find each other

All ranks must see the folder.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch

from benchmarks.study.contender import Contender
from benchmarks.study.loop import Budget, train
from benchmarks.study.own_model import model_of
from hvdvae.allocator import keep_freed_memory
from hvdvae.cli import assemble
from hvdvae.config import TrainConfig
from hvdvae.data import Loader, Source, Subset, mean_example, open_dataset
from hvdvae.disturbance import Disturbance, Jitter, Kill, Slow, Stop
from hvdvae.launcher import detect
from hvdvae.seeding import stream
from hvdvae.vae import VAE, set_output_bias
from hvdvae.world import World

KINDS = {kind.__name__.lower(): kind for kind in (Slow, Jitter, Stop, Kill)}


class Usage:
    """Of this process from now on."""

    def __init__(self) -> None:
        """Begin."""
        self._start = (time.perf_counter(), time.process_time(), _sent_bytes())

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        wall, processor, sent = self._start
        return {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - processor,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "sent_bytes": _sent_bytes() - sent,
            "network": os.stat("/proc/self/ns/net").st_ino if os.path.exists("/proc/self/ns/net") else 0,
        }


def main(folder: Path) -> None:
    """Measure one cell. Blocks; every rank must call it."""
    torch.set_num_threads(1)
    keep_freed_memory()
    order = json.loads((folder / "order.json").read_text())
    config = TrainConfig(**order["config"])
    number = detect(os.environ).rank
    usage = Usage()
    try:
        contender, model, source = _prepare(order, config, folder / "meeting")
    except SystemExit:  # It was a server's rank, and the workers have ended.
        (folder / f"server-{number}.json").write_text(json.dumps(usage.record()))
        raise
    examples = len(source)
    loader = _loader(order, config, source, contender)
    disturbance = Disturbance(
        [KINDS[trouble.pop("kind")](**trouble) for trouble in order["troubles"]], seed=config.seed, rank=contender.rank
    )
    every = order["snapshot_epochs"] * examples
    budget = Budget(order["epochs"] * examples, order["seconds"], every)
    usage = Usage()
    track, watch, counted = train(
        contender, model, assemble.objective(config), loader, disturbance, budget, config.seed
    )
    name = f"rank-{contender.rank}"
    np.save(folder / f"{name}.npy", watch.steps())
    # Parameters, for what an exchange moves; batch: the data may be too small for what was asked.
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "batch": loader.batch, "examples": examples}
    (folder / f"{name}.json").write_text(json.dumps({**usage.record(), **facts, "counted": counted}))
    if contender.rank == 0:
        np.savez(folder / "track.npz", examples=track.examples, seconds=track.seconds, weights=np.stack(track.weights))


def _prepare(order: dict[str, Any], config: TrainConfig, meeting: Path) -> tuple[Contender, VAE, Source]:
    source = open_dataset(order["data"], validation=config.validation).train
    peer = order["peer"]
    if peer is None:
        from benchmarks.study.contender_ours import Ours

        servers = config.servers * (1 + config.replicas) if config.strategy == "ps" else 0
        world = World.create(device=config.device, servers=servers)
        model = initial_model(config, source, world.device, order["build"])
        return Ours(config, model, world), model, source
    launch = detect(os.environ)
    cuda = torch.cuda.is_available() and config.device != "cpu"
    device = torch.device("cuda", launch.local_rank) if cuda else torch.device("cpu")
    model = initial_model(config, source, device, order["build"])
    optimizer = assemble.optimizer(config, model, World.alone(device=str(device)))
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = True  # Ours has one, too.
    if peer == "horovod":
        from benchmarks.study.contender_horovod import RawHorovod

        return RawHorovod(model, optimizer, order["hook"]), model, source
    from benchmarks.study.contender_ddp import Ddp

    ddp = Ddp(model, optimizer, order["hook"], meeting=meeting, rank=launch.rank, size=launch.size)
    return ddp, model, source


def initial_model(config: TrainConfig, source: Source, device: torch.device, build: str | None = None) -> VAE:
    """The same for every contender: it follows from seed and data."""
    model = model_of(build, config, source.shape, device)
    if config.likelihood == "bernoulli" and build is None:
        set_output_bias(model, mean_example(source))
    return model


def _loader(order: dict[str, Any], config: TrainConfig, source: Source, contender: Contender) -> Loader:
    rank, size, seed = contender.rank, contender.size, config.seed
    if order["shares"]:
        source, rank, size = share_of(source, order["shares"], rank, seed), 0, 1
        seed = stream(seed, contender.rank)
    return Loader(
        source,
        batch=config.batch_size,
        rank=rank,
        size=size,
        seed=seed,
        likelihood=config.likelihood,
        binarization=assemble.binarization(config, source),
        device=next(contender.model.parameters()).device,
    )


def share_of(source: Source, shares: list[float], rank: int, seed: int) -> Source:
    """The examples that a rank holds where ranks hold unequal parts: of one random order, piece after piece."""
    shuffled = np.random.default_rng(seed).permutation(len(source))
    ends = np.round(np.cumsum(shares) / np.sum(shares) * len(source)).astype(int)
    start = 0 if rank == 0 else ends[rank - 1]
    return Subset(source, np.sort(shuffled[start : ends[rank]]))


def _sent_bytes() -> int:
    return sum(counters.bytes_sent for counters in psutil.net_io_counters(pernic=True).values())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
