"""What is done to values follows the data, is said, and is refused where it would destroy them."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from hvdvae.data import (
    ArraySource,
    Loader,
    check_support,
    chosen_binarization,
    describe_values,
    open_dataset,
)
from hvdvae.errors import DataError

RNG = np.random.default_rng(4)
GREY = RNG.integers(0, 256, (40, 5, 4), dtype=np.uint8)
GENOTYPES = RNG.integers(0, 3, (40, 12), dtype=np.uint8)
FLOATS = RNG.random((40, 12), dtype=np.float32)


@pytest.mark.parametrize(
    ("array", "likelihood", "expected"),
    [
        (GREY, "bernoulli", "dynamic"),
        (GREY > 99, "bernoulli", "dynamic"),
        (FLOATS, "bernoulli", "none"),
        (GREY / 255, "bernoulli", "none"),
        (GREY, "gaussian", "none"),
        (GREY, "discretized-logistic", "none"),
    ],
)
def test_what_is_binarized_by_default(array: np.ndarray, likelihood: str, expected: str) -> None:
    source = ArraySource(array, "a")
    assert chosen_binarization(source, likelihood) == expected
    assert chosen_binarization(source, "bernoulli", "static") == "static"


def test_a_loader_leaves_floats_as_they_are_unless_asked() -> None:
    batch = next(iter(Loader(ArraySource(FLOATS, "a"), batch=40).epoch(0)))
    assert torch.equal(batch.sort(0).values, torch.from_numpy(FLOATS).sort(0).values)
    drawn = next(iter(Loader(ArraySource(FLOATS, "a"), batch=40, binarization="dynamic").epoch(0)))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    grey = next(iter(Loader(ArraySource(GREY, "a"), batch=40).epoch(0)))
    assert set(grey.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "discretized-logistic"])
def test_small_whole_numbers_in_bytes_are_no_images(tmp_path, likelihood: str) -> None:
    np.save(tmp_path / "genotypes.npy", GENOTYPES)
    with pytest.raises(DataError, match=r"genotypes\.npy: found uint8 from 0 to 2; divided by 255.*astype.*gaussian"):
        open_dataset(str(tmp_path / "genotypes.npy"))
    with pytest.raises(DataError, match="found uint8 from 0 to 2"):
        check_support(ArraySource(GENOTYPES, "a"), likelihood, "none")


def test_what_is_advised_for_them_works(tmp_path) -> None:
    np.save(tmp_path / "counts.npy", GENOTYPES.astype(np.float32))
    data = open_dataset(str(tmp_path / "counts.npy"))
    batch = next(iter(Loader(data.train, batch=32, likelihood="gaussian").epoch(0)))
    assert set(batch.unique().tolist()) == {0.0, 1.0, 2.0}
    np.save(tmp_path / "shares.npy", GENOTYPES / GENOTYPES.max())
    batch = next(iter(Loader(open_dataset(str(tmp_path / "shares.npy")).train, batch=32).epoch(0)))
    assert set(batch.unique().tolist()) == {0.0, 0.5, 1.0}


def test_one_bright_split_says_that_all_are_images_and_image_files_always_are(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", train=GREY, test=np.minimum(GREY, 90))
    data = open_dataset(str(tmp_path / "a.npz"))
    assert {data.train.peak, data.validation.peak, data.test.peak} == {255}
    check_support(data.test, "bernoulli", "dynamic")
    (tmp_path / "dark").mkdir()
    for number, image in enumerate(np.minimum(GREY, 90)):
        Image.fromarray(image).save(tmp_path / f"dark/{number:02}.png")
    dark = open_dataset(str(tmp_path / "dark"))
    check_support(dark.train, "bernoulli", "dynamic")
    assert describe_values(dark.train, likelihood="gaussian", binarization="none") == "uint8, 0 to 90, divided by 255"


@pytest.mark.parametrize("dtype", ["u2", "i2", "i4", "i8", "f2"])
def test_whole_numbers_and_half_floats_train_as_they_are(tmp_path, dtype: str) -> None:
    counts = RNG.integers(0, 2000, (40, 6)).astype(dtype)
    np.save(tmp_path / "counts.npy", counts)
    data = open_dataset(str(tmp_path / "counts.npy"))
    with pytest.raises(DataError, match=rf"counts\.npy: found {np.dtype(dtype)} from .*--likelihood gaussian"):
        check_support(data.train, "bernoulli", "none")
    batch = next(iter(Loader(data.train, batch=len(data.train), likelihood="gaussian").epoch(0)))
    assert set(batch.unique().tolist()) <= set(counts.astype(float).ravel().tolist())
    with pytest.raises(DataError, match=r"astype\(numpy\.uint8\), if these are 8-bit images"):
        check_support(ArraySource(GREY.astype(np.int64), "a"), "bernoulli", "none")
    check_support(ArraySource((GREY > 9).astype(np.int64), "a"), "bernoulli", "none")


def test_whole_numbers_that_float32_would_round_are_refused(tmp_path) -> None:
    for high, refused in ((2**24 - 1, False), (2**24 + 1, True), (-(2**40), True)):
        array = np.zeros((20, 3), np.int64)
        array[3, 1] = high
        np.save(tmp_path / "big.npy", array)
        if refused:
            with pytest.raises(DataError, match=r"big\.npy: found int64 from .*2\*\*24"):
                open_dataset(str(tmp_path / "big.npy"))
        else:
            assert open_dataset(str(tmp_path / "big.npy")).train.limits == (0, high)


@pytest.mark.parametrize(
    ("array", "likelihood", "binarization", "sentence"),
    [
        (GREY, "gaussian", "none", "uint8, 0 to 255, divided by 255"),
        (
            GREY,
            "bernoulli",
            "dynamic",
            "uint8, 0 to 255, divided by 255, then drawn as 0 or 1 .*anew.*none keeps them\\)",
        ),
        (
            GREY,
            "bernoulli",
            "static",
            "uint8, 0 to 255, divided by 255, then drawn as 0 or 1 .*once.*none keeps them\\)",
        ),
        (GREY > 9, "bernoulli", "dynamic", "bool, 0 and 1, as they are"),
        ((GREY > 9).astype("i8"), "bernoulli", "none", "int64, 0 to 1, as they are, in float32"),
        (
            FLOATS,
            "bernoulli",
            "none",
            "float32, .* to .*, as they are, each taken for a probability .*dynamic draws 0 or 1 with it\\)",
        ),
        (FLOATS * 70 - 3, "gaussian", "none", "float32, -.* to 6[0-9.]*, as they are"),
        (FLOATS.astype(float), "gaussian", "none", "float64, .* as they are, in float32"),
        (FLOATS, "discretized-logistic", "none", "float32, .* as they are, scored on a grid of 256 levels from 0 to 1"),
    ],
)
def test_the_sentence_says_all_that_is_done(array, likelihood, binarization, sentence) -> None:
    source = ArraySource(array, "a")
    found = describe_values(source, likelihood=likelihood, binarization=binarization)
    assert re.fullmatch(sentence, found), found
