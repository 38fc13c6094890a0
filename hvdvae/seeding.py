"""Randomness as a pure function of (seed, rank, step): nothing to save, nothing that two ranks share.

Before every step the default generators are seeded anew, so reparameterization noise, dropout and whatever else a
user's module draws differ per rank, are reproducible from the seed, and continue exactly after a resume.
"""

import numpy as np
import torch


def stream(*key: int) -> int:
    """A 64-bit seed for a key; keys that differ anywhere give unrelated streams (NumPy's SeedSequence)."""
    low, high = np.random.SeedSequence(key).generate_state(2)
    return int(high) << 32 | int(low)


def seed_everything(device: torch.device, *key: int) -> None:
    """Seed torch's default generators of the CPU and of `device` for a key. Mutates global generators; local."""
    seed = stream(*key)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
