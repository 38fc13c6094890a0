"""Options of ranks that step together are the same: compared now and then, and named where they differ.

A scheduler that follows a rank's own loss (ReduceLROnPlateau) lets rates drift apart. Where each rank steps a slice of
the vector, halves of it would then step at different rates; elsewhere weights would part. What differs is found after
EVERY steps at the latest: one small sum, where ranks have just met for the gradient.

Shapes: D options of all groups, N ranks.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdvae.errors import ConfigError
from hvdvae.world import World

EVERY = 16
"""Steps between two comparisons; the first ones come sooner, after 1, 2, 4 and 8."""
TOLERANCE = 1e-6
"""Of a number's size: an optimizer may follow the gradient with an option (Prodigy's d), and processors round."""
_WITHOUT_EFFECT = ("fused", "foreach")

Groups = list[dict[str, Any]]


class EqualOptions:
    """Of one strategy. `names`: options that are compared, those that an optimizer has by default."""

    def __init__(self, names: Iterable[str]) -> None:
        """Nothing compared yet."""
        self._names = sorted({"lr", *names} - {*_WITHOUT_EFFECT})
        self._steps = 0
        self._values: tuple[Any, ...] = ()
        self._digest = 0
        """Of these values; most steps have those of the step before."""

    def begin(self) -> None:
        """Count steps from zero, as after the ranks have met anew. Local."""
        self._steps = 0

    def due(self) -> bool:
        """Count a step; whether to compare after it, which is the same on all ranks. Local."""
        self._steps += 1
        return self._steps % EVERY == 0 or (self._steps < EVERY and self._steps & (self._steps - 1) == 0)

    def compare(
        self,
        groups: Groups,
        world: World,
        sum_: Callable[[Tensor], Tensor],
        *,
        ranks: list[int],
        steps: int = 0,
        frozen: Sequence[int] = (),
    ) -> None:
        """Blocks; each of `ranks`, those of `world` that step together, must call it. `sum_`: over them, in place.

        `steps`: that this rank has taken so far. `frozen`: numbers of parameters that a step leaves alone.
        Raises ConfigError on all of them where any of these differ.
        """
        values = (*(_plain(group.get(name)) for group in groups for name in self._names), tuple(frozen))
        if values != self._values:
            self._values, self._digest = values, zlib.crc32(repr([*map(_rounded, values)]).encode())
        found = _table([self._digest, steps], world, sum_)
        first = found[ranks[0]]
        if any(found[rank] != first for rank in ranks):
            table = _table([steps, *map(_number, values)], world, sum_)
            self._refuse([table[rank] for rank in ranks], ranks)

    def _refuse(self, rows: list[list[float]], ranks: list[int]) -> None:
        """Name what differs most to the left of these rows, one of each of `ranks`."""
        columns = [*zip(*rows, strict=True)]
        place = next((p for p, column in enumerate(columns) if not _are_close(column)), None)
        if place is None:
            return
        column = columns[place]
        other = next(number for number in range(len(ranks)) if not _are_close((column[0], column[number])))
        if place == 0:
            raise ConfigError(
                f"rank {ranks[other]} comes to the average of weights after {column[other]:.0f} steps, rank {ranks[0]} "
                f"after {column[0]:.0f}: give all ranks as many batches"
            )
        group, name = divmod(place - 1, len(self._names))
        is_option = place < len(columns) - 1
        what = f"{self._names[name]} of group {group}" if is_option else "what is frozen (requires_grad)"
        if _is_number(self._values[place - 1]):
            differ = f"{what} is {column[0]:.10g} on rank {ranks[0]} and {column[other]:.10g} on rank {ranks[other]}"
        else:
            differ = f"{what} is not the same on ranks {ranks[0]} and {ranks[other]}"
        raise ConfigError(
            f"{differ}: ranks that train together need the same options. A scheduler that follows a loss must get the "
            "same one on all ranks, as scheduler.step(float(optimizer.world.sum_(torch.tensor([loss]))))"
        )


def _table(mine: list[float], world: World, sum_: Callable[[Tensor], Tensor]) -> list[list[float]]:
    """Every rank's numbers, a row a rank. Blocks."""
    table = torch.zeros(world.size, len(mine), dtype=torch.float64)
    table[world.rank] = torch.tensor(mine, dtype=torch.float64)
    found: list[list[float]] = sum_(table).tolist()
    return found


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor | np.generic | np.ndarray) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: Any) -> float:
    """The value, or of what is no finite number a digest."""
    return float(value) if _is_number(value) else float(zlib.crc32(repr(value).encode()))


def _rounded(value: Any) -> Any:
    """Two that are close may still differ: then ranks look closer."""
    return f"{value:.6g}" if _is_number(value) else value


def _are_close(numbers: Sequence[float]) -> bool:
    return max(numbers) - min(numbers) <= TOLERANCE * max(map(abs, numbers))
