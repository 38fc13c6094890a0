"""What of a vector an optimizer's step leaves alone: parameters that were frozen after the optimizer was wrapped.

torch skips a parameter without a gradient; one kernel over a vector would move it by momentum and weight decay.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from hvdvae.strategies.overlap import overlap, within


@contextmanager
def left_alone(inner: Optimizer, places: Sequence[slice], frozen: Sequence[slice]) -> Iterator[None]:
    """Inside, let the optimizer step; after, its parameters and state are as before where something is frozen. Local.

    places: what `inner` has of the parameter vector, one vector a group. frozen: of the parameter vector.
    """
    kept: list[tuple[Tensor, str, slice, Tensor]] = []
    with torch.no_grad():
        for group, place in zip(inner.param_groups, places, strict=True):
            vector = group["params"][0]
            for one in frozen:
                piece = within(overlap(one, place), place)
                if piece.stop <= piece.start:
                    continue
                kept.append((vector, "", piece, vector[piece].clone()))
                for key, value in inner.state.get(vector, {}).items():
                    if isinstance(value, Tensor) and value.dim() > 0 and value.shape == vector.shape:
                        kept.append((vector, key, piece, value[piece].clone()))
                # A state that begins with this step begins as that of a gradient of zero, without decay.
                vector[piece] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            for vector, key, piece, value in kept:
                (inner.state[vector][key] if key else vector)[piece] = value
