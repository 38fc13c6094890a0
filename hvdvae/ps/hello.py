"""What ranks say of themselves when they meet, and the check that they fit together. Pure.

A hello is JSON: a server's has "version" and "plan", a worker's also its model's lengths, dtype, groups and layout, its
optimizer's class and options (learning rates aside, which every push has), its backward passes a step, and the norms at
which the servers clip and at which it does.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch.optim import Optimizer

from hvdvae.errors import WorldError
from hvdvae.flat import FlatModel
from hvdvae.ps.exchange import plain_options
from hvdvae.ps.plan import Plan
from hvdvae.version import __version__

Hello = dict[str, Any]


def server_hello(plan: Plan) -> Hello:
    """What a server says of itself."""
    return {"version": __version__, "plan": asdict(plan)}


def worker_hello(
    plan: Plan,
    flat: FlatModel,
    optimizer: Optimizer,
    *,
    passes: int,
    clip_norm: float | None,
    own_clip_norm: float | None,
) -> Hello:
    """What a worker says of itself. `optimizer`: the flat one. `clip_norm`: where the servers clip, None if not."""
    options = [
        {key: value for key, value in group.items() if key not in ("lr", "initial_lr")}
        for group in plain_options(optimizer)
    ]
    return {
        **server_hello(plan),
        "parameters": flat.parameters.numel(),
        "buffers": flat.buffers.numel(),
        "dtype": str(flat.parameters.dtype).removeprefix("torch."),
        "runs": flat.layout.runs.ends,
        "groups": [[part.start, part.stop] for part in flat.group_slices],
        "optimizer": type(optimizer).__name__,
        "options": options,
        "layout": flat.digest(),
        "backward_passes_per_step": passes,
        "clip_norm": clip_norm,
        "own_clip_norm": own_clip_norm,
    }


def check_hello(hellos: Sequence[Hello], workers: int) -> None:
    """Compare what all ranks say of themselves, workers first; all get the same list, so all raise alike.

    Raises WorldError naming the rank and what differs: version, options, model or optimizer.
    """
    for rank, hello in enumerate(hellos):
        for key in ("version", "plan") if rank >= workers else hellos[0].keys():
            if hello[key] != hellos[0][key]:
                mine, theirs = _shortened(hellos[0][key], hello[key])
                raise WorldError(
                    f"rank {rank} joins the parameter server with {key} {theirs}, rank 0 has {mine}: start all ranks "
                    "with the same program and options"
                )


def _shortened(first: Any, other: Any) -> tuple[Any, Any]:
    if isinstance(first, list) and isinstance(other, list) and len(first) == len(other):
        return next(
            (_shortened(*pair) for pair in zip(first, other, strict=True) if pair[0] != pair[1]), (first, other)
        )
    if isinstance(first, dict) and isinstance(other, dict):
        odd = [key for key in first if first[key] != other.get(key)]
        return {key: first[key] for key in odd}, {key: other.get(key) for key in odd}
    return first, other
