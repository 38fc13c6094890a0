"""The mean of a source, read by all ranks together."""

import numpy as np
import pytest
import torch

from hvdvae.data import ArraySource, mean_example
from hvdvae.data.source import Indices, Values


class Counted(ArraySource):
    """Knows how many examples were read."""

    read = 0

    def gather(self, indices: Indices) -> Values:
        self.read += len(indices)
        return super().gather(indices)


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_ranks_share_the_reading_and_get_the_mean_of_all(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("hvdvae.data.source.CHUNK_BYTES", 40)
    values = np.random.default_rng(0).integers(0, 256, (37, 10), dtype=np.uint8)
    values[0, 0] = 255
    sources = [Counted(values, "a") for _ in range(size)]
    for source in sources:
        source.peak = 255  # known: finding it is no part of the mean
    totals: list[torch.Tensor] = []

    def keep(total: torch.Tensor) -> torch.Tensor:
        totals.append(total.clone())
        return total

    for rank, source in enumerate(sources):
        mean_example(source, rank=rank, size=size, sum_over_ranks=keep)
    assert sum(source.read for source in sources) == 37
    assert max(source.read for source in sources) <= 4 * -(-10 // size), "ten chunks of four examples"

    def exchanged(total: torch.Tensor) -> torch.Tensor:
        return total.copy_(torch.stack(totals).sum(0))

    expected = torch.from_numpy((values.sum(axis=0, dtype=np.float64) / (37 * 255)).astype(np.float32))
    for rank, source in enumerate(sources):
        assert torch.equal(mean_example(source, rank=rank, size=size, sum_over_ranks=exchanged), expected)
