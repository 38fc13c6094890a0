"""A folder of image files of one size: decoded once if they fit in memory, else batch by batch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hvdvae.data.image_decoding import Header, decode, read_header
from hvdvae.data.image_files import SUFFIXES, check_no_pairs, find_images
from hvdvae.data.source import ArraySource, Indices, Source, Values
from hvdvae.errors import DataError

IN_MEMORY_BYTES = 1 << 30
"""Folders whose decoded pixels take up to this size are decoded once, which also checks every file."""

_BYTES = ("grey", "colour")


def open_images(folder: Path, *, in_memory_bytes: int = IN_MEMORY_BYTES) -> Source:
    """Source (C, H, W) over the images below `folder`: uint8, C is 1 if all are grey, else 3.

    Grey images of 16 or 32 bits become float32, as they are. Images stand upright, as EXIF says, and lose their
    transparency; the source's notes say so. Raises DataError naming the file that is torn, of another size, of several
    pages, of colours of 16 bits, or the mask of another. Folders too large for memory have their headers checked here
    and their pixels when they are read.
    """
    files = find_images(folder)
    if not files:
        raise DataError(f"{folder}: found no image; expected files ending in {', '.join(sorted(SUFFIXES))}")
    check_no_pairs(folder, files)
    source = ImageSource(folder, files)
    if source.nbytes > in_memory_bytes:
        return source
    pixels = np.empty((len(files), *source.shape), source.dtype)
    for start, values in source.chunks():
        pixels[start : start + len(values)] = values
    decoded = ArraySource(pixels, str(folder))
    decoded.white_is_255, decoded.stored, decoded.notes = source.white_is_255, source.stored, source.notes
    return decoded


class ImageSource(Source):
    """Image files that are decoded at each gather. The constructor reads every file's header."""

    in_memory = False

    def __init__(self, folder: Path, files: list[Path]) -> None:
        self._files = files
        self._headers = [read_header(file) for file in files]
        self._kind = _common_kind(files, self._headers)
        first = self._headers[0]
        self.path = str(folder)
        self.white_is_255 = self._kind in _BYTES
        self.stored = np.dtype(np.uint8 if self.white_is_255 else self._kind)
        self.dtype = np.dtype(np.uint8 if self.white_is_255 else np.float32)
        self.shape = (3 if self._kind == "colour" else 1, first.height, first.width)
        self.notes = tuple(sorted(frozenset().union(*(header.notes for header in self._headers))))

    def __len__(self) -> int:
        return len(self._files)

    def gather(self, indices: Indices) -> Values:
        channels, height, width = self.shape
        batch = np.empty((len(indices), height, width, channels), self.dtype)
        for slot, index in zip(batch, indices, strict=True):
            pixels = decode(self._files[int(index)], self._headers[int(index)], self._kind)
            slot[:] = pixels.reshape(slot.shape)
        return np.ascontiguousarray(np.moveaxis(batch, 3, 1))


def _common_kind(files: Sequence[Path], headers: Sequence[Header]) -> str:
    first, kinds = headers[0], {header.kind for header in headers}
    for file, header in zip(files, headers, strict=True):
        if (header.width, header.height) != (first.width, first.height):
            raise DataError(
                f"{file}: found {header.width}x{header.height} pixels; expected {first.width}x{first.height} as in "
                f"{files[0]}: resize the images"
            )
        if header.kind != first.kind and not kinds <= set(_BYTES):
            raise DataError(
                f"{file}: found pixels of {_words(header.kind)}; expected {_words(first.kind)} as in {files[0]}: "
                "convert the images to one kind"
            )
    return "colour" if "colour" in kinds else first.kind


def _words(kind: str) -> str:
    return f"8 bits ({kind})" if kind in _BYTES else kind
