"""Formats: what is written is read back, mapped where promised, and refused by name where it is broken."""

import gzip
import struct
import zipfile

import h5py
import numpy as np
import pytest
from PIL import Image

from hvdvae.data.hdf5 import HDF5Source, open_hdf5
from hvdvae.data.idx import open_idx
from hvdvae.data.image_files import find_images
from hvdvae.data.images import ImageSource, open_images
from hvdvae.data.npy import open_npy, open_npz
from hvdvae.data.open import open_dataset
from hvdvae.errors import DataError

GREY = np.random.default_rng(1).integers(0, 256, (12, 5, 4), dtype=np.uint8)
SOME = np.array([11, 0, 3, 3])


def idx_bytes(array, code=0x08):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.tobytes()


@pytest.mark.parametrize("packed", [False, True])
def test_idx_of_bytes_and_floats(tmp_path, packed):
    file = tmp_path / "data.idx"
    for array, code in ((GREY, 8), (GREY.astype(">i2"), 11), (GREY.astype(">f4"), 13), (GREY.astype(">f8"), 14)):
        content = idx_bytes(array, code)
        file.write_bytes(gzip.compress(content) if packed else content)
        source = open_idx(file)
        assert source.in_memory
        np.testing.assert_array_equal(source.gather(SOME)[:, 0], GREY[SOME])


def test_large_plain_idx_stays_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("hvdvae.data.array_file.IN_MEMORY_BYTES", 10)
    (tmp_path / "data.idx").write_bytes(idx_bytes(GREY))
    source = open_idx(tmp_path / "data.idx")
    assert not source.in_memory
    np.testing.assert_array_equal(source.gather(SOME)[:, 0], GREY[SOME])


