"""A batch: a tensor, or a tuple, list or mapping of tensors that share their first dimension, the examples."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

from torch import Tensor

from hvdvae.errors import DataError

Batch = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class Batches(Protocol):
    """Where examples come from; `data.Loader` is one."""

    @property
    def examples(self) -> int:
        """Examples of an epoch, all ranks."""

    def steps(self, start: int = 0) -> int:
        """Steps from position `start` (examples that all ranks together have seen in this epoch) to its end."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches from position `start` of an epoch; equally many on every rank."""

    def reshare(self, rank: int, size: int) -> None:
        """From the next epoch() on, this rank takes the share of `rank` of `size`. Called where a rank has died."""


def examples_of(batch: Batch) -> int:
    """How many examples a batch holds. Raises DataError where its tensors do not agree, or where it holds none."""
    if isinstance(batch, Tensor):
        return len(batch)
    lengths = {len(tensor) for tensor in _tensors(batch)}
    if len(lengths) != 1:
        raise DataError(f"a batch holds tensors of {sorted(lengths)} examples, expected the same number in each")
    return lengths.pop()


def chunks(batch: Batch, count: int) -> list[Batch]:
    """Cut a batch into at most `count` micro-batches, as torch.chunk does; views."""
    if isinstance(batch, Tensor):
        return list(batch.chunk(count)) if count > 1 else [batch]
    if count == 1:
        return [batch]
    parts = zip(*(tensor.chunk(count) for tensor in _tensors(batch)), strict=True)
    if isinstance(batch, Mapping):
        return [dict(zip(batch, part, strict=True)) for part in parts]
    if hasattr(batch, "_make"):  # A named tuple.
        return [batch._make(part) for part in parts]
    return [tuple(part) if isinstance(batch, tuple) else list(part) for part in parts]


def _tensors(batch: Batch) -> list[Tensor]:
    found: list[Any] = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    strange = [type(value).__name__ for value in found if not isinstance(value, Tensor)]
    if strange or not found:
        raise DataError(
            f"a batch is a {type(batch).__name__} with {strange[0] if strange else 'nothing'} in it, expected tensors"
        )
    return cast(list[Tensor], found)
