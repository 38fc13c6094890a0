"""`hvdvae memory`: whether a model fits, before a cluster is asked for."""

import sys

from hvdvae.cli import assemble
from hvdvae.cli.footprint import Footprint, footprints
from hvdvae.cli.options import MemoryOptions
from hvdvae.data import open_dataset
from hvdvae.errors import ConfigError
from hvdvae.parallel.mesh import Mesh

COLUMNS = (
    "parameters",
    "gradients",
    "optimizer",
    "average",
    "activations",
    "passing",
    "batches",
    "mapped",
    "start",
    "total",
)


def memory(options: MemoryOptions) -> int:
    """Print a row for each kind of rank. Returns the exit status; raises ConfigError."""
    from hvdvae.cli.parser import parse

    _, asked = parse(["train", *options.train])
    config = assemble.resolved(asked.config())
    if options.ranks < 1:
        raise ConfigError(f"--ranks is {options.ranks}, expected at least 1")
    shape = (
        tuple(options.shape)
        if options.shape
        else open_dataset(config.data, validation=config.validation, external_storage=config.external_storage).shape
    )
    mesh = assemble.mesh_of(config, options.ranks)
    sys.stdout.write(table(footprints(config, shape, mesh), mesh))
    return 0


def table(found: list[Footprint], mesh: Mesh) -> str:
    """Of all stages, in MB. Pure."""
    lines = [f"mesh {mesh}: {mesh.dp} x {mesh.pp * mesh.tp} ranks, MB (10^6 bytes) a rank"]
    lines.append(f"{'stage':<7}" + "".join(f"{column:>13}" for column in COLUMNS))
    for stage, one in enumerate(found):
        lines.append(f"{stage:<7}" + "".join(f"{getattr(one, column) / 1e6:>13,.1f}" for column in COLUMNS))
    lines += [
        "mapped: other ranks' vectors, where ranks share a host: resident in all of them, and there once",
        "start: before the first step, while the vector of parameters is made of the layers; not at the same time",
        "passing: what forward and backward need for a moment; batches: the examples of this step and the next",
        "total: besides Python and its libraries (about 300 MB), the data, and the holes that malloc leaves between",
        "activations in blocks of less than 32 MiB, which may be as much again as these",
    ]
    return "\n".join(lines) + "\n"
