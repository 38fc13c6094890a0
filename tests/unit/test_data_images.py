"""Image files as cameras, microscopes and annotators write them: read right, or refused by name."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hvdvae.data import describe_values
from hvdvae.data.images import open_images
from hvdvae.data.open import open_dataset
from hvdvae.errors import DataError

RNG = np.random.default_rng(5)
GREY = RNG.integers(0, 256, (4, 6, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
CAMERA = RNG.integers(0, 4096, (6, 5, 3))  # 12 bits in a container of 16


def png(array, depth, kind):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.tobytes() for row in array.astype(">u2" if depth == 16 else "u1"))
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(array, *, sample_format=1):
    """A plain TIFF of (H, W, C)."""
    height, width, channels = array.shape
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    entries = {256: width, 257: height, 258: 0, 259: 1, 262: 2 if channels > 1 else 1, 273: 0}
    entries |= {277: channels, 278: height, 279: len(data), 339: 0}
    values = {258: array.dtype.itemsize * 8, 339: sample_format}
    start = 8 + 2 + 12 * len(entries) + 4
    extra = b"".join(struct.pack(f"<{channels}H", *[value] * channels) for value in values.values())
    out = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, value in entries.items():
        count = channels if tag in values else 1
        if tag in values:
            value = values[tag] if channels == 1 else start + (2 * channels if tag == 339 else 0)
        value = start + len(extra) if tag == 273 else value
        out += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, count, value)
    return out + struct.pack("<I", 0) + extra + data


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


DEEP_COLOUR = {
    "a.png": png(CAMERA, 16, 2),
    "b.png": png(RNG.integers(0, 4096, (6, 5, 4)), 16, 6),
    "c.png": png(CAMERA[..., :2], 16, 4),
    "d.tif": tiff(CAMERA.astype("u2")),
    "e.ppm": b"P6\n# made by a camera\n5 6\n4095\n" + CAMERA.astype(">u2").tobytes(),
    "f.ppm": b"P7\nWIDTH 5\nHEIGHT 6\nDEPTH 3\nMAXVAL 4095\nTUPLTYPE RGB\nENDHDR\n" + CAMERA.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", DEEP_COLOUR)
def test_colours_of_more_than_8_bits_are_refused_and_not_rounded(tmp_path, name):
    folder = write(tmp_path / "deep", {name: DEEP_COLOUR[name]})
    with pytest.raises(
        DataError, match=rf"{name[0]}\.{name[2:]}: found (colours of 1[26] bits.*save the array|no read)"
    ):
        open_images(folder)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("a.png", "uint16"), ("a.tif", "uint16"), ("i.tif", "int16"), ("u.tif", "uint32"), ("f.tif", "float32")],
)
@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_deep_grey_keeps_its_values(tmp_path, name, dtype, limit):
    deep = CAMERA[..., :1].astype(dtype)
    if dtype == "float32":
        deep = deep / np.float32(7)
    elif dtype == "int16":
        deep -= 2000
    elif dtype == "uint32":
        deep[0, 0] = 2**31 + 2**10
    sample_format = {"int16": 2, "float32": 3}.get(dtype, 1)
    content = png(deep, 16, 0) if name == "a.png" else tiff(deep, sample_format=sample_format)
    source = open_images(write(tmp_path / "deep", {name: content}), in_memory_bytes=limit)
    assert (source.shape, source.dtype, source.in_memory) == ((1, 6, 5), np.float32, limit > 0)
    np.testing.assert_array_equal(source.gather(np.array([0]))[0, 0], deep[..., 0].astype(np.float32))
    assert source.stored == ("int32" if dtype == "int16" else dtype), "as Pillow has it"


def test_kinds_of_pixels_do_not_mix(tmp_path):
    write(tmp_path / "mixed", {"a.png": png(GREY[0], 8, 0), "b.png": png(CAMERA[..., :1], 16, 0)})
    with pytest.raises(DataError, match=r"b\.png: found pixels of uint16; expected 8 bits \(grey\) as in .*a\.png"):
        open_images(tmp_path / "mixed")


@pytest.mark.parametrize("suffix", [".tif", ".gif", ".webp", ".png"])
def test_several_pages_in_a_file_are_refused(tmp_path, suffix):
    (tmp_path / "pages").mkdir()
    first, *others = map(Image.fromarray, GREY)
    first.save(tmp_path / f"pages/a{suffix}", save_all=True, append_images=others)
    with pytest.raises(DataError, match=rf"a\{suffix}: found 4 pages or frames; expected one image a file.*\.npy"):
        open_images(tmp_path / "pages")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_images_stand_upright_as_their_exif_says(tmp_path, suffix, limit):
    (tmp_path / "turned").mkdir()
    whole = np.zeros((8, 16), np.uint8)
    whole[:, 8:] = 255  # Dark left, bright right; turned a quarter: dark above, bright below.
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"tiffinfo": {0x0112: 6}} if suffix == ".tif" else {"exif": exif}
    quality = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(whole).save(tmp_path / f"turned/a{suffix}", **options, **quality)
    source = open_images(tmp_path / "turned", in_memory_bytes=limit)
    assert source.shape[1:] == (16, 8)
    found = source.gather(np.array([0]))[0, 0]
    assert (found[:8] < 30).all()
    assert (found[8:] > 220).all()
    assert "turned upright as EXIF says" in describe_values(source, likelihood="gaussian", binarization="none")


def test_what_is_dropped_or_converted_is_said(tmp_path):
    for name, mode in (("alpha", "RGBA"), ("grey alpha", "LA"), ("ink", "CMYK"), ("plain", "RGB"), ("bits", "1")):
        (tmp_path / name).mkdir()
        suffix = "tif" if mode == "CMYK" else "png"
        Image.fromarray(COLOUR[0]).convert(mode).save(tmp_path / name / f"a.{suffix}")
    notes = {folder.name: open_images(folder).notes for folder in tmp_path.iterdir()}
    assert notes == {
        "alpha": ("transparency dropped",),
        "grey alpha": ("transparency dropped",),
        "ink": ("CMYK turned into RGB",),
        "plain": (),
        "bits": (),
    }
    (tmp_path / "palette").mkdir()
    image = Image.fromarray(COLOUR[0]).quantize(8)
    image.save(tmp_path / "palette/a.png", transparency=3)
    source = open_images(tmp_path / "palette")
    assert source.notes == ("transparency dropped",)
    np.testing.assert_array_equal(source.gather(np.array([0]))[0], np.moveaxis(np.asarray(image.convert("RGB")), 2, 0))
    bits = open_images(tmp_path / "bits")
    assert set(np.unique(bits.gather(np.array([0])))) <= {0, 255}


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 5\n%%EndComments\nshowpage\n"


def test_only_the_formats_that_are_named_are_decoded(tmp_path, monkeypatch):
    """Pillow goes by content: PostScript in x.png would reach Ghostscript."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("reached Ghostscript"))
    write(tmp_path / "a", {"x.png": POSTSCRIPT})
    with pytest.raises(DataError, match=r"x\.png: found no readable image"):
        open_images(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for suffix in ("ico", "tga", "jp2", "pcx"):
        Image.fromarray(COLOUR[0]).save(tmp_path / f"b/x.{suffix}")
        (tmp_path / f"b/x.{suffix}").rename(tmp_path / "b/x.png")
        with pytest.raises(DataError, match=r"x\.png: found no readable image"):
            open_images(tmp_path / "b")
    for suffix in ("png", "jpg", "bmp", "gif", "tif", "webp", "ppm"):
        (tmp_path / suffix).mkdir()
        Image.fromarray(COLOUR[0]).save(tmp_path / suffix / f"x.{suffix}")
        assert open_images(tmp_path / suffix).shape == (3, 6, 5)


@pytest.mark.parametrize("size", [(1 << 14, 1 << 13), (60_000, 60_000)])
def test_an_image_of_too_many_pixels_is_refused_by_its_header(tmp_path, size):
    content = png(GREY[0], 8, 0).replace(struct.pack(">II", 5, 6), struct.pack(">II", *size))
    start = content.index(b"IHDR")
    fixed = content[: start + 17] + struct.pack(">I", zlib.crc32(content[start : start + 17])) + content[start + 21 :]
    write(tmp_path / "bomb", {"a.png": fixed})
    with pytest.raises(DataError, match=r"a\.png: found .*(16384x8192 pixels; expected at most 2\*\*26|3600000000)"):
        open_images(tmp_path / "bomb")


def test_images_that_change_or_vanish_under_a_run_are_named(tmp_path):
    (tmp_path / "some").mkdir()
    for number, image in enumerate(GREY):
        Image.fromarray(image).save(tmp_path / f"some/{number}.png")
    source = open_images(tmp_path / "some", in_memory_bytes=0)
    held = open_images(tmp_path / "some")
    Image.fromarray(GREY[0, :3]).save(tmp_path / "some/0.png")
    with pytest.raises(DataError, match=r"0\.png: found another file than when the run began"):
        source.gather(np.array([1, 0]))
    Image.fromarray(255 - GREY[1]).save(tmp_path / "some/1.png")
    os.utime(tmp_path / "some/1.png", ns=(1, 1))
    with pytest.raises(DataError, match=r"1\.png: found another file"):
        source.gather(np.array([1]))
    (tmp_path / "some/2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png: found no such file; expected it to stay"):
        source.gather(np.array([2]))
    np.testing.assert_array_equal(source.gather(np.array([3]))[0, 0], GREY[3])
    np.testing.assert_array_equal(held.gather(np.arange(4))[:, 0], GREY)


PAIRS = {
    "siblings": ["images/001.png", "images/002.png", "masks/001.png", "masks/002.png"],
    "other suffix": ["imgs/001.jpg", "labels/001.png"],
    "deeper": ["images/train/001.png", "annotations/train/001.png"],
    "of a class": ["cats/images/001.png", "cats/masks/001.png"],
    "masks of plain": ["scans/001.png", "masks/001.png"],
    "voc": ["JPEGImages/001.jpg", "SegmentationClass/001.png"],
    "marked": ["001.png", "001_mask.png", "002.png"],
    "two formats": ["001.jpg", "001.png", "002.jpg", "002.png", "003.jpg"],
}
APART = {
    "classes numbered alike": ["cats/001.png", "cats/002.png", "dogs/001.png", "dogs/002.png"],
    "classes in images": ["images/cats/001.png", "images/dogs/001.png"],
    "other names": ["images/001.png", "labels/overview.png"],
    "deep classes": ["a/x/1.png", "a/y/1.png", "b/x/1.png"],
    "one copy": ["001.jpg", "001.png", "002.jpg", "003.png"],
    "a word": ["mask_001.png", "mask.png", "unmask.png"],
}


def place(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(COLOUR[number % 4]).save(folder / name)
    return folder


@pytest.mark.parametrize("case", PAIRS)
def test_masks_beside_images_are_not_mixed_with_them(tmp_path, case):
    with pytest.raises(DataError, match=r"found \S+ beside \S+: are those masks or labels.*--data"):
        open_dataset(str(place(tmp_path / "data", PAIRS[case])))


@pytest.mark.parametrize("case", APART)
def test_classes_are_no_masks(tmp_path, case):
    assert len(open_images(place(tmp_path / "data", APART[case]))) == len(APART[case])
