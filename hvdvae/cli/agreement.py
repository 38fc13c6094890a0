"""One configuration and one data set for all ranks, however each was started and whatever disk it sees."""

import hashlib
from dataclasses import fields
from typing import Any

import numpy as np

from hvdvae.cli.asked import Asked
from hvdvae.config import TrainConfig, flag
from hvdvae.data import Dataset
from hvdvae.data.read import read
from hvdvae.data.source import Source
from hvdvae.errors import ConfigError, DataError
from hvdvae.world import World

DIGEST_EXAMPLES = 64
"""That stand for a source that is not in memory."""
_OF_A_RANK = ("device", "threads")
"""What ranks may be told differently: nodes need not be alike."""


def agreed_config(asked: Asked, world: World) -> TrainConfig:
    """Rank 0's configuration, on all ranks; --device and --threads are each rank's own.

    Blocks; every rank must call it. Raises ConfigError on all ranks where one was given another value.
    """
    everyone = world.gather_objects([asked.given, asked.values], "agreement on the configuration")
    first: dict[str, Any] = everyone[0][1]
    for field in fields(TrainConfig):
        key = field.name
        for rank, (given, _) in enumerate(everyone):
            if key not in _OF_A_RANK and given[key] not in (field.default, first[key]):
                raise ConfigError(
                    f"{flag(key)} is {given[key]} on rank {rank} and {first[key]} on rank 0, expected the same on all "
                    "ranks: start all with the same flags and the same --config"
                )
    devices = [values["device"] for _, values in everyone]
    kinds = world.gather_objects(world.device.type, "agreement on the device")
    for rank, kind in enumerate(kinds):
        # Asked for the same, nodes may differ; else the saved --device has not reached a rank that sees no folder.
        if kind != kinds[0] and devices[rank] != devices[0]:
            raise ConfigError(
                f"--device is {devices[rank]} ({kind}) on rank {rank} and {devices[0]} ({kinds[0]}) on rank 0, "
                f"expected one kind: give --device {devices[0]} on the command line"
            )
    return TrainConfig(**{**first, **{key: asked.values[key] for key in _OF_A_RANK}})


def check_same_data(dataset: Dataset, world: World) -> None:
    """Refuse splits that differ over ranks (DataError on all ranks). Blocks; every rank must call it."""
    mine = {
        split: {
            "examples": len(source),
            "shape": list(source.shape),
            "dtype": str(source.dtype),
            "peak": source.peak,
            "digest": digest(source),
        }
        for split, source in (("train", dataset.train), ("validation", dataset.validation), ("test", dataset.test))
    }
    everyone = world.gather_objects(mine, "comparison of the data")
    for rank, theirs in enumerate(everyone):
        for split, form in theirs.items():
            if form != everyone[0][split]:
                raise DataError(
                    f"{getattr(dataset, split).path}: the {split} split on rank {rank} has {_words(form)}, on rank 0 "
                    f"{_words(everyone[0][split])}; expected the same on all ranks: do all hosts see the same files?"
                )


def _words(form: dict[str, Any]) -> str:
    content = f"{form['examples']} examples of shape {tuple(form['shape'])}, {form['dtype']} up to {form['peak']}"
    return f"{content}, digest {form['digest']}"


def digest(source: Source) -> str:
    """Of all examples where they are in memory; else of DIGEST_EXAMPLES spread over all of them. Blocks while it reads.

    To read a file that is streamed could take longer than training on it: there a difference may go unseen.
    """
    if not len(source):
        return "none"
    sample = np.unique(np.linspace(0, len(source) - 1, DIGEST_EXAMPLES).astype(np.int64))
    found = hashlib.blake2b(digest_size=6)
    for examples in source.spans() if source.in_memory else [sample]:
        found.update(np.ascontiguousarray(read(source, examples)).data)
    return found.hexdigest()
