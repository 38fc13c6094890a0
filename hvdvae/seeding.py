"""Randomness as a pure function of (seed, rank, step): nothing to save, nothing that two ranks share.

Before every step the default generators are seeded anew, so reparameterization noise, dropout and whatever else a
user's module draws differ per rank, are reproducible from the seed, and continue exactly after a resume.
"""

import torch

GAMMA, M1, M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""SplitMix64's constants (Steele, Lea, Flood 2014)."""

_MASK = (1 << 64) - 1


def stream(*key: int) -> int:
    """A 64-bit seed for integers such as (purpose, seed, epoch): a change of any of them changes all of it.

    SplitMix64's mixer over one part after the other. The first part, or the number of parts, says what the stream is
    for; two streams of one seed that share a key are one stream.
    """
    mixed = len(key)
    for part in key:
        low, high = part & _MASK, part >> 64
        mixed = _mix((mixed + GAMMA) & _MASK ^ _mix(low ^ _mix(high & _MASK) if high else low))
    return mixed


def _mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * M1) & _MASK
    word = ((word ^ (word >> 27)) * M2) & _MASK
    return word ^ (word >> 31)


def seed_everything(device: torch.device, *key: int) -> None:
    """Seed torch's default generators of the CPU and of `device` for a key. Mutates global generators; local."""
    seed = stream(*key)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
