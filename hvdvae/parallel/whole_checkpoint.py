"""Parts of a model as a whole checkpoint, and a whole one as parts, tensor by tensor.

Checkpoints hold the whole model whatever the mesh was, so that they load on any other, and on one rank.

Tensors are named as in resume.py: model/NAME, ema/NAME, optimizer/NUMBER/ENTRY, buffers (rows, F).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hvdvae.checkpoint import Draft, Piece, Source
from hvdvae.dtypes import DTYPES
from hvdvae.errors import CheckpointError
from hvdvae.parallel.parts import Cut, Parts
from hvdvae.world.collectives import slice_of

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


def merge(parts: Parts, draft: Draft, numbered: Mapping[int, str], model: nn.Module) -> Draft:
    """A draft of the whole model, of its ranks' drafts of their parts. A tensor at a time is whole, on all of them.

    `numbered`: names of parameters, by their number in this rank's optimizer. Blocks; every rank must call it. Other
    copies of the model than the first, which writes, get their own draft, named as the whole's.
    """
    group, numbers, record = parts.groups.model, parts.numbers(numbered), draft.record
    keys = {_Key.of(name, numbered): piece for name, piece in draft.pieces.items() if name != "buffers"}
    mine = {key.written(numbers): piece for key, piece in keys.items()}
    if not parts.groups.replicas.is_first:
        return Draft(mine, record)
    forms = {key.written(numbers): _form(key, piece, parts) for key, piece in keys.items()}
    scalars = {str(numbers[numbered[int(number)]]): found for number, found in record["optimizer_scalars"].items()}
    everyone = group.gather_objects([forms, record["names"], scalars], "parts of a checkpoint")
    whole: dict[str, Piece] = {}
    for rank, (held, *_) in reversed([*enumerate(everyone)]):  # The first that holds it is asked.
        for name, (shape, dtype, dim) in held.items():
            get = partial(_gathered, parts, mine.get(name), rank, shape, DTYPES[dtype], dim)
            whole[name] = Piece(tuple(shape), DTYPES[dtype], get)
    whole["buffers"] = _merged_buffers(parts, draft.pieces["buffers"], model)
    if parts.groups.stages.size > 1:
        names = {name for _, names, _ in everyone for name in names}
        record = {
            **record,
            "names": [name for name in parts.whole.parameters if name in names],
            "optimizer_groups": _groups(record, len(parts.whole.parameters)),
            "optimizer_scalars": {number: found for *_, scalars in everyone for number, found in scalars.items()},
        }
    return Draft(whole, record)


class PartOfCheckpoint:
    """What a rank's part of the model has of a whole checkpoint; a `Source`."""

    def __init__(self, parts: Parts, whole: Source, numbered: Mapping[int, str], model: nn.Module) -> None:
        """`numbered` as in `merge`. Local. Raises CheckpointError where a shape is another model's."""
        self._parts, self._whole = parts, whole
        self.name, self.record = whole.name, whole.record
        self._check(parts)
        state = model.state_dict()
        self._state, self._parameters = state, dict(model.named_parameters())
        self._names = {number: name for name, number in parts.numbers(numbered).items()}
        self._own = {name: number for number, name in numbered.items()}
        self.shapes = {}
        for written, shape in whole.shapes.items():
            key = _Key.of(written, self._names)
            if self._is_mine(key):
                self.shapes[key.written(self._own)] = self._shape(written, key, shape)
        if parts.groups.stages.size > 1:
            scalars = self.record["optimizer_scalars"].items()
            mine = {str(self._own[self._names[int(n)]]): found for n, found in scalars if int(n) in self._names}
            self.record = {
                **self.record,
                "names": [name for name in self.record["names"] if name in self._parameters],
                "optimizer_groups": _groups(self.record, len(self._parameters)),
                "optimizer_scalars": mine,
            }

    def _check(self, parts: Parts) -> None:
        """Raises CheckpointError on all ranks alike where it is another model's, or cannot be told apart by stages."""
        trained, expected = set(self.record["names"]), parts.whole.parameters
        saved = {name.removeprefix("model/") for name in self._whole.shapes if name.startswith("model/")}
        strange = [*(trained - set(expected)), *(name for name in expected if name not in saved)]
        if strange:
            raise CheckpointError(
                f"{self.name} holds another model ({', '.join(sorted(strange)[:3])} on one side only): build it with "
                "the --model, --hidden, --latent it was saved with"
            )
        groups = self.record["optimizer_groups"]
        if parts.groups.stages.size > 1 and len(groups) > 1:
            raise CheckpointError(
                f"{self.name} has {len(groups)} groups of parameters in its optimizer, and stages hold some of each: "
                "resume it with --pipeline 1"
            )

    def each(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """As Source's: views of whole tensors, one after the other."""
        for name, tensor in self._whole.each(kind):
            key = _Key.of(f"{kind}/{name}" if name else kind, self._names)
            if kind == "buffers" and self._parts.splits_buffers:
                if tensor.shape[1] == sum(self._parts.whole.buffers.values()):
                    yield name, tensor[:, self._parts.columns(self._state)]
            elif self._is_mine(key):
                piece = _cut_of(key, tensor.shape, self._parts)
                own = key.written(self._own).partition("/")[2]
                yield own, tensor if piece is None else piece.of_whole(tensor)

    def _is_mine(self, key: _Key) -> bool:
        return key.kind not in ("model", "ema", "optimizer") or key.name in self._state

    def _shape(self, written: str, key: _Key, whole: tuple[int, ...]) -> tuple[int, ...]:
        piece = _cut_of(key, whole, self._parts)
        if piece is None:
            return whole
        mine = self._state[key.name]
        if list(whole) != piece.whole_shape(mine.shape):
            raise CheckpointError(
                f"the checkpoint's {written} is {whole}, here it is {tuple(piece.whole_shape(mine.shape))}: build the "
                "model with the --model, --hidden, --latent it was saved with"
            )
        return tuple(mine.shape)


def _groups(record: Record, count: int) -> list[dict[str, Any]]:
    """The optimizer's one group, of so many parameters."""
    return [{**record["optimizer_groups"][0], "params": [*range(count)]}]


def _cut_of(key: _Key, shape: Sequence[int], parts: Parts) -> Cut | None:
    # Counters (Adam's step) are one number a parameter, the same on all ranks.
    return parts.cuts.get(key.name) if len(shape) > 0 else None


def _form(key: _Key, piece: Piece, parts: Parts) -> tuple[list[int], str, int | None]:
    """Shape in the whole, dtype, and the dimension that is cut."""
    cut = _cut_of(key, piece.shape, parts)
    if cut is None:
        return list(piece.shape), str(piece.dtype), None
    return cut.whole_shape(piece.shape), str(piece.dtype), cut.dim


def _gathered(
    parts: Parts, piece: Piece | None, root: int, shape: list[int], dtype: torch.dtype, dim: int | None
) -> Tensor:
    group = parts.groups.model
    mine = piece.get() if piece is not None else None
    if dim is None and root == 0:
        return mine if mine is not None else torch.empty(shape, dtype=dtype)
    # However long the first rank has been at writing the last one.
    group.barrier("gather of a part", patient=True)
    if dim is None:
        # A tensor of one's own where another's comes: `mine` may be what is trained.
        whole = torch.empty(shape, dtype=dtype)
        if group.rank == root and mine is not None:
            whole.copy_(mine)
        # As bytes: whatever the dtype.
        return group.broadcast_(whole.reshape(-1).view(torch.uint8), root, "gather of a part").view(dtype).view(shape)
    whole = torch.zeros(shape, dtype=dtype)
    if mine is not None:
        place = slice_of(shape[dim], parts.groups.layers.rank, parts.groups.layers.size)
        whole.narrow(dim, place.start, place.stop - place.start).copy_(mine)
    return group.sum_(whole, "gather of a split parameter")


def _merged_buffers(parts: Parts, mine: Piece, model: nn.Module) -> Piece:
    if not parts.splits_buffers:
        return mine
    shape = (mine.shape[0], sum(parts.whole.buffers.values()))

    def get() -> Tensor:
        whole = torch.zeros(shape)
        parts.groups.model.barrier("gather of buffers", patient=True)
        held = {name: buffer.numel() for name, buffer in model.named_buffers() if buffer.dtype == torch.float32}
        for name, values in zip(held, torch.split(mine.get().cpu(), [*held.values()], dim=1), strict=True):
            # What all that share layers hold alike, the first tells.
            if parts.groups.layers.is_first or name in parts.cuts:
                whole[:, parts.columns([name])] = values
        return parts.groups.model.sum_(whole, "gather of buffers")

    return Piece(shape, torch.float32, get)
