"""Readers of data under damage: what they return is what NumPy, h5py or Pillow read, or our own error names the file.

The examples are the same in every run (derandomize), and few: a longer search is `--hypothesis-seed` and more examples.
"""

import gzip
import io
import itertools
import struct
import tempfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from hvdvae.data import image_decoding
from hvdvae.data.hdf5 import open_hdf5
from hvdvae.data.idx import open_idx
from hvdvae.data.images import open_images
from hvdvae.data.npy import open_npy, open_npz
from hvdvae.errors import DataError

RNG = np.random.default_rng(8)
GREY = RNG.integers(0, 256, (9, 6, 5), dtype=np.uint8)
FLOATS = RNG.random((9, 4))
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

change = st.tuples(
    st.sampled_from(["byte", "number", "cut", "drop", "twice"]),
    st.floats(0, 1),
    st.sampled_from(NUMBERS),
    st.booleans(),
)
changes = st.lists(change, min_size=1, max_size=4)
fuzz = settings(derandomize=True, max_examples=50, deadline=None, database=None)


def damaged(content: bytes, how: list[tuple[str, float, int, bool]]) -> bytes:
    """Bytes overwritten, cut off, taken out or repeated; places lie early more often, where headers are."""
    for kind, where, number, big in how:
        place = int(where**2 * (len(content) - 1))
        if kind == "byte":
            content = content[:place] + bytes([number & 255]) + content[place + 1 :]
        elif kind == "number":
            content = content[:place] + struct.pack(">I" if big else "<I", number) + content[place + 4 :]
        elif kind == "cut":
            content = content[: place + 1]
        elif kind == "drop":
            content = content[:place] + content[place + 1 + number % 7 :]
        else:
            content = content[:place] + content[place : place + 8] + content[place:]
    return content


def values(source):
    return source.gather(np.arange(len(source)))


def as_models_see(array):
    """Channels first, as float32 or uint8."""
    array = np.asarray(array)
    kept = array.dtype in (np.uint8, np.bool_)
    with np.errstate(all="ignore"):
        array = array.astype(np.uint8 if kept else np.float32)
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim == 4 and array.shape[3] in (1, 3) and array.shape[1] not in (1, 3):
        array = np.moveaxis(array, 3, 1)
    return array


def agrees(open_it, content, name, reference):
    """Opens the damaged file, at both limits; returns whether it was refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            found = values(open_it(path))
        except DataError as error:
            message = str(error)
        else:
            message = ""
        if message:
            assert name in message, f"names no file: {message}"
            return True
        expected = as_models_see(reference(path))
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)
        return False


def npy(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def npz(save, **arrays):
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


NPY = [npy(GREY), npy(FLOATS), npy(np.asfortranarray(FLOATS)), npy(GREY > 99, version=(2, 0)), npy(GREY.astype(">i2"))]
NPZ = [npz(np.savez, train=GREY, test=GREY[:4]), npz(np.savez_compressed, x=FLOATS)]


@pytest.mark.parametrize("limit", [0, 1 << 30])
@given(which=st.sampled_from(NPY), how=changes)
@fuzz
def test_npy(limit, which, how):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvdvae.data.array_file.IN_MEMORY_BYTES", limit)
        agrees(open_npy, damaged(which, how), "a.npy", np.load)


@given(which=st.sampled_from(NPZ), how=changes)
@fuzz
def test_npz(which, how):
    def reference(path):
        with np.lib.npyio.NpzFile(path) as archive:  # numpy.load wants a zip from the first byte on.
            return archive[next(key for key in ("train", "x", *archive) if key in archive)]

    agrees(lambda path: open_npz(path)["train"], damaged(which, how), "a.npz", reference)


@given(
    shape=st.lists(st.integers(-3, 2**70), max_size=5),
    kind=st.sampled_from(["|u1", "<f8", ">f4", "|b1", "<U3", "|O", "<c8", "<m8[s]", "(2,)<f4", "|V0", "|S0"]),
    fortran=st.booleans(),
    claimed=st.integers(0, 2**40),
    compress=st.booleans(),
)
@fuzz
def test_forged_shapes_and_sizes(shape, kind, fortran, claimed, compress):
    """None is allocated before it is known that so much is there."""
    text = f"{{'descr': {kind!r}, 'fortran_order': {fortran}, 'shape': ({''.join(f'{size}, ' for size in shape)}), }}"
    text = text.ljust(54) + "\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(60)
    agrees(open_npy, array, "a.npy", np.load)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        archive.writestr("train.npy", array)
    whole = bytearray(file.getvalue())
    central = whole.rindex(b"PK\1\2")
    whole[central + 24 : central + 28] = struct.pack("<I", claimed & 0xFFFFFFFF)  # The size when decompressed.
    assert agrees(lambda path: open_npz(path)["train"], bytes(whole), "a.npz", np.load)


def idx(array, code):
    return struct.pack(f">4B{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


def read_idx(path):
    """By the format's definition."""
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    rank = content[3]
    kind = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}[content[2]]
    return np.frombuffer(content[4 + 4 * rank :], kind).reshape(struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank]))


