"""Whether ranks can train a model together: the same one on all, where each computes, and optimizers alike."""

import hashlib
import json
from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor
from torch.optim import Optimizer

from hvdvae.errors import ConfigError, WorldError
from hvdvae.flat import FlatModel
from hvdvae.world import World


def check_device(flat: FlatModel, world: World) -> None:
    """Raises ConfigError where the model is not where this rank computes, or of a dtype that cannot be summed."""
    found, where = flat.parameters.dtype, flat.parameters.device
    if world.size == 1:
        return
    if found not in (torch.float32, torch.float64):
        raise ConfigError(
            f"the model's parameters are {found}, expected float32 or float64: keep the weights so, and use autocast "
            "(--precision) to compute in less"
        )
    if where.type != world.device.type or (where.type == "cuda" and where.index != world.device.index):
        raise ConfigError(
            f"the model is on {where}, but rank {world.rank} was given {world.device}: move it with "
            "model.to(world.device) before the optimizer is built, or make the World with device='cpu'"
        )


def check_same_model(flat: FlatModel, world: World, ranks: Sequence[int]) -> None:
    """Raises WorldError where `ranks`, which train together, hold different models. Blocks; every rank must call it."""
    digests = world.gather_bytes(flat.digest().encode(), "comparison of models")
    if world.joins:
        return  # It meets the others later.
    odd = [rank for rank in ranks if digests[rank] != digests[ranks[0]]]
    if odd:
        what = "names, shapes or dtypes of parameters or buffers differ"
        if len(ranks) == world.size:  # Then all come here.
            lines = [[name, *entry] for name, *entry in flat.contents] + [["trained", name] for name in flat.names]
            layouts = [
                json.loads(found) for found in world.gather_bytes(json.dumps(lines).encode(), "comparison of models")
            ]
            what = _difference(layouts[0], layouts[odd[0]], odd[0])
        raise WorldError(
            f"ranks {odd} hold another model than rank {ranks[0]} ({what}): build the same model on every rank"
        )


def _difference(first: list[list[object]], other: list[list[object]], rank: int) -> str:
    """Where two layouts part."""
    pairs = zip_longest(first, other, fillvalue=["nothing"])
    mine, theirs = next((pair for pair in pairs if pair[0] != pair[1]), (["the same"], ["the same"]))
    return f"there rank {rank} has {' '.join(map(str, theirs))}, and rank 0 {' '.join(map(str, mine))}"


def summary(optimizer: Optimizer) -> str:
    """Class, options and what the state comes to, of a torch optimizer: what ranks must have alike. Local."""
    groups = [
        {key: _plain(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [
        {key: _plain(value) for key, value in sorted(optimizer.state.get(parameter, {}).items())} for parameter in order
    ]
    return repr([type(optimizer).__name__, groups, states])


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if not isinstance(value, Tensor):
        # Of what is no number or text, ranks may have another object of the same sort.
        return value if isinstance(value, bool | int | float | str | None) else type(value).__name__
    # In pieces: a copy of a large state would be twice as large.
    sums = [
        (float(wide.sum()), float(wide.square().sum())) for wide in map(torch.Tensor.double, _pieces(value.detach()))
    ]
    return tuple(value.shape), sums


def _pieces(value: Tensor) -> Sequence[Tensor]:
    reals = torch.view_as_real(value) if value.is_complex() else value
    return torch.split(reals.reshape(-1), 1 << 20)


def check_same_optimizer(mine: str, world: World, ranks: Sequence[int]) -> None:
    """Raises WorldError where summaries of `ranks` differ, which train together. Blocks; every rank must call it."""
    summaries = world.gather_bytes(hashlib.sha256(mine.encode()).digest(), "comparison of optimizers")
    if world.joins:
        return
    odd = [rank for rank in ranks if summaries[rank] != summaries[ranks[0]]]
    if odd:
        raise WorldError(
            f"ranks {odd} hold another optimizer than rank {ranks[0]} (its class, options or state differ): build it "
            "alike, and load the same state, on every rank"
        )
