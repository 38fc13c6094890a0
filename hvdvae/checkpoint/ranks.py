"""A checkpoint that one rank has, on all ranks, tensor by tensor."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvdvae.checkpoint.file import opened, opened_again
from hvdvae.checkpoint.pieces import Checkpoint, kind_of
from hvdvae.dtypes import DTYPES
from hvdvae.world import World


class Spread:
    """Rank 0's file, on every rank; a `Source`."""

    def __init__(
        self, path: Path | None, world: World, name: str, record: dict[str, Any], digest: str, forms: list[Any]
    ) -> None:
        """`path`: on rank 0. `forms`: name, shape and dtype of every tensor."""
        self._path, self._world = path, world
        self.name, self.record, self._digest = name, record, digest
        self.shapes = {name: tuple(shape) for name, shape, _ in forms}
        self._dtypes = {name: DTYPES[dtype] for name, _, dtype in forms}

    def each(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """As Source's. Raises CheckpointError on rank 0 where the file has changed meanwhile."""
        names = [name for name in self.shapes if kind_of(name) == kind]
        if self._path is not None:
            with opened_again(self._path, self._digest) as file:
                for name in names:
                    yield name.partition("/")[2], self._sent(name, file.read(name))
        else:
            for name in names:
                room = torch.empty(self.shapes[name], dtype=self._dtypes[name])
                yield name.partition("/")[2], self._sent(name, room)

    def _sent(self, name: str, tensor: Tensor) -> Tensor:
        # As bytes: whatever the dtype.
        self._world.broadcast_(tensor.reshape(-1).view(torch.uint8), what=f"broadcast of a checkpoint's {name}")
        return tensor


def spread(path: Path | None, world: World) -> Spread | None:
    """Rank 0's checkpoint (None: there is none), so that only rank 0 needs to see the file.

    Blocks; every rank must call it. Raises CheckpointError on rank 0, as `load`.
    """
    mine: list[Any] = []
    if world.is_first and path is not None:
        with opened(path) as file:
            forms = [(name, shape, str(file.dtypes[name])) for name, shape in file.shapes.items()]
            mine = [str(path), file.record, file.digest, forms]
    # However long it takes to read it.
    world.barrier("rank 0 reads a checkpoint", patient=True)
    told = world.gather_objects(mine, "forms of a checkpoint")[0]
    return Spread(path if world.is_first else None, world, *told) if told else None


def shared(checkpoint: Checkpoint | None, root: int, world: World) -> Checkpoint:
    """Root's checkpoint, on all ranks, without a file. Blocks; every rank must call it; the others give None."""
    mine = b""
    if checkpoint is not None:
        forms = [(name, list(t.shape), str(t.dtype)) for name, t in checkpoint.tensors.items()]
        mine = json.dumps([forms, checkpoint.record]).encode()
    forms, record = json.loads(world.gather_bytes(mine, "form of a rank's state")[root])
    tensors = {}
    for name, shape, dtype in forms:
        own = checkpoint.tensors[name] if checkpoint is not None else torch.empty(shape, dtype=DTYPES[dtype])
        data = own.detach().cpu().contiguous()
        # As bytes: whatever the dtype.
        world.broadcast_(data.reshape(-1).view(torch.uint8), root, "broadcast of a rank's state")
        tensors[name] = data
    return Checkpoint(tensors, record, f"the state of rank {root}")
