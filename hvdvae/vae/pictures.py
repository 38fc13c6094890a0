"""Batches of examples as one picture: a grid, and its PNG file."""

import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hvdvae.errors import ConfigError
from hvdvae.whole_file import write_whole

Picture = np.ndarray[Any, np.dtype[np.uint8]]

_GAP = 2  # pixels between images
_SMALLEST = 28  # images smaller than this are enlarged, by whole factors, to be seen at all


Shades = tuple[float, float]
"""The value that is black, and the one that is white."""
UNIT: Shades = (0.0, 1.0)


def shades_of(low: float, high: float) -> Shades:
    """The shades of values from `low` to `high`: 0 to 1 for images, and their own range for measurements. Pure."""
    return UNIT if (low >= 0 and high <= 1) or low == high else (low, high)


def image_grid(images: Tensor, *, columns: int | None = None, shades: Shades = UNIT) -> Picture:
    """One picture (H, W, 1 or 3) uint8 of all images, row by row on a gray ground.

    images: (N, C, H, W) with 1 or 3 channels, or (N, D) with a square D; values outside `shades` are clipped.
    columns: as many as rows by default. Raises ConfigError for other shapes.
    """
    pixels = _as_pixels(images, shades)
    count, height, width, channels = pixels.shape
    zoom = max(1, math.ceil(_SMALLEST / min(height, width)))
    pixels = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width = height * zoom, width * zoom
    columns = columns if columns is not None else math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, channels), 128, np.uint8)
    for index, image in enumerate(pixels):
        top = _GAP + index // columns * (height + _GAP)
        left = _GAP + index % columns * (width + _GAP)
        grid[top : top + height, left : left + width] = image
    return grid


def pair_grid(originals: Tensor, reconstructions: Tensor, *, columns: int = 8, shades: Shades = UNIT) -> Picture:
    """Rows of originals, each with the row of its reconstructions below. Shapes as in image_grid, alike."""
    gray = sum(shades) / 2
    rows: list[Tensor] = []
    for start in range(0, len(originals), columns):
        for images in (originals, reconstructions):
            row = images[start : start + columns]
            blank = row.new_full((columns - len(row), *row.shape[1:]), gray)
            rows.extend((*row, *blank))
    return image_grid(torch.stack(rows), columns=columns, shades=shades)


def save_picture(path: str | os.PathLike[str], picture: Picture) -> None:
    """Writes a picture of image_grid or pair_grid as PNG, replacing the file. Raises ConfigError naming it."""
    png = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(png, format="PNG")
    write_whole(Path(path), png.getvalue())


def save_grid(
    path: str | os.PathLike[str], images: Tensor, *, columns: int | None = None, shades: Shades = UNIT
) -> None:
    """Writes the image_grid of these images as PNG, replacing the file."""
    save_picture(path, image_grid(images, columns=columns, shades=shades))


def legend(shades: Shades) -> str:
    """What black and white mean, where that is not 0 and 1; else nothing. Pure."""
    return "" if shades == UNIT else f"black is {shades[0]:g}, white {shades[1]:g}"


def _as_pixels(images: Tensor, shades: Shades) -> Picture:
    """(N, H, W, C) uint8."""
    if images.dim() == 2:
        side = math.isqrt(images.shape[1])
        if side * side != images.shape[1]:
            raise ConfigError(f"pictures: found vectors of {images.shape[1]} numbers, expected a square number")
        images = images.reshape(-1, 1, side, side)
    if images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ConfigError(f"pictures: found shape {tuple(images.shape)}, expected (N, 1 or 3, H, W) and N > 0")
    low, high = shades
    units = (images.detach().float() - low) / (high - low)
    levels = units.nan_to_num(0).clamp(0, 1).mul(255).round()
    pixels: Picture = levels.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)
    return pixels
