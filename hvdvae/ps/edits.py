"""Weights that somebody else than the servers has changed between two steps: noticed, and, where it is announced, sent.

The servers hold the weights: what a worker writes into its own is lost with the next pull. A sum of the bits of each
block tells whether somebody has: one pass over the vector after a pull, which the forward pass reads next, and one
before a push.

Shapes: P parameters. An edit (P,) has the new values where they are new, and NaN elsewhere.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hvdvae.errors import ConfigError

BLOCK = 4096
"""Elements of which one sum is kept."""


class Untouched:
    """Of one worker's weights, as the last pull left them."""

    def __init__(self) -> None:
        """Nothing pulled yet."""
        self._sums: Tensor | None = None

    def note(self, weights: Tensor) -> None:
        """These weights are the servers', or what this worker has made of them itself. Local."""
        self._sums = _sums(weights)

    def check(self, weights: Tensor, places: Mapping[str, slice]) -> None:
        """Raises ConfigError naming parameters that have changed since `note`. Local."""
        if self._sums is None:
            return
        odd = torch.nonzero(_sums(weights) != self._sums).flatten().tolist()
        if not odd:
            return
        names = [
            name
            for name, place in places.items()
            if any(place.start < (block + 1) * BLOCK and block * BLOCK < place.stop for block in odd)
        ]
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ConfigError(
            f"weights were changed between two steps (among {shown}), and the parameter servers, which hold them, "
            "would not know: change them inside `with optimizer.editing():`, and the next push takes along what is new"
        )


def edit_of(before: Tensor, after: Tensor) -> Tensor | None:
    """What has changed, (P,); None for nothing. Pure."""
    changed = _bits(before) != _bits(after)
    return torch.where(changed, after, torch.nan) if bool(changed.any()) else None


def merged(first: Tensor | None, then: Tensor) -> Tensor:
    """Two edits as one. Pure."""
    return then if first is None else torch.where(then.isnan(), first, then)


def apply(edit: Tensor, weights: Tensor) -> None:
    """Overwrite what is new. Mutates `weights` (P,)."""
    torch.where(edit.isnan(), weights, edit, out=weights)


def _bits(vector: Tensor) -> Tensor:
    return vector.detach().view(torch.int32 if vector.element_size() == 4 else torch.int64)


def _sums(vector: Tensor) -> Tensor:
    """Of the bits of each block, modulo their word's size: no number is too large, and NaN equals itself."""
    bits = _bits(vector)
    whole = bits.numel() // BLOCK * BLOCK
    sums = bits[:whole].view(-1, BLOCK).sum(1, dtype=bits.dtype)
    return torch.cat([sums, bits[whole:].sum(dtype=bits.dtype).view(1)])
