"""Weights that somebody has changed by hand: noticed by sums of bits, and sent as what is new."""

import pytest
import torch

from hvdvae.errors import ConfigError
from hvdvae.ps.edits import BLOCK, Untouched, apply, edit_of, merged

PLACES = {"first": slice(0, BLOCK), "second": slice(BLOCK, BLOCK + 10), "last": slice(BLOCK + 10, 3 * BLOCK + 5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("place", "named"), [(7, "first"), (BLOCK + 11, "last"), (3 * BLOCK + 4, "last")])
def test_one_changed_element_is_noticed_and_its_parameter_named(dtype: torch.dtype, place: int, named: str) -> None:
    weights, untouched = torch.randn(3 * BLOCK + 5, dtype=dtype), Untouched()
    untouched.check(weights, PLACES)
    weights[0] = torch.nan
    untouched.note(weights)
    untouched.check(weights, PLACES)
    weights[place] = -weights[place]
    with pytest.raises(ConfigError, match=named):
        untouched.check(weights, PLACES)


def test_an_edit_takes_along_what_is_new_alone() -> None:
    before, servers = torch.randn(100), torch.randn(100)
    first, then = before.clone(), before.clone()
    first[3], first[4] = 1.0, 2.0
    edit = edit_of(before, first)
    assert edit is not None
    then[4] = 5.0
    again = edit_of(before, then)
    assert again is not None
    expected = servers.clone()
    expected[3], expected[4] = 1.0, 5.0
    apply(merged(merged(None, edit), again), servers)
    assert torch.equal(servers, expected)
    assert edit_of(before, before.clone()) is None
