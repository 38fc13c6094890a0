"""Train, validation and test: what files call them, and how a missing one is cut from train.

A cut depends on nothing but the count of examples: not on rank, size or the run's seed.
"""

import re
from collections.abc import Sequence

import numpy as np

from hvdvae.data.source import Indices, Source, Subset
from hvdvae.errors import DataError

MAX_VALIDATION = 5000
HELD_OUT = 10
"""One example in so many is held out for a split that the data does not bring."""

_NAMES = {
    "train": re.compile(r"^(x_)?train(ing)?([_-](images|x))?$", re.IGNORECASE),
    "validation": re.compile(r"^(x_)?val(id(ation)?)?([_-](images|x))?$", re.IGNORECASE),
    "test": re.compile(r"^(x_)?(test|t10k)([_-](images|x))?$", re.IGNORECASE),
}
_LABELS = ("labels", "label", "targets", "target", "y")
"""What may stand beside the examples."""
_CUT_SEED = 20160301


def split_called(name: str) -> str | None:
    """The split that `name` means ("valid" is validation, "x_train" train, "t10k" test), or None."""
    return next((split for split, pattern in _NAMES.items() if pattern.match(name)), None)


def pick_splits(keys: Sequence[str], path: str) -> dict[str, str]:
    """Which key holds which split; a single key of any name, but for labels beside it, holds train.

    Raises DataError if that is not clear.
    """
    chosen: dict[str, str] = {}
    for key in keys:
        split = split_called(key)
        if split in chosen:
            raise DataError(f"{path}: found both {chosen[split]!r} and {key!r} for {split}; expected one: rename one")
        if split is not None:
            chosen[split] = key
    examples = [key for key in keys if key.lower() not in _LABELS] or keys
    if not chosen and len(examples) == 1:
        return {"train": examples[0]}
    if "train" not in chosen:
        found = ", ".join(sorted(keys)) or "nothing"
        raise DataError(
            f"{path}: found the keys {found}; expected train (and validation, test), or a single array: rename them"
        )
    return chosen


def complete_splits(splits: dict[str, Source], validation: int | None = None) -> tuple[Source, Source, Source]:
    """Train, validation and test, where a missing one is cut from train by a fixed permutation.

    A missing test takes one in HELD_OUT of train; a missing validation then takes `validation` examples, or
    one in HELD_OUT of what remains, at most MAX_VALIDATION. Copies no data. Raises DataError if too few
    examples remain.
    """
    train = splits["train"]
    test, held = splits.get("test"), splits.get("validation")
    count, missing = len(train), (test is None) + (held is None)
    if count <= missing:
        raise DataError(f"{train.path}: found {count} examples; expected more than {missing}, to hold some out")
    rows = _fixed_permutation(count)
    if test is None:
        cut = max(1, count // HELD_OUT)
        test, rows = _cut(train, rows[:cut]), rows[cut:]
    if held is None:
        cut = _validation_count(len(rows), validation, train.path)
        held, rows = _cut(train, rows[:cut]), rows[cut:]
    elif validation is not None:
        raise DataError(
            f"{held.path}: found a validation split of {len(held)} examples, yet a cut of {validation} was "
            "asked for; expected one of the two: drop the flag"
        )
    return (train if missing == 0 else _cut(train, rows)), held, test


def _validation_count(available: int, wanted: int | None, path: str) -> int:
    if wanted is None:
        return max(1, min(MAX_VALIDATION, available // HELD_OUT))
    if not 0 < wanted < available:
        raise DataError(
            f"{path}: found {available} examples; expected a validation of 1 to {available - 1}, not {wanted}"
        )
    return wanted


def _cut(source: Source, rows: Indices) -> Subset:
    return Subset(source, np.sort(rows))  # sorted: reading in order touches the file in order


def _fixed_permutation(count: int) -> Indices:
    # Raw words of PCG64 stay the same over NumPy's versions, which its permutation() does not promise.
    words = np.random.PCG64(_CUT_SEED).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)
