"""Whether ranks can train a model together: the same one on all, where each computes, and optimizers alike."""

import hashlib
from collections.abc import Sequence

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


def check_same_model(flat: FlatModel, world: World) -> None:
    """Raises WorldError, on all ranks, where they hold different models. Blocks; every rank must call it."""
    digests = world.gather_bytes(flat.digest().encode(), "comparison of models")
    odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if odd:
        raise WorldError(
            f"ranks {odd} hold another model than rank 0 (names, shapes or dtypes of parameters differ): build "
            "the same model on every rank"
        )


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


def check_same_optimizer(mine: str, world: World) -> None:
    """Raises WorldError, on all ranks, where their summaries differ. Blocks; every rank must call it."""
    summaries = world.gather_bytes(hashlib.sha256(mine.encode()).digest(), "comparison of optimizers")
    odd = [rank for rank, found in enumerate(summaries) if found != summaries[0]]
    if odd:
        raise WorldError(
            f"ranks {odd} hold another optimizer than rank 0 (its class, options or state differ): build it alike, and "
            "load the same state, on every rank"
        )
