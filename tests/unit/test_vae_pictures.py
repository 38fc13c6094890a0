"""Samples, reconstructions, and their pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hvdvae.errors import ConfigError
from hvdvae.vae import build_model, image_grid, pair_grid, reconstruct, sample_images, save_grid
from hvdvae.vae.pictures import UNIT, legend, shades_of


@pytest.mark.parametrize("name", ["mlp", "mlp2", "conv"])
def test_samples_and_reconstructions_are_images(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, (3, 8, 8))
    for images in (
        sample_images(model, 5, torch.Generator().manual_seed(0)),
        reconstruct(model, torch.rand(5, 3, 8, 8), torch.Generator().manual_seed(0)),
    ):
        assert images.shape == (5, 3, 8, 8)
        assert images.min() >= 0
        assert images.max() <= 1
    assert model.training
    seeded = [sample_images(model, 5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])


def test_samples_of_two_layers_have_the_spread_of_the_prior() -> None:
    """z1 = mean(z2) + sigma(z2) eps: with zero networks both layers are standard normal."""
    model = build_model("mlp2", (16,), hidden=(8, 8), latent=(4, 2))
    with torch.no_grad():
        for parameter in model.upper.parameters():
            parameter.zero_()
        z = model.draw_prior(4000, torch.Generator().manual_seed(0))
    assert z.shape == (4000, 4)
    torch.testing.assert_close(z.std(0), torch.ones(4), atol=0.06, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_every_image_in_its_place(channels: int, tmp_path: Path) -> None:
    images = torch.rand(5, channels, 28, 32)
    path = tmp_path / "grid.png"
    save_grid(path, images, columns=3)
    read = np.asarray(Image.open(path))
    read = read[..., None] if channels == 1 else read
    assert read.shape == (2 * 30 + 2, 3 * 34 + 2, channels)
    for index in range(5):
        top, left = 2 + index // 3 * 30, 2 + index % 3 * 34
        expected = (images[index] * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
        np.testing.assert_array_equal(read[top : top + 28, left : left + 32], expected)


def test_vectors_of_a_square_number_are_images_and_values_are_clipped() -> None:
    vectors = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    grid = image_grid(vectors)
    assert grid.dtype == np.uint8
    assert grid.shape[-1] == 1
    assert [grid[2, 2, 0], grid[2, -3, 0], grid[-3, 2, 0], grid[-3, -3, 0]] == [0, 0, 255, 255]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 50), "vectors of 50"),
        ((2, 2, 8, 8), r"\(2, 2, 8, 8\)"),
        ((0, 1, 8, 8), "N > 0"),
        ((8, 8, 8), "8, 8, 8"),
    ],
)
def test_what_is_no_image_is_refused_by_name(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        image_grid(torch.zeros(shape))


def test_pairs_stand_one_above_the_other() -> None:
    originals, reconstructions = torch.zeros(3, 1, 28, 28), torch.ones(3, 1, 28, 28)
    grid = pair_grid(originals, reconstructions, columns=2)[..., 0]
    rows = [grid[2 + row * 30, 2] for row in range(4)]
    assert rows == [0, 255, 0, 255]
    assert grid[2 + 2 * 30, 2 + 30] == 128  # no fourth example


def test_gaussian_means_are_on_the_scale_of_the_data() -> None:
    """Spectra from -3.8 to 66.3 came back cut to [0, 1]."""
    model = build_model("mlp", (1, 8, 8), likelihood="gaussian")
    spectra = torch.linspace(-3.8, 66.3, 64).reshape(1, 8, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.set_location_bias(model.likelihood.location(spectra))
    for images in (sample_images(model, 2), reconstruct(model, spectra.expand(2, 1, 8, 8))):
        torch.testing.assert_close(images, spectra.expand(2, 1, 8, 8))


def test_shades_are_the_range_of_measurements_and_are_said() -> None:
    spectra = torch.linspace(-3.8, 66.3, 4)[None]
    shades = shades_of(-3.8, 66.3)
    grid = image_grid(spectra, shades=shades)
    assert [grid[2, 2, 0], grid[2, -3, 0], grid[-3, 2, 0], grid[-3, -3, 0]] == [0, 85, 170, 255]
    pairs = pair_grid(spectra, spectra, columns=2, shades=shades)[..., 0]
    assert (pairs[2, 2], pairs[2, 2 + 30]) == (0, 128)
    assert legend(shades) == "black is -3.8, white 66.3"
    for low, high in ((0.0, 1.0), (0.2, 0.9), (5.0, 5.0)):
        assert shades_of(low, high) == UNIT
    assert legend(UNIT) == ""
