"""Whether ranks can train a model together: the same one on all, where each computes."""

import torch

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
