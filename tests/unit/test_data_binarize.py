"""Binarization and scaling: exact probabilities, addressed noise, values as the likelihoods want them."""

import numpy as np
import pytest
import torch

from hvdvae.data import ArraySource, Subset, evaluation_batch, mean_example, to_input
from hvdvae.data.accelerator import AcceleratorFeed
from hvdvae.data.binarize import binarize, binarize_on_device, evaluation_key, training_key
from hvdvae.data.noise import uniform_bytes, uniform_floats
from hvdvae.seeding import stream

ROWS = np.arange(4000, dtype=np.int64)


def five_sigma(p, draws):
    return 5 * np.sqrt(p * (1 - p) / draws) + 1e-12


@pytest.mark.parametrize("kind", ["uint8", "float32", "device"])
def test_each_value_is_drawn_with_its_own_probability(kind):
    values = np.tile(np.arange(256, dtype=np.uint8), (len(ROWS), 1))
    if kind == "uint8":
        drawn = binarize(values, 255, 11, ROWS)
    elif kind == "float32":
        drawn = binarize((values / 255).astype(np.float32), 1, 11, ROWS)
    else:
        generator = torch.Generator().manual_seed(1)
        drawn = binarize_on_device(torch.from_numpy(values), 255, generator).numpy()
    p = np.arange(256) / 255
    mean = drawn.mean(axis=0)
    assert mean[0] == 0
    assert mean[255] == 1
    assert (abs(mean - p) <= five_sigma(p, len(ROWS))).all()


def test_probabilities_are_v_over_255_exactly():
    """Counted over all pairs of noise byte and coin, not sampled."""
    noise, coin = np.meshgrid(np.arange(256), np.arange(255), indexing="ij")
    for v in range(256):
        ones = ((noise < v) | ((noise == v) & (v > coin))).sum()
        assert ones * 255 == v * 256 * 255


def test_the_mean_over_many_draws_tells_255_levels_from_256():
    values = np.full((4000, 4000), 254, np.uint8)
    zeros = 1 - binarize(values, 255, 5, ROWS).mean()
    draws = values.size
    assert abs(zeros - 1 / 255) < five_sigma(1 / 255, draws) < abs(2 / 256 - 1 / 255)


def test_pixels_and_examples_are_not_correlated():
    drawn = binarize(np.full((4000, 200), 128, np.uint8), 255, 9, ROWS).astype(float)
    limit = 6 / np.sqrt(4000)
    assert abs(np.corrcoef(drawn.T) - np.eye(200)).max() < limit
    assert abs(np.corrcoef(drawn[:200]) - np.eye(200)).max() < 6 / np.sqrt(200)


def test_noise_belongs_to_key_example_and_position():
    whole, words = uniform_bytes(3, ROWS, 21)
    some, some_words = uniform_bytes(3, ROWS[[70, 5]], 21)
    np.testing.assert_array_equal(some, whole[[70, 5]])
    np.testing.assert_array_equal(some_words, words[[70, 5]])
    assert (uniform_bytes(4, ROWS, 21)[0] == whole).mean() < 0.01
    floats = uniform_floats(3, ROWS, 21)
    np.testing.assert_array_equal(floats[[9]], uniform_floats(3, ROWS[[9]], 21))
    assert 0 <= floats.min() < 1e-4
    assert 1 - 1e-4 < floats.max() < 1


def test_noise_bytes_are_uniform():
    counts = np.bincount(uniform_bytes(1, ROWS, 784)[0].ravel(), minlength=256)
    expected = counts.sum() / 256
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 255) < 6 * np.sqrt(2 * 255)


def test_keys_differ_by_every_part():
    parts = [(a, b, c) for a in range(5) for b in (0, 1, 2**32, 2**64 - 1) for c in range(50)]
    assert len({stream(*part) for part in parts} | {stream(part[0]) for part in parts}) == 1005
    assert training_key("dynamic", 1, 2) != training_key("dynamic", 1, 3)
    assert training_key("static", 1, 2) == training_key("static", 9, 3) == evaluation_key("static", 5)
    assert evaluation_key("dynamic") != training_key("dynamic", 0, 0)


