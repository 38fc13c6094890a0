"""What workers and parameter servers keep in memory (--strategy ps), on top of what one process that trains does."""

from dataclasses import replace

from hvdvae.cli import assemble
from hvdvae.cli.footprint import ENTRIES, FLOAT, Footprint
from hvdvae.config import TrainConfig
from hvdvae.config_check import REMEMBERING


def of_job(config: TrainConfig, alone: Footprint, workers: int, *, one_host: bool) -> dict[str, Footprint]:
    """Of worker 0, the others, and a server. `alone`: of one process that trains (footprint.footprints). Pure."""
    count = alone.parameters // FLOAT
    return {
        "worker 0": worker_footprint(config, alone, count, saves=True),
        "worker": worker_footprint(config, alone, count, saves=False),
        "server": server_footprint(config, count, workers, one_host=one_host),
    }


def worker_footprint(config: TrainConfig, alone: Footprint, count: int, *, saves: bool) -> Footprint:
    """Of a worker. `alone`: of one process; `count`: parameters. Pure.

    `saves`: as worker 0, which has the servers' state meanwhile, and a copy of a part of it while that is laid out.
    """
    steps_itself = config.rule == "easgd" or config.push_every > 1 or (config.fetch_every or 1) > 1
    vectors = 0
    if steps_itself or config.prefetch or config.compression != "none":
        vectors += 2  # What is pushed, and what is pulled: not the model's own.
    if steps_itself or config.compression != "none":
        vectors += 1  # Its own weights, while it looks at the servers'.
    if config.compression in REMEMBERING:
        vectors += 5 if config.compression == "sign" else 2
    optimizer = alone.optimizer if saves or steps_itself else 0
    vectors += int(saves and optimizer > 0)
    return replace(alone, optimizer=optimizer, strategy=FLOAT * vectors * count)


def server_footprint(config: TrainConfig, count: int, workers: int, *, one_host: bool) -> Footprint:
    """Of one server, with its slice of `count` parameters. `one_host`: whether workers share memory with it. Pure."""
    slice_bytes = FLOAT * -(-count // config.servers)
    entries = ENTRIES[assemble.optimizer_name(config)] + (
        config.optimizer in ("sgd", "rmsprop") and config.momentum > 0
    )
    kept = int(config.consistency == "bsp" and workers > 1)
    if config.rule.startswith("dcasgd"):
        kept += workers + (3 if config.rule == "dcasgd-a" else 1)
    short = config.compression != "none"
    # By message: a buffer for the pushes of each worker; with a codec also what each has of the weights.
    kept += workers * (2 if short else 1) * (short or not one_host) + workers * config.replicas
    # In shared memory: two vectors of each worker, which are the worker's.
    mapped = 2 * workers * slice_bytes if one_host and not short else 0
    return Footprint(
        parameters=slice_bytes,
        gradients=0,
        optimizer=0 if config.rule == "easgd" else entries * slice_bytes,
        average=0,
        strategy=kept * slice_bytes,
        activations=0,
        passing=0,
        batches=0,
        mapped=mapped,
        start=0,
    )
