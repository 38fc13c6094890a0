"""Ranks as a grid: which hold the same part of the model and average it, which compute one model together.

    rank = d * tp + t          dp = 2, tp = 2:     ranks 0 1   compute one model together (the same d)
                                                         2 3
                                                   ranks 0 2 hold the same part (the same t), as do 1 3

t counts fastest: what meets twice a layer stands side by side, on one host where the launcher fills hosts in turn.
"""

import re
from dataclasses import dataclass
from typing import Self

from hvdvae.errors import ConfigError
from hvdvae.world import World

AXES = ("dp", "tp")
"""Data-parallel copies, and slices of each layer."""


@dataclass(frozen=True)
class Mesh:
    """How many of each."""

    dp: int
    tp: int = 1

    @classmethod
    def of(cls, size: int, *, mesh: str | None = None, tensor: int = 1) -> Self:
        """What `--mesh` or `--tensor` stand for with so many ranks. Pure.

        Raises ConfigError naming the flag, with the nearest that fit where the product is another.
        """
        if mesh is None:
            if size % tensor:
                raise ConfigError(
                    f"--tensor {tensor} does not divide {size} ranks: use {_or(_divisors(size))}, or start "
                    f"{_or(_multiples(tensor, size))} ranks"
                )
            return cls(size // tensor, tensor)
        found = cls(**parse(mesh))
        if tensor not in (1, found.tp):
            raise ConfigError(f"--tensor {tensor} and --mesh {mesh} say different things: drop one")
        if found.size != size:
            fitting = [str(cls(size // tp, tp)) for tp in _nearest(_divisors(size), found.tp)]
            raise ConfigError(
                f"--mesh {mesh} is of {found.size} ranks, but {size} train: use {_or(fitting)}, or start {found.size}"
            )
        return found

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.dp * self.tp

    def place(self, rank: int) -> tuple[int, int]:
        """(d, t) of a rank."""
        return divmod(rank, self.tp)

    def __str__(self) -> str:
        """As `--mesh` takes it."""
        return f"dp={self.dp},tp={self.tp}"


def parse(text: str) -> dict[str, int]:
    """dp=2,tp=2 -> {"dp": 2, "tp": 2}; what is left out is 1. Pure. Raises ConfigError."""
    found = dict.fromkeys(AXES, 1)
    named = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d*)\s*", part)
        if match is None or match[1] not in AXES or match[1] in named:
            raise ConfigError(f"--mesh is {text!r}, found {part!r} in it, expected dp=..,tp=.. with counts from 1")
        named.append(match[1])
        found[match[1]] = int(match[2])
    return found


@dataclass(frozen=True)
class Groups:
    """The Worlds of one rank of a mesh."""

    mesh: Mesh
    whole: World
    """All ranks that train."""
    replicas: World
    """Those that hold the same part of the model."""
    model: World
    """Those that compute one model together."""


def groups_of(mesh: Mesh, world: World) -> Groups:
    """Blocks; every rank of `world` must call it. Raises WorldError without MPI."""
    copy, piece = mesh.place(world.rank)
    return Groups(mesh, world, world.part(piece), world.part(copy))


def _divisors(size: int) -> list[int]:
    return [number for number in range(1, size + 1) if size % number == 0]


def _nearest(choices: list[int], wanted: int) -> list[int]:
    return sorted(sorted(choices, key=lambda choice: abs(choice - wanted))[:2])


def _multiples(number: int, near: int) -> list[int]:
    below = near // number * number
    return [count for count in (below, below + number) if count]


def _or(choices: list[int] | list[str]) -> str:
    return " or ".join(map(str, choices))
