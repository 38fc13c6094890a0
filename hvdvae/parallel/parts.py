"""A model of which each rank holds a part: which one, and what that means for its norm and its bits."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from hvdvae.errors import ConfigError, RankLost
from hvdvae.flat import FlatModel
from hvdvae.parallel.mesh import Groups
from hvdvae.world import World
from hvdvae.world.collectives import slice_of

if TYPE_CHECKING:
    from hvdvae.parallel.survival import Survival


@dataclass(frozen=True)
class Cut:
    """What a rank keeps of a tensor: `start` to `stop` along a dimension that is `length` long in the whole."""

    dim: int
    start: int
    stop: int
    length: int

    @classmethod
    def of(cls, dim: int, length: int, group: World) -> Self:
        """This rank's share."""
        mine = slice_of(length, group.rank, group.size)
        return cls(dim, mine.start, mine.stop, length)

    def of_whole(self, tensor: Tensor) -> Tensor:
        """The part, a view."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)

    def whole_shape(self, part: Sequence[int]) -> list[int]:
        """Of the whole, for a part's."""
        shape = list(part)
        shape[self.dim] = self.length
        return shape


@dataclass(frozen=True)
class Whole:
    """What the model holds before it is split."""

    parameters: list[str]
    """In the order in which the optimizer numbers them."""
    buffers: dict[str, int]
    """Float buffers, and how many numbers each is, in the order of the vector that they are in."""

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Of this one. Local."""
        buffers = {name: buffer.numel() for name, buffer in model.named_buffers() if buffer.dtype == torch.float32}
        return cls([name for name, _ in model.named_parameters()], buffers)


class Parts:
    """This rank's part of a model that several ranks hold together."""

    def __init__(self, groups: Groups, whole: Whole, cuts: Mapping[str, Cut]) -> None:
        """`cuts`: of what is smaller here, by name. Those that share layers hold all else alike."""
        self.groups, self.whole, self.cuts = groups, whole, dict(cuts)
        self.survival: Survival | None = None
        """Where whole copies of the model go on when a rank has died."""

    @property
    def speaks(self) -> bool:
        """Whether this rank tells the losses of those that compute one model together: one of the last stage."""
        return self.groups.stages.rank == self.groups.stages.size - 1 and self.groups.layers.is_first

    def check(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raises ConfigError for an optimizer whose numbers of parameters could not be told from a stage's."""
        if self.groups.stages.size > 1 and len(groups) > 1:
            raise ConfigError(
                f"the optimizer has {len(groups)} groups of parameters, and stages of a pipeline hold some of each: "
                "give it model.parameters() as one"
            )

    def own(self, flat: FlatModel) -> list[slice]:
        """Of the vectors, what no other rank of the model answers for: with the others', each parameter once."""
        is_first = self.groups.layers.is_first
        return [place for name, place in flat.places().items() if is_first or name in self.cuts]

    def total(self, value: float) -> float:
        """The sum over the ranks of a model. Blocks; every one must call it."""
        return float(self.groups.model.sum_(torch.tensor([value], dtype=torch.float64), "norm of the parts"))

    def commit(self) -> None:
        """Return on all ranks that live, or raise RankLost on all: no part goes a step further than the others.

        Blocks; every rank must call it.
        """
        if self.survival is not None:
            self.survival.commit("a step")

    def level(self, flat: FlatModel) -> None:
        """Give all that share layers the first's parameters where they are whole on each. Blocks; all must call it.

        What computes them sees the same numbers, but not at the same place of a vector: sums over replicas and fused
        kernels then differ in last digits, which would add up.
        """
        same = [flat.parameters[place] for name, place in flat.places().items() if name not in self.cuts]
        if self.groups.layers.size == 1 or not same:
            return
        # The step is taken already: whoever hears of a death here hears of it again in the next.
        with suppress(RankLost):
            # As bytes: whatever the dtype.
            message = torch.cat(same)
            self.groups.layers.broadcast_(message.view(torch.uint8), what="parameters that are not split")
            for vector, values in zip(same, torch.split(message, [len(vector) for vector in same]), strict=True):
                vector.copy_(values)

    def numbers(self, numbered: Mapping[int, str]) -> dict[str, int]:
        """Numbers of this rank's parameters in an optimizer of the whole model, by name.

        `numbered`: their names by their number in this rank's optimizer.
        """
        if self.groups.stages.size == 1:
            return {name: number for number, name in numbered.items()}
        mine = set(numbered.values())
        return {name: number for number, name in enumerate(self.whole.parameters) if name in mine}

    def columns(self, names: Iterable[str]) -> list[int]:
        """Where this rank's part of the float buffers of these names stands in the whole vector of them."""
        found, start, held = list[int](), 0, set(names)
        for name, length in self.whole.buffers.items():
            cut = self.cuts.get(name)
            mine = range(start + cut.start, start + cut.stop) if cut is not None else range(start, start + length)
            found += mine if name in held else ()
            start += length
        return found

    @property
    def splits_buffers(self) -> bool:
        """Whether a rank may hold less than all of the float buffers."""
        return self.groups.stages.size > 1 or not self.cuts.keys().isdisjoint(self.whole.buffers)
