"""Variational autoencoders, and any PyTorch model with a loss, trained in parallel over Horovod and MPI.

    import hvdvae as hv

    optimizer = hv.DistributedOptimizer(optimizer, model, strategy="allreduce")

Importing needs neither MPI nor Horovod: they are started by a launcher's first `World` and by the strategy that uses
them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hvdvae.version import __version__

if TYPE_CHECKING:
    from hvdvae.strategies import DistributedOptimizer
    from hvdvae.trainer import Trainer
    from hvdvae.world import World

_HOME = {
    "DistributedOptimizer": "hvdvae.strategies",
    "Trainer": "hvdvae.trainer",
    "World": "hvdvae.world",
}

__all__ = ["DistributedOptimizer", "Trainer", "World", "__version__"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: the command line's --help needs no torch."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hvdvae' has no attribute {name!r}")