PACKED = gzip.compress(idx_bytes(GREY))
BAD_IDX = {
    "empty": (b"", "magic number"),
    "magic": (b"\x89PNG" + bytes(40), "magic number 89504e47"),
    "header": (idx_bytes(GREY)[:9], "header cut short"),
    "truncated": (idx_bytes(GREY)[:-1], "expected 240 bytes"),
    "too long": (idx_bytes(GREY) + b"x", "expected 240 bytes"),
    "no examples": (idx_bytes(GREY[:0]), "empty"),
    "labels": (idx_bytes(GREY[:, 0, 0]), "rank 1"),
    "gz truncated": (PACKED[: len(PACKED) // 2], "truncated or corrupt"),
    "gz corrupt": (PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:], "truncated or corrupt"),
    "gz of less": (gzip.compress(idx_bytes(GREY)[:-9]), "found 231 bytes of data; expected 240"),
    "gz of more": (gzip.compress(idx_bytes(GREY) + b"x"), "more data"),
    "gz of nonsense": (gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12), "expected [0-9]+ bytes"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_is_refused(tmp_path, case):
    content, message = BAD_IDX[case]
    (tmp_path / "bad.idx").write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.idx.*{message}"):
        open_idx(tmp_path / "bad.idx")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("limit", [10, 1 << 20])
def test_npy_is_read_once_or_stays_on_disk(tmp_path, monkeypatch, order, limit):
    monkeypatch.setattr("hvdvae.data.array_file.IN_MEMORY_BYTES", limit)
    np.save(tmp_path / "a.npy", np.asarray(GREY, order=order))
    source = open_npy(tmp_path / "a.npy")
    assert source.in_memory == (limit > 10)
    np.testing.assert_array_equal(source.gather(SOME)[:, 0], GREY[SOME])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_members_stay_on_disk_unless_compressed(tmp_path, monkeypatch, save, order):
    monkeypatch.setattr("hvdvae.data.array_file.IN_MEMORY_BYTES", 10)
    array = np.asarray(GREY, order=order)
    save(tmp_path / "a.npz", train=array, valid=array[:3], test=array[3:5], labels=np.zeros(12))
    sources = open_npz(tmp_path / "a.npz")
    assert {split: len(source) for split, source in sources.items()} == {
        "train": 12,
        "validation": 3,
        "test": 2,
    }
    assert sources["train"].in_memory == (save is np.savez_compressed)
    np.testing.assert_array_equal(sources["train"].gather(SOME)[:, 0], GREY[SOME])
    np.testing.assert_array_equal(sources["test"].gather(np.array([1]))[:, 0], GREY[4:5])


def test_a_single_array_of_any_name_is_train_and_unclear_keys_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", pictures=GREY)
    assert list(open_npz(tmp_path / "a.npz")) == ["train"]
    np.savez(tmp_path / "b.npz", left=GREY, right=GREY)
    with pytest.raises(DataError, match=r"b\.npz.*left, right.*expected train"):
        open_npz(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", train=GREY, x_train=GREY)
    with pytest.raises(DataError, match=r"c\.npz.*both 'train' and 'x_train'"):
        open_npz(tmp_path / "c.npz")


class Trap:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a data file was unpickled",))


def test_object_arrays_are_refused_and_never_unpickled(tmp_path):
    array = np.empty((3, 2), object)
    array[:] = Trap()
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "a.npz", train=array)
    with pytest.raises(DataError, match=r"a\.npy.*never unpickled"):
        open_npy(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"a\.npz\[train\].*never unpickled"):
        open_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("shape", ["(3, 4", "(-3, 4)", "(True, 4)", "(3, 'x')", "(3, 4)]"])
def test_a_damaged_npy_header_is_refused(tmp_path, shape):
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(12))
    with pytest.raises(DataError, match=r"a\.npy: found no readable \.npy header"):
        open_npy(tmp_path / "a.npy")


def test_torn_npy_and_npz_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", GREY)
    content = (tmp_path / "a.npy").read_bytes()
    for kept, message in ((len(content) - 1, "expected 240"), (30, "header"), (3, "header")):
        (tmp_path / "a.npy").write_bytes(content[:kept])
        with pytest.raises(DataError, match=rf"a\.npy.*{message}"):
            open_npy(tmp_path / "a.npy")
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", train=GREY)
        content = (tmp_path / "a.npz").read_bytes()
        (tmp_path / "a.npz").write_bytes(content[:-30])
        with pytest.raises(DataError, match=r"a\.npz.*truncated or corrupt"):
            open_npz(tmp_path / "a.npz")
    middle = len(content) // 2
    (tmp_path / "a.npz").write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    with pytest.raises(DataError, match=r"a\.npz.*truncated or corrupt"):
        open_npz(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("train.npy", "no array")
    with pytest.raises(DataError, match=r"b\.npz\[train\].*header"):
        open_npz(tmp_path / "b.npz")


@pytest.mark.parametrize(("options", "limit"), [({}, 0), ({"chunks": (2, 5, 4), "compression": "gzip"}, 1 << 20)])
def test_hdf5_is_mapped_or_read_once(tmp_path, options, limit):
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=512) as file:
        file.create_dataset("train", data=GREY, **options)
        file.create_dataset("validation", data=GREY[:2], **options)
    sources = open_hdf5(tmp_path / "a.h5", in_memory_bytes=limit)
    assert list(sources) == ["train", "validation"]
    assert sources["train"].in_memory == bool(options)
    np.testing.assert_array_equal(sources["train"].gather(SOME)[:, 0], GREY[SOME])


@pytest.mark.parametrize("wanted", [[11, 0, 3, 3], [2, 3, 4], [4, 3, 2], [7]])
def test_hdf5_streams_what_is_chunked_and_large(tmp_path, wanted):
    colour = np.random.default_rng(2).random((12, 6, 5, 3))
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.create_dataset("x", data=colour, chunks=(5, 6, 5, 3))
    source = open_hdf5(tmp_path / "a.hdf5", in_memory_bytes=0)["train"]
    assert isinstance(source, HDF5Source)
    assert (source.in_memory, source.shape, source.dtype) == (False, (3, 6, 5), np.float32)
    expected = np.moveaxis(colour[wanted], 3, 1).astype(np.float32)
    np.testing.assert_array_equal(source.gather(np.array(wanted)), expected)


def test_bad_hdf5_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("train", data=GREY, chunks=(12, 5, 4), compression="gzip")
        start, size = file["train"].id.get_chunk_info(0).byte_offset, file["train"].id.get_chunk_info(0).size
    content = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"a\.h5.*truncated or corrupt"):
        open_hdf5(tmp_path / "a.h5")
    (tmp_path / "a.h5").write_bytes(content[:start] + bytes(size) + content[start + size :])
    with pytest.raises(DataError, match=r"a\.h5.*truncated or corrupt"):
        open_hdf5(tmp_path / "a.h5")
    streamed = open_hdf5(tmp_path / "a.h5", in_memory_bytes=0)["train"]
    with pytest.raises(DataError, match=r"a\.h5\[train\].*reading failed"):
        streamed.gather(np.array([1]))
    for name, data, message in (
        ("b", GREY.astype("c8"), "complex64"),
        ("c", GREY[:0], "empty"),
        ("d", [b"x"], "rank 1"),
    ):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["train"] = data
        with pytest.raises(DataError, match=rf"{name}\.h5\[train\].*{message}"):
            open_hdf5(tmp_path / f"{name}.h5")


