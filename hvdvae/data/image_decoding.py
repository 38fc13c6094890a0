"""One image file: what it is by its header, and its pixels. Whatever Pillow would lose is refused by name."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from hvdvae.data.unchanged import Stamp, stamp_of
from hvdvae.errors import DataError

FORMATS = tuple(
    str(plugin.format)
    for plugin in (
        PngImagePlugin.PngImageFile,
        JpegImagePlugin.JpegImageFile,
        BmpImagePlugin.BmpImageFile,
        GifImagePlugin.GifImageFile,
        TiffImagePlugin.TiffImageFile,
        WebPImagePlugin.WebPImageFile,
        PpmImagePlugin.PpmImageFile,
    )
)
"""Pillow goes by content, and knows fifty more, among them PostScript, which it gives to another program."""
MOST_PIXELS = 1 << 26
"""Of an image: a file of some kilobytes may claim any number."""

_GREY = frozenset({"1", "L", "LA", "La"})
_COLOUR = frozenset({"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB"})
_DEEP = {"F": "float32", "I": "int32", "I;16": "uint16", "I;16L": "uint16", "I;16B": "uint16", "I;16N": "uint16"}
_ORIENTATION = 0x0112
_BITS, _SAMPLE_FORMAT = 258, 339  # Of TIFF.
_NETPBM = re.compile(
    rb"P[36](?:\s+|#[^\n]*\n)+\d+(?:\s+|#[^\n]*\n)+\d+(?:\s+|#[^\n]*\n)+(\d+)|P7\n[^\0]*?MAXVAL\s+(\d+)"
)


class Header(NamedTuple):
    """What a file says of its image, which stands upright."""

    width: int
    height: int
    kind: str
    """grey or colour (8 bits), or the dtype of deeper grey pixels: uint16, int32, uint32, float32."""
    notes: frozenset[str]
    """What decoding does besides."""
    stamp: Stamp
    """Of the file, to notice a change."""


def read_header(file: Path) -> Header:
    """What `file` is, without its pixels.

    Raises DataError for what is no image, for several in one file, too many pixels, and colours of more than 8 bits.
    """
    problem = "found no readable image ({}); expected one: remove the file"
    # Of Pillow's own limit on pixels, above ours.
    quiet = warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)
    with quiet, _opened(file, problem) as (image, stream, stamp):
        kind, notes = _kind(file, image, stream), set()
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise DataError(f"{file}: found {width}x{height} pixels; expected at most 2**26: make the image smaller")
        if image.format != "MPO" and getattr(image, "is_animated", False):
            count = getattr(image, "n_frames", 2)
            raise DataError(
                f"{file}: found {count} pages or frames; expected one image a file: save each as a file of its own, or "
                "all of them as an array (N, H, W) in a .npy file"
            )
        if image.format == "MPO":
            notes.add("of MPO files the first picture")
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            notes.add("transparency dropped")
        if image.mode in ("CMYK", "YCbCr", "LAB"):
            notes.add(f"{image.mode} turned into RGB")
        # Pillow decodes all of a PNG to look for EXIF behind the pixels; what is there is found when it is decoded.
        turned = image.getexif().get(_ORIENTATION, 1) if image.format != "PNG" or "exif" in image.info else 1
        if turned in range(2, 9):
            notes.add("turned upright as EXIF says")
        if turned in range(5, 9) and image.format != "TIFF":  # Pillow has turned a TIFF already.
            width, height = height, width
    return Header(width, height, kind, frozenset(notes), stamp)


def decode(file: Path, header: Header, kind: str) -> np.ndarray:
    """Pixels of `file`, (H, W) or (H, W, 3), upright, as `kind`: grey, colour or a dtype.

    Raises DataError where it is torn, or is not what its header said when the run began.
    """
    with _opened(file, "found a truncated or corrupt image ({}); expected a whole one") as (image, _, stamp):
        if stamp != header.stamp:
            raise DataError(f"{file}: found another file than when the run began; expected it to stay: start anew")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.size != (header.width, header.height):
            found = f"{image.size[0]}x{image.size[1]}"
            raise DataError(
                f"{file}: found {found} pixels, turned as its EXIF says; expected {header.width}x"
                f"{header.height} as its header has: save it upright"
            )
        if kind in ("grey", "colour"):
            return np.asarray(image.convert("L" if kind == "grey" else "RGB"), np.uint8)
        pixels = np.asarray(image)
        return pixels.view(np.uint32) if kind == "uint32" else pixels


@contextmanager
def _opened(file: Path, problem: str) -> Iterator[tuple[Image.Image, BinaryIO, Stamp]]:
    try:
        with file.open("rb") as stream:
            stamp = stamp_of(os.fstat(stream.fileno()))
            with Image.open(stream, formats=FORMATS) as image:
                yield image, stream, stamp
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{file}: found no such file; expected it to stay while a run reads it") from error
    except Exception as error:  # Of a torn file Pillow raises nearly everything.
        raise DataError(f"{file}: {problem.format(error or type(error).__name__)}") from error


def _kind(file: Path, image: Image.Image, stream: BinaryIO) -> str:
    bits = _bits_of_colours(image, stream)
    if bits > 8:
        raise DataError(
            f"{file}: found colours of {bits} bits, of which Pillow reads 8; expected 8 bits a channel: read the "
            "images with imageio, tifffile or OpenCV, and save the array (N, H, W, 3) as .npy, as it is for "
            "--likelihood gaussian, or divided by its maximum, as float32"
        )
    if image.mode in _GREY:
        return "grey"
    if image.mode in _COLOUR:
        return "colour"
    if image.mode not in _DEEP:
        raise DataError(f"{file}: found pixels of mode {image.mode}; expected grey or RGB: convert the image")
    tags = getattr(image, "tag_v2", {})
    # Pillow reads unsigned numbers of 32 bits as signed ones.
    unsigned = tags.get(_BITS) == (32,) and tags.get(_SAMPLE_FORMAT, (1,)) == (1,) and image.mode == "I"
    return "uint32" if unsigned else _DEEP[image.mode]


def _bits_of_colours(image: Image.Image, stream: BinaryIO) -> int:
    """Bits of a channel in the file, where it has more than one; else 0."""
    if image.mode in _DEEP or image.mode in ("1", "L", "P"):
        return 0
    if image.format == "TIFF":
        return int(max(getattr(image, "tag_v2", {}).get(_BITS, (8,))))
    if image.format in ("PNG", "PPM"):
        place = stream.tell()
        stream.seek(0)
        start = stream.read(4096)
        stream.seek(place)
        if image.format == "PNG":
            return start[24]  # IHDR comes first.
        found = _NETPBM.match(start)
        return int(found.group(1) or found.group(2)).bit_length() if found else 8
    return 8
