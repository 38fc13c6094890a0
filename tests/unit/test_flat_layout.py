"""Where tensors stand in a vector: aligned, with zeros between that nobody sees."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvdvae.flat_layout import ALIGNED, Layout, Runs

counts = st.lists(st.lists(st.integers(0, 70), min_size=1, max_size=5), min_size=1, max_size=3)


@given(counts, st.sampled_from([2, 4, 8]))
def test_tensors_begin_at_multiples_of_64_bytes_and_keep_their_order(groups: list[list[int]], itemsize: int) -> None:
    layout = Layout(groups, itemsize)
    sizes = [count for group in groups for count in group]
    assert [place.stop - place.start for place in layout.places] == sizes
    assert all(place.start * itemsize % ALIGNED == 0 for place in layout.places)
    assert all(one.stop <= other.start for one, other in zip(layout.places, layout.places[1:], strict=False))
    assert [layout.groups[0].start, layout.groups[-1].stop] == [0, layout.length]
    assert all(one.stop == other.start for one, other in zip(layout.groups, layout.groups[1:], strict=False))
    assert layout.length * itemsize - sum(sizes) * itemsize < ALIGNED * max(len(sizes), 1)
    assert layout.runs.count == sum(sizes)


@given(counts, st.data())
def test_numbers_go_into_a_vector_and_out_again_and_gaps_stay(groups: list[list[int]], data: st.DataObject) -> None:
    layout = Layout(groups, 4)
    numbers = torch.arange(1.0, layout.runs.count + 1)
    vector = torch.full((layout.length,), -1.0)
    layout.runs.spread(numbers, vector)
    assert torch.equal(layout.runs.dense(vector), numbers)
    assert int((vector == -1).sum()) == layout.length - layout.runs.count
    start = data.draw(st.integers(0, layout.length))
    stop = data.draw(st.integers(start, layout.length))
    piece = layout.runs.within(slice(start, stop))
    expected = [number for number in vector[start:stop].tolist() if number != -1]
    assert (piece.length, piece.count) == (stop - start, len(expected))
    assert piece.dense(vector[start:stop]).tolist() == expected


def test_a_vector_without_gaps_is_not_copied() -> None:
    layout = Layout([[32, 16]], 4)
    vector = torch.arange(48.0)
    assert layout.runs.dense(vector) is vector
    layout.runs.spread(vector, vector)
    layout.runs.spread(2 * vector, vector)
    assert vector.tolist() == [2.0 * number for number in range(48)]
    assert layout.runs.ends == [[0, 48]]


@pytest.mark.parametrize("parts", [[], [slice(3, 3)]])
def test_nothing_is_nothing(parts: list[slice]) -> None:
    runs = Runs(parts, 4)
    assert runs.dense(torch.ones(4)).shape == (0,)
    runs.spread(torch.ones(0), torch.ones(4))