def save_images(folder, arrays, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{number:03}{suffix}")


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_images_are_decoded_once_or_when_needed(tmp_path, limit):
    colour = np.random.default_rng(3).integers(0, 256, (6, 4, 7, 3), dtype=np.uint8)
    save_images(tmp_path / "grey", GREY)
    save_images(tmp_path / "mixed/a", colour)
    save_images(tmp_path / "mixed/b", [colour[0, :, :, 0]])
    grey, mixed = (open_images(tmp_path / name, in_memory_bytes=limit) for name in ("grey", "mixed"))
    assert isinstance(grey, ImageSource) == (not grey.in_memory) == (limit == 0)
    assert (grey.shape, mixed.shape, len(mixed)) == ((1, 5, 4), (3, 4, 7), 7)
    np.testing.assert_array_equal(grey.gather(SOME)[:, 0], GREY[SOME])
    np.testing.assert_array_equal(mixed.gather(np.array([5, 1])), np.moveaxis(colour[[5, 1]], 3, 1))
    np.testing.assert_array_equal(mixed.gather(np.array([6]))[0], np.repeat(colour[:1, :, :, 0], 3, axis=0))


def test_linked_folders_are_followed_and_hidden_files_left_out(tmp_path):
    save_images(tmp_path / "all/cats", [GREY[0], GREY[1]])
    save_images(tmp_path / "all/dogs", [GREY[2]])
    (tmp_path / "all/dogs/._000.png").write_bytes(b"what another system writes beside images")
    save_images(tmp_path / "all/.thumbnails", [GREY[0, :2]])
    (tmp_path / "some").mkdir()
    for name in ("cats", "dogs"):
        (tmp_path / "some" / name).symlink_to(tmp_path / "all" / name)
    (tmp_path / "all/cats/again").symlink_to(tmp_path / "all")  # A circle.
    assert len(find_images(tmp_path / "all")) == 3
    (tmp_path / "all/cats/again").unlink()
    found = [str(file.relative_to(tmp_path / "some")) for file in find_images(tmp_path / "some")]
    assert found == ["cats/000.png", "cats/001.png", "dogs/000.png"]


def test_groups_of_hdf5_are_named(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["train/images"] = np.zeros((3, 4, 4), np.uint8)
    with pytest.raises(DataError, match=r"a\.h5: found the groups train; .*at the top"):
        open_dataset(str(tmp_path / "a.h5"))


def test_bad_images_are_refused_by_file(tmp_path):
    save_images(tmp_path / "sizes", [GREY[0], GREY[1], GREY[2, :3]])
    with pytest.raises(DataError, match=r"002\.png: found 4x3 pixels; expected 4x5 as in .*000\.png"):
        open_images(tmp_path / "sizes")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    for suffix in (".png", ".jpg"):
        save_images(tmp_path / f"torn{suffix}", [noise, noise], suffix)
        file = tmp_path / f"torn{suffix}" / f"001{suffix}"
        file.write_bytes(file.read_bytes()[:1500])
        with pytest.raises(DataError, match=rf"001\{suffix}: found a truncated or corrupt image"):
            open_images(file.parent)
        streamed = open_images(file.parent, in_memory_bytes=0)
        with pytest.raises(DataError, match=rf"001\{suffix}: found a truncated or corrupt image"):
            streamed.gather(np.array([0, 1]))
    save_images(tmp_path / "text", [GREY[0]])
    (tmp_path / "text/001.png").write_text("no image")
    with pytest.raises(DataError, match=r"001\.png: found no readable image"):
        open_images(tmp_path / "text")
    with pytest.raises(DataError, match="found no image"):
        open_images(tmp_path / "empty")
