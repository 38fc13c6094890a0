"""The optimizer's options that workers push with: each push is applied with its worker's, one step with those of all.

A push carries its learning rates; the other options travel once, before the push that they begin with. Pure.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdvae.errors import ConfigError

Groups = list[dict[str, Any]]
TOLERANCE = 1e-6
"""Of a rate's size, that two of one step may differ."""


class PushedOptions:
    """As one server knows them."""

    def __init__(self) -> None:
        """Nobody has pushed."""
        self._of: dict[int, Groups] = {}

    def take(self, worker: int, groups: Groups) -> None:
        """Options of all groups of a worker, learning rates aside, from its next push on."""
        self._of[worker] = groups

    def of(self, worker: int) -> Groups | None:
        """The last ones; None before the first push."""
        return self._of.get(worker)

    def check_same(self, rates: Mapping[int, NDArray[np.float64]]) -> None:
        """Of workers whose pushes make one update. `rates`: the learning rates (groups,) of each push, by worker.

        Raises ConfigError naming the first option that differs.
        """
        first, *others = sorted(rates)
        for other in others:
            self._check_rates(first, other, rates[first], rates[other])
            for group, (mine, theirs) in enumerate(zip(self._of.get(first, ()), self._of.get(other, ()), strict=False)):
                for key in mine:
                    if mine[key] != theirs.get(key):
                        _refuse(key, group, first, mine[key], other, theirs.get(key))

    def _check_rates(self, first: int, other: int, mine: NDArray[np.float64], theirs: NDArray[np.float64]) -> None:
        for group, pair in enumerate(zip(mine.tolist(), theirs.tolist(), strict=True)):
            if abs(pair[0] - pair[1]) > TOLERANCE * max(map(abs, pair)):
                _refuse("lr", group, first, pair[0], other, pair[1])


def _refuse(key: str, group: int, first: int, mine: Any, other: int, theirs: Any) -> None:
    raise ConfigError(
        f"{key} of group {group} is {mine} on worker {first} and {theirs} on worker {other}: under bsp all gradients "
        "of a step make one update, which has one. A scheduler that follows a loss must get the same one on "
        "all workers, as scheduler.step(float(optimizer.world.sum_(torch.tensor([loss]))))"
    )
