"""Convolutional networks: kernel 4, stride 2, so that each layer halves (or doubles) the image exactly."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvdvae.errors import ConfigError
from hvdvae.vae.activations import build_activation
from hvdvae.vae.mlp import GlorotLinear
from hvdvae.vae.pieces import Piece, before, pieces_of
from hvdvae.vae.upsample import Upsample


def check_image(shape: Sequence[int], channels: Sequence[int]) -> None:
    """Raises ConfigError unless shape is (C, H, W) with H and W divisible by 2**len(channels)."""
    if not channels or min(channels) < 1:
        raise ConfigError(f"channels: found {list(channels)}, expected one or more positive counts, such as 32,64")
    if len(shape) != 3:
        raise ConfigError(f"model conv: found data of shape {tuple(shape)}, expected images (C, H, W); try --model mlp")
    step = 2 ** len(channels)
    for axis, size in (("height", shape[1]), ("width", shape[2])):
        if size % step or size == 0:
            below, above = size // step * step, (size // step + 1) * step
            near = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(
                f"model conv: the images' {axis} is {size}, and {len(channels)} stride-2 layers need a "
                f"multiple of {step}: crop or pad to {near}, or give --hidden (its channels) fewer layers"
            )


class ConvEncoder(nn.Module):
    """Images (B, C, H, W) to (B, 2 * latent): mean and log sigma of q(z|x)."""

    def __init__(
        self, shape: Sequence[int], channels: Sequence[int], latent: int, activation: str, batch_norm: bool
    ) -> None:
        super().__init__()
        check_image(shape, channels)
        layers: list[nn.Module] = []
        for inputs, outputs in zip((shape[0], *channels[:-1]), channels, strict=True):
            layers.append(nn.Conv2d(inputs, outputs, kernel_size=4, stride=2, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(outputs))
            layers.append(build_activation(activation))
        self.network = nn.Sequential(*layers)
        pixels = math.prod(shape[1:]) // 4 ** len(channels)
        self.output = GlorotLinear(channels[-1] * pixels, 2 * latent, parts=2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W), in any memory format."""
        h = self.network(_channels_last(x))
        return self._out(h)

    def pieces(self) -> list[Piece]:
        """The same in pieces."""
        first, *rest = pieces_of(self.network, "network")
        return [before(_channels_last, first), *rest, Piece(("output",), self._out)]

    def _out(self, h: Tensor) -> Tensor:
        out: Tensor = self.output(h.permute(0, 2, 3, 1).flatten(1))
        return out


def _channels_last(x: Tensor) -> Tensor:
    """x in the memory format that is the faster one for convolutions, on a CPU and on a GPU.

    With one channel both formats are the same bytes and torch would take it for the other one: then say so by
    the strides.
    """
    if x.shape[1] == 1:
        return x.reshape(x.shape[0], *x.shape[2:], 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


class ConvDecoder(nn.Module):
    """z (N, latent) to the likelihood's parameters (N, parameters * C, H, W); the encoder's mirror."""

    def __init__(
        self,
        latent: int,
        channels: Sequence[int],
        shape: Sequence[int],
        parameters: int,
        activation: str,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        check_image(shape, channels)
        step = 2 ** len(channels)
        self.grid = (shape[1] // step, shape[2] // step, channels[-1])  # channels last: no copy on the way in
        self.input = GlorotLinear(latent, math.prod(self.grid))
        layers: list[nn.Module] = [build_activation(activation)]
        for inputs, outputs in zip(channels[:0:-1], channels[-2::-1], strict=True):
            layers.append(Upsample(inputs, outputs, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(outputs))
            layers.append(build_activation(activation))
        self.network = nn.Sequential(*layers)
        self.output = Upsample(channels[0], parameters * shape[0], bias=True)

    def forward(self, z: Tensor) -> Tensor:
        """z: (N, latent)."""
        params: Tensor = self.output(self.network(self._in(z)))
        return params

    def pieces(self) -> list[Piece]:
        """The same in pieces."""
        # The network begins with an activation, which has no parameters: a piece of its own, put to the input's.
        start, *rest = pieces_of(self.network, "network")
        first = Piece(("input", *start.modules), lambda z: start.run(self._in(z)))
        return [first, *rest, Piece(("output",), lambda h: self.output(h))]

    def _in(self, z: Tensor) -> Tensor:
        h: Tensor = self.input(z).view(-1, *self.grid).permute(0, 3, 1, 2)
        return h

    def set_location_bias(self, location: Tensor) -> None:
        """Writes the output bias of the location parameters, (C, H, W), in place.

        There is one bias a channel: the pixels' median, because a few outlying pixels (the centre of a digit)
        would drag the mean of the logits.
        """
        with torch.no_grad():
            assert self.output.bias is not None
            self.output.bias[: location.shape[0]] = location.flatten(1).median(1).values
