"""A vector in blocks that stay in a core's cache while several operations pass over them, each of whole chunks."""

from collections.abc import Iterator

BLOCK = 65_536
"""Elements."""


def blocks(length: int, chunk: int) -> Iterator[tuple[slice, slice, int]]:
    """Elements of a block, its chunks, and how long those are; the last chunk of a vector may be shorter."""
    whole = length // chunk * chunk
    for start in range(0, whole, BLOCK):
        stop = min(start + BLOCK, whole)
        yield slice(start, stop), slice(start // chunk, stop // chunk), chunk
    if whole < length:
        yield slice(whole, length), slice(whole // chunk, whole // chunk + 1), length - whole
