"""An optimizer's state, cut over servers and put together again, is what it was."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.optim import Adagrad, Adam, Optimizer, RMSprop

from hvdvae.ps.shards import cut, pieces
from hvdvae.ps.state import joined, packed, unpacked


def stepped(kind: type[Optimizer], sizes: list[int]) -> Optimizer:
    optimizer = kind([{"params": [nn.Parameter(torch.randn(size))]} for size in sizes])  # type: ignore[call-arg]
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.randn_like(group["params"][0])
    optimizer.step()
    return optimizer


def states(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [optimizer.state[group["params"][0]] for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", [Adam, Adagrad, RMSprop])
@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(1, 5))
def test_cut_and_joined(kind: type[Optimizer], sizes: list[int], servers: int) -> None:
    optimizer, fresh = stepped(kind, sizes), stepped(kind, sizes)
    groups = [slice(sum(sizes[:n]), sum(sizes[: n + 1])) for n in range(len(sizes))]
    manifest, vectors = packed(optimizer)
    parts: list[tuple[Any, list[Tensor]]] = []
    for shard in cut(groups, servers):
        found = []
        left = iter(vectors)
        for group, entry, piece in zip(groups, manifest, pieces(groups, shard), strict=True):
            start = shard.start + piece.start - group.start
            found += [next(left)[start : start + piece.stop - piece.start].clone() for _ in entry["vectors"]]
        parts.append((manifest, found))
    unpacked(fresh, *joined(groups, parts))
    for mine, theirs in zip(states(fresh), states(optimizer), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(torch.as_tensor(mine[name]), torch.as_tensor(value)), name
