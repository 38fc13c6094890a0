"""How many elements a share of a vector is."""

from hvdvae.errors import ConfigError


def count_of(length: int, share: float) -> int:
    """At least one, of a vector that has one. Raises ConfigError for a share that is none."""
    if not 0 < share <= 1:
        raise ConfigError(f"--compression-share is {share}, expected a part of 1 above 0, such as 0.01")
    return min(length, max(1, round(length * share)))
