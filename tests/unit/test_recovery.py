"""Who may come in while others train."""

import pytest

from hvdvae.errors import MisfitError
from hvdvae.recovery import _check_fits


def test_a_new_rank_that_is_not_as_those_that_train_says_in_what() -> None:
    theirs = {"batch_size": 10, "data_digest": "a1", "version of torch": "2.13.0"}
    _check_fits(dict(theirs), theirs)
    for key in theirs:
        with pytest.raises(MisfitError, match=f"{key} other, and those that train have {theirs[key]}"):
            _check_fits({**theirs, key: "other"}, theirs)
