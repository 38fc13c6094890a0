"""The model of a cell: one of ours by its options, or what a function of the user's builds."""

import importlib
import os
import sys
from typing import Any

import torch

from benchmarks.study.located import StudyError
from hvdvae.cli import assemble
from hvdvae.config import TrainConfig
from hvdvae.seeding import seed_everything
from hvdvae.vae import VAE

_INITIAL_WEIGHTS = 2**32
"""No rank has this number, so no step draws the same noise."""


def model_of(build: str | None, config: TrainConfig, shape: tuple[int, ...], device: torch.device) -> VAE:
    """A model with initial weights that follow from the seed alone. Local. Raises StudyError naming `build`.

    `build`: package.module:function, called with the shape of an example, returns a hvdvae.vae.VAE; None: as `config`
    says.
    """
    if build is None:
        return assemble.model(config, shape, device)
    seed_everything(torch.device("cpu"), config.seed, _INITIAL_WEIGHTS)
    found = _function(build)(shape)
    if not isinstance(found, VAE):
        raise StudyError(
            f"model {build}: found a {type(found).__name__}, expected a hvdvae.vae.VAE, of networks of any kind: "
            "it is judged by its ELBO"
        )
    if found.shape != shape:
        raise StudyError(f"model {build}: it is of shape {found.shape}, the data's examples are {shape}")
    return found.to(device)


def _function(build: str) -> Any:
    module, _, name = build.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # Where the ranks look, too.
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise StudyError(
            f"model {build}: {error}: expected MODULE:FUNCTION, of a module in this folder or on PYTHONPATH"
        ) from None
