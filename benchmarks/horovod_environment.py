"""Keeps the settings that one side makes for Horovod from the next: they live in the environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def horovod_environment(**settings: str) -> Iterator[None]:
    """Inside, HOROVOD_* is as the user set it, or else as in `settings`; after, as before. Mutates os.environ."""
    before = {name: value for name, value in os.environ.items() if name.startswith("HOROVOD_")}
    os.environ.update(settings | before)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("HOROVOD_") and name not in before]:
            del os.environ[name]
        os.environ.update(before)