def test_binary_values_stay_as_they_are():
    bits = np.random.default_rng(0).integers(0, 2, (50, 30)).astype(np.uint8)
    for values in (bits, bits.astype(np.float32)):
        np.testing.assert_array_equal(binarize(values, 1, 7, ROWS[:50]), bits)


def test_scaling_without_binarization():
    values = np.arange(256, dtype=np.uint8).reshape(2, 128)
    got = to_input(values, peak=255, binarization="none", key=0, examples=ROWS[:2]).double()
    expected = torch.arange(256).reshape(2, 128).double() / 255
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)
    assert (got.min(), got.max()) == (0, 1)
    np.testing.assert_array_equal(values, np.arange(256).reshape(2, 128))


def test_floats_are_taken_as_they_are():
    values = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    got = to_input(values, peak=1, binarization="none", key=0, examples=ROWS[:3])
    np.testing.assert_array_equal(got.numpy(), values)


@pytest.mark.parametrize("binarization", ["dynamic", "static", "none"])
def test_evaluation_is_the_same_however_it_is_cut(binarization):
    values = np.random.default_rng(0).integers(0, 256, (40, 3, 3), dtype=np.uint8)
    source = Subset(ArraySource(values, "a"), np.arange(39, -1, -1))

    def batch(start, stop, seed=0):
        return evaluation_batch(source, start, stop, binarization=binarization, seed=seed)

    whole = batch(0, 40)
    assert (whole.shape, whole.dtype) == ((40, 1, 3, 3), torch.float32)
    torch.testing.assert_close(torch.cat([batch(0, 13), batch(13, 20), batch(20, 40)]), whole, rtol=0, atol=0)
    assert torch.equal(batch(0, 40, seed=1), whole) == (binarization != "dynamic")


def test_mean_example_is_in_units_of_the_model(monkeypatch):
    monkeypatch.setattr("hvdvae.data.source.CHUNK_BYTES", 100)
    values = np.random.default_rng(0).integers(0, 256, (50, 3, 4), dtype=np.uint8)
    expected = torch.from_numpy(values[:, None].mean(axis=0) / 255).float()
    torch.testing.assert_close(mean_example(ArraySource(values, "a")), expected)
    torch.testing.assert_close(mean_example(ArraySource(values / 255, "a")), expected)


def feed_batches(monkeypatch, resident, values, binarization, seed=0, epoch=0):
    monkeypatch.setattr("hvdvae.data.accelerator._free_bytes", lambda _: 10**9 if resident else 0)
    source = ArraySource(values, "a")
    feed = AcceleratorFeed(source, binarization=binarization, seed=seed, device=torch.device("cpu"))
    cuts = [np.array([4, 1]), np.array([0, 3])]
    return torch.cat(list(feed.batches(iter(cuts), epoch)))


@pytest.mark.parametrize("resident", [True, False])
def test_an_accelerator_gets_the_same_values_as_the_host(monkeypatch, resident):
    """The feed is exercised on the CPU as its device: pinning aside, the same code runs on a GPU."""
    values = np.random.default_rng(0).integers(0, 256, (5, 6), dtype=np.uint8)
    examples = np.array([4, 1, 0, 3])
    key = training_key("static", 0, 0)
    for binarization in ("none", "static"):
        expected = to_input(
            values[examples],
            peak=255,
            binarization=binarization,
            key=key,
            examples=examples,
        )
        got = feed_batches(monkeypatch, resident, values, binarization)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)


def test_noise_on_an_accelerator_is_keyed_by_seed_epoch_and_place(monkeypatch):
    values = np.full((5, 500), 128, np.uint8)
    first = feed_batches(monkeypatch, True, values, "dynamic")
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(first, feed_batches(monkeypatch, False, values, "dynamic"))
    assert not torch.equal(first[:2], first[2:])
    assert not torch.equal(first, feed_batches(monkeypatch, True, values, "dynamic", seed=1))
    assert not torch.equal(first, feed_batches(monkeypatch, True, values, "dynamic", epoch=1))
