"""A folder of image files of one size: decoded once if they fit in memory, else batch by batch."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from hvdvae.data.source import ArraySource, Indices, Source, Values
from hvdvae.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
IN_MEMORY_BYTES = 1 << 30
"""Folders whose decoded pixels take up to this size are decoded once, which also checks every file."""

_GREY = frozenset({"1", "L", "LA"})
_COLOUR = frozenset({"P", "RGB", "RGBA", "CMYK", "YCbCr"})
_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
)  # all of these leave PIL for a torn file


def find_images(folder: Path) -> list[Path]:
    """Image files below `folder`, subfolders (classes) included, in an order that no file system changes.

    Links to folders are followed; names that begin with a dot are left out, as programs write them beside images.
    """
    return sorted(_below(folder, frozenset())) if folder.is_dir() else []


def _below(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    here = folder.resolve()
    if here in above:  # A link to a folder that it lies in.
        return
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.suffix.lower() in SUFFIXES and entry.is_file():
            yield entry
        elif entry.is_dir():
            yield from _below(entry, above | {here})


def open_images(folder: Path, *, in_memory_bytes: int = IN_MEMORY_BYTES) -> Source:
    """Source (C, H, W), uint8, over the images below `folder`: C is 1 if all are grey, else 3.

    Drops alpha. Raises DataError naming the file that is torn, of another size, or not of 8 bits. Folders too
    large for memory have their headers checked here and their pixels when they are read.
    """
    files = find_images(folder)
    if not files:
        raise DataError(f"{folder}: found no image; expected files ending in {', '.join(sorted(SUFFIXES))}")
    source = ImageSource(folder, files)
    if source.nbytes > in_memory_bytes:
        return source
    pixels = np.empty((len(files), *source.shape), np.uint8)
    for start, values in source.chunks():
        pixels[start : start + len(values)] = values
    decoded = ArraySource(pixels, str(folder))
    decoded.white_is_255 = True
    return decoded


class ImageSource(Source):
    """Image files that are decoded at each gather. The constructor reads every file's header."""

    in_memory = False
    white_is_255 = True

    def __init__(self, folder: Path, files: list[Path]) -> None:
        self._files = files
        size, colour = _checked_headers(files)
        self._mode = "RGB" if colour else "L"
        self.path, self.dtype = str(folder), np.dtype(np.uint8)
        self.shape = (3 if colour else 1, size[1], size[0])

    def __len__(self) -> int:
        return len(self._files)

    def gather(self, indices: Indices) -> Values:
        channels, height, width = self.shape
        batch = np.empty((len(indices), height, width, channels), np.uint8)
        for slot, index in zip(batch, indices, strict=True):
            slot[:] = self._decode(self._files[int(index)]).reshape(slot.shape)
        return np.ascontiguousarray(np.moveaxis(batch, 3, 1))

    def _decode(self, file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                return np.asarray(image.convert(self._mode), np.uint8)
        except _BROKEN as error:
            raise DataError(f"{file}: found a truncated or corrupt image ({error}); expected a whole one") from error


def _checked_headers(files: Iterable[Path]) -> tuple[tuple[int, int], bool]:
    first: tuple[Path, tuple[int, int]] | None = None
    colour = False
    for file in files:
        try:
            with Image.open(file) as image:
                size, mode = image.size, image.mode
        except _BROKEN as error:
            raise DataError(f"{file}: found no readable image ({error}); expected one: remove the file") from error
        if mode not in _GREY | _COLOUR:
            raise DataError(f"{file}: found pixels of mode {mode}; expected 8 bits a channel: convert the image")
        first = first or (file, size)
        if size != first[1]:
            raise DataError(
                f"{file}: found {size[0]}x{size[1]} pixels; expected {first[1][0]}x{first[1][1]} as in "
                f"{first[0]}: resize the images"
            )
        colour = colour or mode in _COLOUR
    if first is None:
        raise ValueError("no files")
    return first[1], colour
