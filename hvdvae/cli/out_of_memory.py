"""What is too large for the machine's memory, by the flag that asks for it."""

from collections.abc import Iterator
from contextlib import contextmanager

from hvdvae.errors import ConfigError

_WORDS = ("memory", "overflow", "too large")


@contextmanager
def named(what: str) -> Iterator[None]:
    """Inside, memory that cannot be had becomes a ConfigError that begins with `what`. Other errors pass."""
    try:
        yield
    except (RuntimeError, MemoryError, OverflowError, ValueError) as error:
        words = str(error).splitlines() or [""]
        if not isinstance(error, MemoryError) and not any(word in str(error).lower() for word in _WORDS):
            raise
        raise ConfigError(f"{what} does not fit into memory: give less ({words[0][:150]})") from error
