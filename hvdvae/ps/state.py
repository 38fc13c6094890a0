"""An optimizer's state as a manifest and vectors, to be sent, put together or put back.

Shapes: vectors of the length of a group, or of the group's piece of a shard.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hvdvae.ps.shards import cut, pieces

Manifest = list[dict[str, Any]]
"""A group: names of its vectors, in order, under "vectors"; its numbers by name under "numbers"."""


def packed(optimizer: Optimizer, slices: list[slice] | None = None) -> tuple[Manifest, list[Tensor]]:
    """The state of an optimizer with one vector a group; with `slices`, of that part of each group. Views."""
    manifest: Manifest = []
    vectors: list[Tensor] = []
    for number, group in enumerate(optimizer.param_groups):
        vector = group["params"][0]
        names, numbers = [], {}
        for name, value in sorted(optimizer.state.get(vector, {}).items()):
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape == vector.shape:
                names.append(name)
                vectors.append(value if slices is None else value[slices[number]])
            else:
                numbers[name] = float(value) if isinstance(value, Tensor) else value
        manifest.append({"vectors": names, "numbers": numbers})
    return manifest, vectors


def unpacked(optimizer: Optimizer, manifest: Manifest, vectors: list[Tensor]) -> None:
    """Replace an optimizer's state by a packed one, whose vectors it keeps."""
    optimizer.state.clear()
    left = iter(vectors)
    for group, entry in zip(optimizer.param_groups, manifest, strict=True):
        vector = group["params"][0]
        state = {name: next(left) for name in entry["vectors"]}
        for name, value in entry["numbers"].items():
            state[name] = torch.tensor(value, dtype=torch.float32) if isinstance(value, float) else value
        if state:
            optimizer.state[vector] = state


def joined(groups: Sequence[slice], states: Sequence[tuple[Manifest, list[Tensor]]]) -> tuple[Manifest, list[Tensor]]:
    """The state of the whole vector from those of all servers, in order. `groups`: slices of the vector."""
    manifest, examples = states[0]
    lengths = [
        group.stop - group.start for group, entry in zip(groups, manifest, strict=True) for _ in entry["vectors"]
    ]
    whole = [torch.empty(length, dtype=like.dtype) for length, like in zip(lengths, examples, strict=True)]
    for shard, (_, vectors) in zip(cut(groups, len(states)), states, strict=True):
        parts, targets = iter(vectors), iter(whole)
        for group, entry, piece in zip(groups, manifest, pieces(groups, shard), strict=True):
            start = shard.start + piece.start - group.start
            for _ in entry["vectors"]:
                part = next(parts)
                next(targets)[start : start + part.numel()] = part
    return manifest, whole
