"""`hvdvae memory`: whether a run fits, before a cluster is asked for."""

import sys
from collections.abc import Mapping, Sequence

from hvdvae.cli import assemble, host_memory
from hvdvae.cli.footprint import Footprint, footprints
from hvdvae.cli.host_memory import Room
from hvdvae.cli.options import MemoryOptions
from hvdvae.cli.server_footprint import of_job
from hvdvae.config import TrainConfig
from hvdvae.data import Dataset, open_dataset
from hvdvae.errors import ConfigError

LIBRARIES = 300e6
"""Bytes of Python and the libraries that a rank has loaded."""
COLUMNS = (
    "parameters",
    "gradients",
    "optimizer",
    "average",
    "strategy",
    "activations",
    "passing",
    "batches",
    "mapped",
    "start",
    "total",
)


def memory(options: MemoryOptions) -> int:
    """Print a row for each kind of rank, and whether it fits. Returns 0, or 1 where it does not; raises ConfigError."""
    from hvdvae.cli.parser import parse

    _, asked = parse(["train", *options.train])
    config: TrainConfig = assemble.resolved(asked.config())
    if options.ranks < 1:
        raise ConfigError(f"--ranks is {options.ranks}, expected at least 1")
    dataset = None if options.shape else _opened(config)
    shape = dataset.shape if dataset is not None else tuple(options.shape or ())
    servers = config.servers * (1 + config.replicas) if config.strategy == "ps" else 0
    per_host = min(options.ranks_per_host or options.ranks + servers, options.ranks + servers)
    mesh = assemble.mesh_of(config, 1 if servers else options.ranks)
    found = footprints(config, shape, mesh)
    if servers:
        assemble.plan(config).check(workers=options.ranks, servers=servers)
        one_host = per_host == options.ranks + servers
        kinds = of_job(config, found[0], options.ranks, one_host=one_host)
        counts = {"worker 0": 1, "worker": options.ranks - 1, "server": servers}
        rows = {f"{kind}, {number} ranks": kinds[kind] for kind, number in counts.items() if number}
        each = [kinds[kind] for kind, number in counts.items() for _ in range(number)]
        title = f"workers: {options.ranks}, servers: {servers}"
    else:
        rows = {f"stage {stage}, {mesh.dp * mesh.tp} ranks": one for stage, one in enumerate(found)}
        each = [found[mesh.place(rank)[1]] for rank in range(options.ranks)]
        title = f"mesh {mesh}: {mesh.dp} x {mesh.pp * mesh.tp} ranks"
    room = host_memory.given(options.host_memory) if options.host_memory else host_memory.of_host()
    gpu = host_memory.of_gpu() if config.device != "cpu" and not options.host_memory else None
    verdict, fits = fit(each, per_host, examples(dataset), room, gpu)
    sys.stdout.write(table(rows, title) + verdict)
    return 0 if fits else 1


def _opened(config: TrainConfig) -> Dataset:
    return open_dataset(config.data, validation=config.validation, external_storage=config.external_storage)


def examples(dataset: Dataset | None) -> int:
    """Bytes of a data set that each rank holds. Pure."""
    whole = None if dataset is None else dataset.whole
    return whole.nbytes if whole is not None and whole.in_memory else 0


def fit(each: Sequence[Footprint], per_host: int, data: int, room: Room, gpu: Room | None) -> tuple[str, bool]:
    """Lines that say whether all fits, and whether it does. Pure.

    each: of every rank, in order; hosts take them in this order. data: bytes of the examples. gpu: of one, where there
    is one: it holds what a rank computes with.
    """
    lines, fits = [], True
    largest = max(one.total for one in each)
    if gpu is not None:
        fits = largest <= gpu.bytes
        lines.append(f"a rank needs at most {_mb(largest)} MB of its GPU, and {_against(largest, gpu)}")
    own = LIBRARIES + data + (0 if gpu is not None else largest)
    lines.append(
        f"a rank needs at most {_mb(own)} MB of its host, with Python and its libraries ({_mb(LIBRARIES)} MB) and the "
        f"data ({_mb(data)} MB)"
    )
    hosts = [each[start : start + per_host] for start in range(0, len(each), per_host)]
    # What is mapped is another rank's, and there once.
    needs = [
        sum(LIBRARIES + data + (0 if gpu is not None else one.total - one.mapped) for one in ranks) for ranks in hosts
    ]
    fits = fits and max(needs) <= room.bytes
    ranks = f"{per_host} rank{'' if per_host == 1 else 's'}"
    lines.append(f"a host with {ranks} needs at most {_mb(max(needs))} MB, and {_against(max(needs), room)}")
    return "\n".join([*lines, "it fits" if fits else "it DOES NOT FIT"]) + "\n", fits


def _against(needed: float, room: Room) -> str:
    if room.bytes == float("inf"):
        return room.source
    return f"{_mb(room.bytes)} MB are there ({room.source}): {'fits' if needed <= room.bytes else 'DOES NOT FIT'}"


def _mb(count: float) -> str:
    return f"{count / 1e6:,.0f}"


def table(rows: Mapping[str, Footprint], title: str) -> str:
    """Of all kinds of ranks, in MB. Pure."""
    width = max(map(len, rows)) + 2
    lines = [f"{title}, MB (10^6 bytes) a rank"]
    lines.append(" " * width + "".join(f"{column:>13}" for column in COLUMNS))
    for name, one in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{getattr(one, column) / 1e6:>13,.1f}" for column in COLUMNS))
    lines += [
        "mapped: other ranks' vectors, where ranks share a host: resident in all of them, and there once",
        "start: before the first step, while the vector of parameters is made of the layers; not at the same time",
        "strategy: what it keeps between steps; passing: what forward and backward need for a moment; batches: the",
        "examples of this step and the next. Besides there are the holes that malloc leaves between activations in",
        "blocks of less than 32 MiB, which may be as much again as these",
    ]
    return "\n".join(lines) + "\n"
