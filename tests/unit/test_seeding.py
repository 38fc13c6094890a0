"""Law 6: noise is a function of (seed, rank, step), and no two of them share a stream."""

import itertools

import torch

from hvdvae.seeding import seed_everything, stream

CPU = torch.device("cpu")


def draw(*key: int) -> torch.Tensor:
    seed_everything(CPU, *key)
    return torch.randn(64)


def test_the_same_key_gives_the_same_noise() -> None:
    first = draw(3, 1, 7)
    torch.randn(5)
    assert torch.equal(draw(3, 1, 7), first)


def test_seeds_ranks_and_steps_differ() -> None:
    keys = list(itertools.product((0, 1, 2**62), (0, 1, 2, 3), (0, 1, 2, 1000)))
    assert len({stream(*key) for key in keys}) == len(keys)
    noise = torch.stack([draw(*key) for key in keys])
    correlation = torch.corrcoef(noise).fill_diagonal_(0).abs().max()
    assert correlation < 0.65, "64 numbers of unrelated streams correlate by about 1/8"


def test_neighbours_and_swaps_are_no_shifted_copies() -> None:
    """Schemes such as seed + rank + step repeat a stream on the next rank a step later."""
    assert len({stream(0, rank, step) for rank in range(40) for step in range(40)}) == 1600


def test_streams_are_seeds_that_torch_takes() -> None:
    values = [stream(0, 0, step) for step in range(200)]
    assert all(0 <= value < 2**64 for value in values)
    assert max(values) > 2**63, "all 64 bits are in use"


def test_integers_beyond_32_bits_are_no_others_in_disguise() -> None:
    assert stream(7, 2**32) != stream(7, 0, 1)
    assert stream(5 + 2**32, 0, 0) != stream(5, 1, 0)
    assert len({stream(1), stream(1, 0), stream(1, 0, 0), stream(2**64 + 1), stream(0, 1)}) == 5
