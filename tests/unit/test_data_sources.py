"""Arrays as sources: layouts, dtypes, copies and ranges."""

import numpy as np
import pytest

from hvdvae.data import ArraySource, Subset
from hvdvae.errors import DataError


def all_of(source):
    return source.gather(np.arange(len(source)))


@pytest.mark.parametrize(
    ("stored", "shape"),
    [((5, 7), (7,)), ((5, 4, 6), (1, 4, 6)), ((5, 3, 4, 6), (3, 4, 6)), ((5, 1, 4, 3), (1, 4, 3))],
)
def test_layout_of_vectors_and_images(stored, shape):
    array = np.random.default_rng(0).integers(0, 256, stored, dtype=np.uint8)
    source = ArraySource(array, "a")
    assert source.shape == shape
    np.testing.assert_array_equal(source.gather(np.array([3, 0, 3])), array[[3, 0, 3]].reshape(3, *shape))


def test_transparency_is_not_taken_for_columns():
    for shape, channels, save in (((2, 6, 6, 4), 4, 3), ((2, 6, 5, 4), 4, 3), ((2, 6, 8, 2), 2, 1)):
        with pytest.raises(DataError, match=rf"images of {channels} channels, .*save array\[\.\.\., :{save}\]"):
            ArraySource(np.zeros(shape, np.uint8), "a")


@pytest.mark.parametrize("channels", [2, 5])
def test_images_have_one_or_three_channels(channels):
    with pytest.raises(DataError, match=rf"a: found images of {channels} channels, .*C of 1 or 3"):
        ArraySource(np.zeros((7, channels, 6, 6), np.uint8), "a")


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_are_moved_at_the_gather(tmp_path, mapped, channels):
    array = np.random.default_rng(0).random((6, 4, 5, channels))
    if mapped:
        np.save(tmp_path / "a.npy", array)
        array = np.load(tmp_path / "a.npy", mmap_mode="r")
    source = ArraySource(array, "a")
    assert (source.shape, source.dtype, source.in_memory) == ((channels, 4, 5), np.float32, not mapped)
    got = source.gather(np.array([5, 2]))
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, np.moveaxis(array[[5, 2]], 3, 1).astype(np.float32))


def test_uint8_in_memory_is_not_copied_and_a_subset_shares_it():
    array = np.zeros((10, 4), np.uint8)
    source = Subset(ArraySource(array, "a"), np.array([7, 2]))
    array[7] = 9
    np.testing.assert_array_equal(all_of(source), [[9] * 4, [0] * 4])
    assert (len(source), source.path, source.nbytes) == (2, "a", 8)


@pytest.mark.parametrize("dtype", [">f4", ">f8", "f8", "f2", "?", "i1", ">i2", "u2", "i4", "u4", "i8", "u8"])
def test_other_accepted_dtypes_arrive_as_float32_or_uint8(dtype):
    array = np.array([[0, 1], [1, 0], [1, 1]]).astype(dtype)
    got = all_of(ArraySource(array, "a"))
    assert got.dtype == (np.uint8 if dtype == "?" else np.float32)
    np.testing.assert_array_equal(got, array.astype(float))


def test_arrays_in_fortran_order_and_slices_are_read_right():
    array = np.asfortranarray(np.arange(60, dtype=np.uint8).reshape(10, 6))
    np.testing.assert_array_equal(ArraySource(array, "a").gather(np.array([4, 1])), array[[4, 1]])
    np.testing.assert_array_equal(ArraySource(array[::2], "a").gather(np.array([4, 1])), array[[8, 2]])


def test_scans_work_in_chunks_and_name_the_first_bad_example(monkeypatch):
    monkeypatch.setattr("hvdvae.data.source.CHUNK_BYTES", 64)
    array = np.linspace(-2, 3, 200, dtype=np.float32).reshape(50, 4)
    assert ArraySource(array, "a").limits == (-2.0, 3.0)
    assert [len(values) for _, values in ArraySource(array, "a").chunks()] == [4] * 12 + [2]
    for bad in (np.nan, np.inf, -np.inf):
        array[37, 2] = bad
        with pytest.raises(DataError, match=r"floats\.npy.*example 37"):
            _ = ArraySource(array, "floats.npy").limits


def test_peak_tells_binary_from_grey_uint8():
    grey = np.zeros((9, 4), np.uint8)
    assert ArraySource(grey, "a").peak == 1
    grey[8, 3] = 128
    assert ArraySource(grey, "a").peak == 255
    assert Subset(ArraySource(grey, "a"), np.array([0])).peak == 255
    assert ArraySource(grey.astype(np.float32), "a").peak == 1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5, np.uint8), "rank 1"),
        (np.zeros((2, 1, 1, 1, 1), np.uint8), "rank 5"),
        (np.zeros((0, 4), np.uint8), "empty"),
        (np.zeros((4, 0), np.uint8), "empty"),
        (np.zeros((4, 4), np.longdouble), r"longdouble|float128.*save array\.astype\(numpy\.float32\)"),
        (np.zeros((4, 4), complex), "complex.*real and imaginary"),
        (np.zeros((4, 4), "S3"), "bytes24.*expected uint8"),
        (np.array([[None]]), "objects.*never unpickled"),
    ],
)
def test_arrays_that_are_not_data_are_refused(array, message):
    with pytest.raises(DataError, match=rf"some/file: .*{message}"):
        ArraySource(array, "some/file")
