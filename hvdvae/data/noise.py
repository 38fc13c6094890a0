"""Random numbers by address: a pure function of (key, example, position), with nothing to save.

Every rank, at any world size, batch size or after a resume, finds the same noise for the same example. The
generator is SplitMix64 (Steele, Lea, Flood 2014), one stream an example, computed for a whole batch at once.
Shapes: B examples, D positions.
"""

import numpy as np
from numpy.typing import NDArray

from hvdvae.seeding import GAMMA, M1, M2

_Words = NDArray[np.uint64]


def uniform_bytes(key: int, examples: NDArray[np.int64], width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Noise (B, width), uniform on 0..255, for the examples (B,), and one more uniform word (B,) for each."""
    words = _words(key, examples, 1 - (-width // 8))
    return words.view(np.uint8)[:, :width], words[:, -1]


def uniform_floats(key: int, examples: NDArray[np.int64], width: int) -> NDArray[np.float32]:
    """Noise (B, width), float32 uniform on [0, 1) in steps of 2**-24, for the examples (B,)."""
    words = _words(key, examples, -(-width // 2)).view(np.uint32)[:, :width]
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def _words(key: int, examples: NDArray[np.int64], count: int) -> _Words:
    rows = _mix(examples.astype(np.uint64) * np.uint64(GAMMA) + np.uint64(key))
    columns = np.arange(count, dtype=np.uint64) * np.uint64(GAMMA)
    return _mix(rows[:, None] + columns)


def _mix(words: _Words) -> _Words:
    """Scramble each word in place."""
    shifted = np.empty_like(words)
    for shift, factor in ((30, M1), (27, M2)):
        np.right_shift(words, shift, out=shifted)
        np.bitwise_xor(words, shifted, out=words)
        np.multiply(words, np.uint64(factor), out=words)
    np.right_shift(words, 31, out=shifted)
    return np.bitwise_xor(words, shifted, out=words)
