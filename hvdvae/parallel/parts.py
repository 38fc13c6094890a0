"""A model of which each rank holds a part: which one, and how parts become a whole checkpoint, and a whole one parts.

Checkpoints hold the whole model whatever the mesh was, so that they load on any other, and on one rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from hvdvae.errors import CheckpointError
from hvdvae.flat import FlatModel
from hvdvae.parallel.mesh import Groups
from hvdvae.world import World
from hvdvae.world.collectives import slice_of


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

    def whole_shape(self, part: Tensor) -> list[int]:
        """Of the whole, for a part's."""
        shape = list(part.shape)
        shape[self.dim] = self.length
        return shape


class Parts:
    """This rank's part of a model that several ranks hold together."""

    def __init__(self, groups: Groups, cuts: Mapping[str, Cut]) -> None:
        """`cuts`: of the parameters that are not whole here, by name. What is whole is equal on all ranks."""
        self.groups, self._cuts = groups, dict(cuts)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for those that compute one model together: one's loss is everybody's."""
        return self.groups.model.is_first

    def own(self, flat: FlatModel) -> list[slice]:
        """Of the vectors, what no other rank of the model answers for: with the others', each parameter once."""
        return [place for name, place in flat.places().items() if self.is_first or name in self._cuts]

    def total(self, value: float) -> float:
        """The sum over the ranks of a model. Blocks; every one must call it."""
        return float(self.groups.model.sum_(torch.tensor([value], dtype=torch.float64), "norm of the parts"))

    def level(self, flat: FlatModel) -> None:
        """Give all ranks of a model the first's parameters where they are whole on each. Blocks; all must call it.

        What computes them sees the same numbers, but not at the same place of a vector: sums over replicas and fused
        kernels then differ in last digits, which would add up.
        """
        same = [flat.parameters[place] for name, place in flat.places().items() if name not in self._cuts]
        if not same:
            return
        message = self.groups.model.broadcast_(torch.cat(same), what="parameters that are not split")
        for vector, values in zip(same, message.split([len(vector) for vector in same]), strict=True):
            vector.copy_(values)

    def merge(self, tensors: Mapping[str, Tensor], names: Mapping[int, str]) -> dict[str, Tensor]:
        """The whole of a snapshot's tensors (resume.py), on the first rank; on the others nothing.

        `names`: of parameters, by their number in the optimizer. Blocks; every rank of the model must call it; a tensor
        at a time is whole on all.
        """
        merged = {}
        # Sorted: a resumed optimizer holds its entries in an order that differs from process to process.
        for key, tensor in sorted(tensors.items()):
            cut = self._cut_of(key, tensor, names)
            if cut is not None:
                whole = torch.zeros(cut.whole_shape(tensor), dtype=tensor.dtype, device=tensor.device)
                cut.of_whole(whole).copy_(tensor)
                tensor = self.groups.model.sum_(whole, "gather of a split parameter")
            if self.is_first:
                merged[key] = tensor
        return merged

    def cut(self, tensors: Mapping[str, Tensor], names: Mapping[int, str], model: nn.Module) -> dict[str, Tensor]:
        """This rank's part of a whole checkpoint's tensors, views. Local.

        `names` as in `merge`. Raises CheckpointError where a shape is another model's.
        """
        mine = dict(model.named_parameters())
        found = {}
        for key, tensor in tensors.items():
            cut = self._cut_of(key, tensor, names)
            if cut is not None:
                whole = cut.whole_shape(mine[_parameter(key, names) or ""])
                if list(tensor.shape) != whole:
                    raise CheckpointError(
                        f"the checkpoint's {key} is {tuple(tensor.shape)}, here it is {tuple(whole)}: build the model "
                        "with the --model, --hidden, --latent it was saved with"
                    )
            found[key] = tensor if cut is None else cut.of_whole(tensor)
        return found

    def _cut_of(self, key: str, tensor: Tensor, names: Mapping[int, str]) -> Cut | None:
        # Counters (Adam's step) are one number a parameter, the same on all ranks.
        return self._cuts.get(_parameter(key, names) or "") if tensor.dim() > 0 else None


def _parameter(key: str, names: Mapping[int, str]) -> str | None:
    """Whose tensor it is: model/NAME, ema/NAME, optimizer/NUMBER/ENTRY."""
    kind, _, rest = key.partition("/")
    if kind in ("model", "ema"):
        return rest
    if kind == "optimizer":
        return names[int(rest.split("/")[0])]
    return None
