"""Fully connected networks, as in Burda, Grosse, Salakhutdinov 2016: Glorot uniform weights, zero biases."""

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hvdvae.vae.activations import build_activation
from hvdvae.vae.pieces import Piece, before, pieces_of


class GlorotLinear(nn.Linear):
    """Linear with Glorot uniform weights and a zero bias."""

    def __init__(self, inputs: int, outputs: int, parts: int = 1) -> None:
        """parts: how many layers share this matrix, each with a fan-out of its own."""
        self._parts = parts
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        """Draw weights, in place."""
        # Its draws are overwritten, but count: a seed's weights stay what they were.
        super().reset_parameters()
        with torch.no_grad():
            for weight in self.weight.chunk(self._parts):
                nn.init.xavier_uniform_(weight)
            nn.init.zeros_(self.bias)


def stack(sizes: Sequence[int], activation: str) -> Iterable[nn.Module]:
    """Linear layers sizes[0] -> ... -> sizes[-1], each followed by the activation."""
    for inputs, outputs in itertools.pairwise(sizes):
        yield GlorotLinear(inputs, outputs)
        yield build_activation(activation)


class GaussianMLP(nn.Sequential):
    """inputs -> hidden ... -> (mean, log sigma): (..., inputs) to (..., 2 * outputs), both by one matrix."""

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int, activation: str) -> None:
        sizes = [inputs, *hidden]
        super().__init__(*stack(sizes, activation), GlorotLinear(sizes[-1], 2 * outputs, parts=2))


class MLPEncoder(nn.Module):
    """An image (B, *shape) to (B, 2 * latent): mean and log sigma of q(z|x)."""

    def __init__(self, shape: Sequence[int], hidden: Sequence[int], latent: int, activation: str) -> None:
        super().__init__()
        self.network = GaussianMLP(math.prod(shape), hidden, latent, activation)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, *shape)."""
        out: Tensor = self.network(x.flatten(1))
        return out

    def pieces(self) -> list[Piece]:
        """The same in pieces."""
        first, *rest = pieces_of(self.network, "network")
        return [before(lambda x: x.flatten(1), first), *rest]


class MLPDecoder(nn.Module):
    """z (N, latent) to the likelihood's parameters (N, parameters * shape[0], *shape[1:])."""

    def __init__(
        self, latent: int, hidden: Sequence[int], shape: Sequence[int], parameters: int, activation: str
    ) -> None:
        super().__init__()
        sizes = [latent, *hidden]
        self.wide = (parameters * shape[0], *shape[1:])
        self.network = nn.Sequential(*stack(sizes, activation))
        self.output = GlorotLinear(sizes[-1], math.prod(self.wide), parts=parameters)

    def forward(self, z: Tensor) -> Tensor:
        """z: (N, latent)."""
        params: Tensor = self.output(self.network(z))
        return params.view(-1, *self.wide)

    def pieces(self) -> list[Piece]:
        """The same in pieces."""
        last = Piece(("output",), lambda h: self.output(h).view(-1, *self.wide))
        return [*pieces_of(self.network, "network"), last]

    def set_location_bias(self, location: Tensor) -> None:
        """Writes the output bias of the location parameters, (*shape), in place."""
        with torch.no_grad():
            self.output.bias[: location.numel()] = location.flatten()
