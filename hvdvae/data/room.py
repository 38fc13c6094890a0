"""Memory for data, looked at before it is taken: a small compressed file may claim, or become, more than there is."""

import psutil  # type: ignore[import-untyped]

from hvdvae.errors import DataError

MAX_DEFLATE = 1032
"""Deflate cannot shrink by more than this factor: a header that claims more data is not to be believed."""


def check_room(needed: int, label: str, remedy: str) -> None:
    """Refuse data of `needed` bytes where this host has not so many free now (DataError with the remedy)."""
    free = psutil.virtual_memory().available
    if needed > free:
        raise DataError(
            f"{label}: found {needed / 1e9:.1f} GB of data, to be held in memory; expected at most {free / 1e9:.1f} "
            f"GB, which are free: {remedy}"
        )
