"""Ranks as a grid: which hold the same part of the model and average it, which compute one model together.

    rank = (d * pp + p) * tp + t

    dp = 2, pp = 2, tp = 2:       stage 0   stage 1
        copy 0 of the model         0 1       2 3       0 1 share layers; 0 2, and 1 3, are pipelines
        copy 1                      4 5       6 7       0 4 hold the same part and average it, as do 1 5, 2 6, 3 7

t counts fastest: what meets twice a layer stands side by side, on one host where the launcher fills hosts in turn. d
counts slowest: copies meet once a step.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from hvdvae.errors import ConfigError
from hvdvae.world import World

AXES = ("dp", "pp", "tp")
"""Data-parallel copies of the model, stages of a pipeline, and slices of each layer."""


@dataclass(frozen=True)
class Mesh:
    """How many of each."""

    dp: int
    pp: int = 1
    tp: int = 1

    @classmethod
    def of(cls, size: int, *, mesh: str | None = None, pipeline: int = 1, tensor: int = 1) -> Self:
        """What `--mesh`, or `--pipeline` and `--tensor`, stand for with so many ranks. Pure.

        Raises ConfigError naming the flag, with the nearest that fit where the product is another.
        """
        if mesh is None:
            each = pipeline * tensor
            if size % each:
                asked = [f"--pipeline {pipeline}"] * (pipeline > 1) + [f"--tensor {tensor}"] * (tensor > 1)
                raise ConfigError(
                    f"{' '.join(asked)}: a model takes {each} ranks then, and {size} are no multiple of it; use "
                    f"{_or(_divisors(size))} ranks a model, or start {_or(_multiples(each, size))}"
                )
            return cls(size // each, pipeline, tensor)
        found = cls(**parse(mesh))
        for flag, given, said in (("--pipeline", pipeline, found.pp), ("--tensor", tensor, found.tp)):
            if given not in (1, said):
                raise ConfigError(f"{flag} {given} and --mesh {mesh} say different things: drop one")
        if found.size != size:
            raise ConfigError(
                f"--mesh {mesh} is of {found.size} ranks, but {size} train: use {_or(found.nearest(size))}, or start "
                f"{found.size}"
            )
        return found

    def nearest(self, size: int) -> list[str]:
        """Two meshes of so many ranks that differ least from this one. Pure."""
        every = [Mesh(size // (pp * tp), pp, tp) for pp in _divisors(size) for tp in _divisors(size // pp)]
        far = [abs(mesh.dp - self.dp) + 2 * abs(mesh.pp - self.pp) + 2 * abs(mesh.tp - self.tp) for mesh in every]
        return [str(mesh) for _, mesh in sorted(zip(far, every, strict=True), key=lambda pair: pair[0])[:2]]

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.dp * self.pp * self.tp

    def place(self, rank: int) -> tuple[int, int, int]:
        """(d, p, t) of a rank."""
        copy, piece = divmod(rank, self.pp * self.tp)
        return (copy, *divmod(piece, self.tp))

    def part(self, rank: int) -> str:
        """What a rank holds of the model, in words. Pure."""
        _, stage, piece = self.place(rank)
        named = [f"stage {stage}"] * (self.pp > 1) + [f"slice {piece}"] * (self.tp > 1)
        return ", ".join(named) or "the model"

    def holders(self) -> dict[str, list[int]]:
        """Ranks that hold each part of the model. Pure."""
        found: dict[str, list[int]] = {}
        for rank in range(self.size):
            found.setdefault(self.part(rank), []).append(rank)
        return found

    def groups(self, rank: int) -> tuple[int, int, int, int]:
        """Numbers of the part of the model that a rank holds, and of its copy, its pipeline and its layers. Pure."""
        copy, stage, piece = self.place(rank)
        return stage * self.tp + piece, copy, copy * self.tp + piece, copy * self.pp + stage

    def __str__(self) -> str:
        """As `--mesh` takes it."""
        return f"dp={self.dp},pp={self.pp},tp={self.tp}"


def parse(text: str) -> dict[str, int]:
    """dp=2,tp=2 -> {"dp": 2, "pp": 1, "tp": 2}; what is left out is 1. Pure. Raises ConfigError."""
    found = dict.fromkeys(AXES, 1)
    named = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d*)\s*", part)
        if match is None or match[1] not in AXES or match[1] in named:
            raise ConfigError(
                f"--mesh is {text!r}, found {part!r} in it, expected dp=..,pp=..,tp=.. with counts from 1"
            )
        named.append(match[1])
        found[match[1]] = int(match[2])
    return found


@dataclass
class Groups:
    """The Worlds of one rank of a mesh. They stay the same objects where ranks die and others go on (survival.py)."""

    mesh: Mesh
    whole: World
    """All ranks that train."""
    replicas: World
    """Those that hold the same part of the model."""
    model: World
    """Those that compute one model together, stage by stage."""
    stages: World
    """Those of a pipeline: a rank's number is its stage."""
    layers: World
    """Those that share layers."""

    @property
    def worlds(self) -> tuple[World, ...]:
        """All of them; after `whole` in the order of Mesh.groups."""
        return self.whole, self.replicas, self.model, self.stages, self.layers


def groups_of(mesh: Mesh, world: World) -> Groups:
    """Blocks; every rank of `world` must call it. Raises WorldError without MPI."""
    groups = Groups(mesh, world, *[world.part(number) for number in mesh.groups(world.rank)])
    for one in groups.worlds:
        one.kin = groups.worlds
    return groups


def places_of(found: Sequence[tuple[int, int]], parts: int) -> list[int]:
    """New ranks of those that are left, each of which holds (part, of which copy). Pure.

    Whole copies come first and stay together; the others are made of who else is there, in the order of ranks.
    """
    counts = Counter(copy for _, copy in found)
    order = sorted(range(len(found)), key=lambda rank: (counts[found[rank][1]] < parts, found[rank][1]))
    taken, places = Counter[int](), [0] * len(found)
    for rank in order:
        part = found[rank][0]
        places[rank] = taken[part] * parts + part
        taken[part] += 1
    return places


def _divisors(size: int) -> list[int]:
    return [number for number in range(1, size + 1) if size % number == 0]


def _multiples(number: int, near: int) -> list[int]:
    below = near // number * number
    return [count for count in (below, below + number) if count]


def _or(choices: list[int] | list[str]) -> str:
    return " or ".join(map(str, choices))
