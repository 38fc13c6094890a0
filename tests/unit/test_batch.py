"""Batches of several tensors: cut alike, and refused where they do not belong together."""

from typing import NamedTuple

import pytest
import torch

from hvdvae.batch import Batch, chunks, examples_of
from hvdvae.errors import DataError


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


X, Y = torch.arange(14.0).view(7, 2), torch.arange(7)


@pytest.mark.parametrize("batch", [X, (X, Y), [X, Y], Pair(X, Y), {"x": X, "y": Y}])
def test_micro_batches_cut_all_tensors_at_the_same_examples(batch: Batch) -> None:
    assert examples_of(batch) == 7
    assert chunks(batch, 1) == [batch] or chunks(batch, 1)[0] is batch
    parts = chunks(batch, 3)
    assert {type(part) for part in parts} == {type(batch)}
    assert [examples_of(part) for part in parts] == [3, 3, 1]
    if isinstance(batch, dict):
        assert torch.equal(torch.cat([part["x"] for part in parts]), X)  # type: ignore[index]
        assert all(torch.equal(part["x"][:, 0] / 2, part["y"]) for part in parts)  # type: ignore[index]
    elif not isinstance(batch, torch.Tensor):
        assert all(torch.equal(part[0][:, 0] / 2, part[1]) for part in parts)  # type: ignore[index]


@pytest.mark.parametrize(
    ("batch", "words"),
    [((X, Y[:5]), "[5, 7] examples"), ((X, 3), "int"), ((), "nothing"), ({"x": "name"}, "str")],
)
def test_what_is_no_batch_is_refused(batch: Batch, words: str) -> None:
    with pytest.raises(DataError) as raised:
        examples_of(batch)
    assert words in str(raised.value)
