"""Parts of a model as a whole checkpoint, and a whole one as parts.

Checkpoints hold the whole model whatever the mesh was, so that they load on any other, and on one rank.

Tensors are named as in resume.py: model/NAME, ema/NAME, optimizer/NUMBER/ENTRY, buffers (rows, F).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hvdvae.dtypes import DTYPES
from hvdvae.errors import CheckpointError
from hvdvae.parallel.parts import Cut, Parts
from hvdvae.world.collectives import slice_of

Tensors = dict[str, Tensor]
Record = dict[str, Any]


class _Key(NamedTuple):
    """A tensor's name in parts: optimizer/3/exp_avg of the third parameter, `w`, is ("optimizer", "w", "exp_avg")."""

    kind: str
    name: str
    entry: str

    @classmethod
    def of(cls, key: str, names: Mapping[int, str]) -> "_Key":
        kind, _, rest = key.partition("/")
        if kind != "optimizer":
            return cls(kind, rest, "")
        number, _, entry = rest.partition("/")
        return cls(kind, names.get(int(number), ""), entry)

    def written(self, numbers: Mapping[str, int]) -> str:
        if self.kind == "optimizer":
            return f"optimizer/{numbers[self.name]}/{self.entry}"
        return f"{self.kind}/{self.name}" if self.name else self.kind


def merge(
    parts: Parts, tensors: Mapping[str, Tensor], record: Record, numbered: Mapping[int, str], model: nn.Module
) -> tuple[Tensors, Record]:
    """The whole of all ranks' parts, on the first rank of a model; on the others the tensors are none.

    `numbered`: names of parameters, by their number in this rank's optimizer. Blocks; every rank of the model must call
    it; a tensor at a time is whole on all.
    """
    group, numbers = parts.groups.model, parts.numbers(numbered)
    mine = {_Key.of(key, numbered): tensor for key, tensor in tensors.items() if key != "buffers"}
    forms = {key.written(numbers): _form(key, tensor, parts) for key, tensor in mine.items()}
    scalars = {str(numbers[numbered[int(number)]]): found for number, found in record["optimizer_scalars"].items()}
    everyone = group.gather_objects([forms, record["names"], scalars], "parts of a checkpoint")
    here = {key.written(numbers): tensor for key, tensor in mine.items()}
    merged: Tensors = {}
    # Sorted: a resumed optimizer holds its entries in an order that differs from process to process.
    for key in sorted({key for forms, *_ in everyone for key in forms}):
        holders = [rank for rank, (forms, *_) in enumerate(everyone) if key in forms]
        shape, dtype, dim = everyone[holders[0]][0][key]
        whole = _gathered(parts, here.get(key), holders[0], shape, DTYPES[dtype], dim)
        if group.is_first:
            merged[key] = whole
    merged["buffers"] = _merged_buffers(parts, tensors["buffers"], model)
    if parts.groups.stages.size > 1:
        names = {name for _, names, _ in everyone for name in names}
        record = {
            **record,
            "names": [name for name in parts.whole.parameters if name in names],
            "optimizer_groups": _groups(record, len(parts.whole.parameters)),
            "optimizer_scalars": {number: found for *_, scalars in everyone for number, found in scalars.items()},
        }
    return merged, record


def cut(
    parts: Parts, tensors: Mapping[str, Tensor], record: Record, numbered: Mapping[int, str], model: nn.Module
) -> tuple[Tensors, Record]:
    """This rank's part of a whole checkpoint, views. Local.

    `numbered` as in `merge`. Raises CheckpointError where a shape is another model's.
    """
    state, mine = model.state_dict(), dict(model.named_parameters())
    names = {whole: name for name, whole in parts.numbers(numbered).items()}
    own = {name: number for number, name in numbered.items()}
    found: Tensors = {}
    for written, tensor in tensors.items():
        key = _Key.of(written, names)
        if key.kind in ("model", "ema", "optimizer") and key.name not in state:
            continue
        piece = _cut_of(key, tensor, parts)
        if piece is not None and list(tensor.shape) != piece.whole_shape(mine[key.name]):
            raise CheckpointError(
                f"the checkpoint's {written} is {tuple(tensor.shape)}, here it is "
                f"{tuple(piece.whole_shape(mine[key.name]))}: build the model with the --model, --hidden, --latent it "
                "was saved with"
            )
        found[key.written(own)] = tensor if piece is None else piece.of_whole(tensor)
    if parts.groups.stages.size == 1:
        return found, record
    if tensors["buffers"].shape[1] == sum(parts.whole.buffers.values()):
        found["buffers"] = tensors["buffers"][:, parts.columns(state)]
    scalars = record["optimizer_scalars"].items()
    return found, {
        **record,
        "names": [name for name in record["names"] if name in mine],
        "optimizer_groups": _groups(record, len(mine)),
        "optimizer_scalars": {str(own[names[int(n)]]): entries for n, entries in scalars if int(n) in names},
    }


def _groups(record: Record, count: int) -> list[dict[str, Any]]:
    """The optimizer's one group, of so many parameters."""
    return [{**record["optimizer_groups"][0], "params": [*range(count)]}]


def _cut_of(key: _Key, tensor: Tensor, parts: Parts) -> Cut | None:
    # Counters (Adam's step) are one number a parameter, the same on all ranks.
    return parts.cuts.get(key.name) if tensor.dim() > 0 else None


def _form(key: _Key, tensor: Tensor, parts: Parts) -> tuple[list[int], str, int | None]:
    """Shape in the whole, dtype, and the dimension that is cut."""
    piece = _cut_of(key, tensor, parts)
    if piece is None:
        return list(tensor.shape), str(tensor.dtype), None
    return piece.whole_shape(tensor), str(tensor.dtype), piece.dim


def _gathered(
    parts: Parts, mine: Tensor | None, root: int, shape: list[int], dtype: torch.dtype, dim: int | None
) -> Tensor:
    group = parts.groups.model
    if dim is None:
        whole = mine.detach().cpu().contiguous() if mine is not None else torch.empty(shape, dtype=dtype)
        if root > 0:
            # As bytes: whatever the dtype.
            group.broadcast_(whole.reshape(-1).view(torch.uint8), root, "gather of a part")
        return whole
    whole = torch.zeros(shape, dtype=dtype)
    if mine is not None:
        place = slice_of(shape[dim], parts.groups.layers.rank, parts.groups.layers.size)
        whole.narrow(dim, place.start, place.stop - place.start).copy_(mine)
    return group.sum_(whole, "gather of a split parameter")


def _merged_buffers(parts: Parts, rows: Tensor, model: nn.Module) -> Tensor:
    if parts.groups.stages.size == 1:
        return rows
    whole = torch.zeros(len(rows), sum(parts.whole.buffers.values()))
    if parts.groups.layers.is_first:
        whole[:, parts.columns(name for name, _ in model.named_buffers())] = rows.cpu()
    return parts.groups.model.sum_(whole, "gather of buffers")