IDX = [idx(GREY, 8), idx(FLOATS.astype(">f8"), 14), idx(GREY.astype(">i4"), 12)]


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("packed", ["no", "before", "after"])
@given(which=st.sampled_from(IDX), how=changes)
@fuzz
def test_idx(limit, packed, which, how):
    content = gzip.compress(which) if packed == "before" else which
    content = damaged(content, how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvdvae.data.array_file.IN_MEMORY_BYTES", limit)
        agrees(open_idx, gzip.compress(content) if packed == "after" else content, "a.idx", read_idx)


@given(
    sizes=st.lists(st.sampled_from(NUMBERS), max_size=6),
    code=st.sampled_from([8, 9, 11, 12, 13, 14]),
    packed=st.booleans(),
)
@fuzz
def test_forged_idx(sizes, code, packed):
    content = struct.pack(f">4B{len(sizes)}I", 0, 0, code, len(sizes), *sizes) + bytes(64)
    agrees(open_idx, gzip.compress(content) if packed else content, "a.idx", read_idx)


def images():
    colour = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = Image.fromarray(colour)
    for kind, mode in itertools.product(("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"), ("L", "RGB", "P")):
        if (kind, mode) in (("JPEG", "P"), ("WEBP", "P"), ("PPM", "P")):
            continue
        file = io.BytesIO()
        plain.convert(mode).save(file, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
        yield file.getvalue()
    for deep in ("I;16", "F"):
        file = io.BytesIO()
        Image.fromarray(GREY[0].astype("u2" if deep == "I;16" else "f4")).save(file, "TIFF")
        yield file.getvalue()


def read_image(path):
    with Image.open(path, formats=image_decoding.FORMATS) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("F", "I", "I;16", "I;16B"):
            return np.asarray(upright)[None]
        grey = upright.mode in ("1", "L", "LA")
        return np.asarray(upright.convert("L" if grey else "RGB"))[None]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limit", [0, 1 << 30])
@given(which=st.sampled_from(list(images())), how=changes)
@settings(fuzz, max_examples=100)
def test_images(limit, which, how):
    def open_it(path):
        return open_images(path.parent, in_memory_bytes=limit)

    agrees(open_it, damaged(which, how), "a.png", read_image)


@st.composite
def layouts(draw):
    """A file's bytes as h5py writes them, of any layout that a single file can have."""
    array = draw(st.sampled_from([GREY, FLOATS, GREY > 99, GREY.astype(">i2"), FLOATS.astype("f2")]))
    options = {}
    if draw(st.booleans()):
        options["chunks"] = tuple(draw(st.integers(1, size)) for size in array.shape)
        options["compression"] = draw(st.sampled_from([None, "gzip", "lzf"]))
        options["shuffle"], options["fletcher32"] = draw(st.booleans()), draw(st.booleans())
    file = io.BytesIO()
    block = draw(st.sampled_from([0, 512, 2048]))
    with h5py.File(file, "w", userblock_size=block, libver=draw(st.sampled_from(["earliest", "latest"]))) as made:
        made.create_dataset("train", data=array, **options)
        if draw(st.booleans()):
            made["test"] = h5py.SoftLink("/train")
    return file.getvalue()


def read_hdf5(path):
    with h5py.File(path) as file:
        return file["train"][()]


@pytest.mark.parametrize("limit", [0, 1 << 30])
@given(content=layouts(), how=st.one_of(st.just([]), changes))
@fuzz
def test_hdf5(limit, content, how):
    def open_it(path):
        return open_hdf5(path, in_memory_bytes=limit)["train"]

    refused = agrees(open_it, damaged(content, how), "a.h5", read_hdf5)
    assert not (refused and not how), "a whole file is read"
