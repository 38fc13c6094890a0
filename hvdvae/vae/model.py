"""A variational autoencoder: q(z|x), p(x|z) and any number of stochastic layers above the first.

Letters in shapes: B examples, K samples of each, L latent dimensions of one layer, N = K * B rows of a
decoder pass. Everything in nats is float32, also under autocast.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from hvdvae.errors import ConfigError
from hvdvae.vae.gaussian import DiagonalGaussian
from hvdvae.vae.likelihoods import Likelihood
from hvdvae.vae.noise import BatchNoise

Noise = Tensor | Sequence[Tensor] | None


class Draw(NamedTuple):
    """Samples of all latent layers given x."""

    z: Tensor  # (K, B, L) of the first layer, for the decoder
    kl: tuple[Tensor, ...]  # a layer: (1 or K, B, L) nats; exact where there is a closed form, else at the sample
    log_ratio: Tensor | None  # (K, B) log q(z|x) - log p(z) at the samples, where it was asked for
    posteriors: tuple[DiagonalGaussian, ...]  # a layer: q given the layer below, (1 or K, B, L)


class Terms(NamedTuple):
    """What every objective is made of."""

    log_px: Tensor  # (K, B) log p(x|z)
    kl: tuple[Tensor, ...]  # as in Draw
    log_ratio: Tensor | None  # as in Draw


class Decoder(Protocol):
    """What VAE asks of a decoder besides being an nn.Module: (N, L) -> likelihood parameters (N, *wide)."""

    def set_location_bias(self, location: Tensor) -> None: ...


class UpperLayer(nn.Module):
    """One more stochastic layer: q(above | below) and p(below | above), each a network to (..., 2L)."""

    def __init__(self, infer: nn.Module, generate: nn.Module) -> None:
        super().__init__()
        self.infer = infer
        self.generate = generate


class VAE(nn.Module):
    """Networks and a likelihood, put together.

    encoder: (B, *shape) -> (B, 2 * latent[0]), means and log sigmas; decoder: (N, latent[0]) -> the
    likelihood's parameters (N, *wide); latent: the sizes of the stochastic layers, bottom up; upper: one less
    than those.
    """

    def __init__(
        self,
        shape: Sequence[int],
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        latent: Sequence[int],
        upper: Iterable[UpperLayer] = (),
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.latent = tuple(latent)
        self.likelihood = likelihood
        self.encoder = encoder
        self.decoder = decoder
        self.upper = nn.ModuleList(upper)
        self._noise: BatchNoise | None = None
        if len(self.latent) != 1 + len(self.upper):
            raise ConfigError(f"latent: found {list(latent)} for a model of {1 + len(self.upper)} stochastic layers")

    @property
    def chains(self) -> list[str]:
        """Names of the submodules whose layers run one after the other, each chain by itself."""
        above = [f"upper.{layer}.{part}" for layer in range(len(self.upper)) for part in ("infer", "generate")]
        return ["encoder", "decoder", *above]

    @contextmanager
    def parts_of_batch(self, examples: int) -> Iterator[None]:
        """Inside, batches are parts of one of so many examples, in their order: noise is that of the whole.

        Not where the model is compiled: it would be, anew, for every batch.
        """
        mine = self._noise = BatchNoise(examples) if self._compiled_call_impl is None else None
        try:
            yield
        finally:
            if self._noise is mine:
                self._noise = None

    def forward(
        self,
        x: Tensor,
        samples: int = 1,
        importance: bool = False,
        noise: Noise = None,
        generator: torch.Generator | None = None,
    ) -> Terms:
        """Encodes x once, draws `samples` latents of each example, and scores x under each.

        x: (B, *shape). importance: also the sampled log q(z|x) - log p(z). Noise as in `draw`.
        """
        drawn = self.draw(self.encode(x), samples, importance, noise, generator)
        return Terms(self.log_px(x, drawn.z), drawn.kl, drawn.log_ratio)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """q(z|x) of the first layer, (B, L); x: (B, *shape)."""
        return DiagonalGaussian(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Likelihood parameters (..., *wide); z: (..., L) of the first layer."""
        params: Tensor = self.decoder(z.flatten(0, -2))
        return params if z.dim() == 2 else params.view(*z.shape[:-1], *params.shape[1:])

    def log_px(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), (K, B) nats; x: (B, *shape), z: (K, B, L)."""
        return self.likelihood.log_prob(self.decode(z), x)

    def draw(
        self,
        q: DiagonalGaussian,
        samples: int = 1,
        importance: bool = False,
        noise: Noise = None,
        generator: torch.Generator | None = None,
    ) -> Draw:
        """Draws `samples` latents of each example, bottom up; q: what `encode` returned, (B, L).

        noise: standard normal, (samples, B, L), one tensor a stochastic layer; else from `generator`, else
        from torch's default generator. The KL of the top layer is in closed form given the layer below; of
        the layers under it, log q - log p at the sample, since their prior depends on the layer above.
        """
        given = [noise] if isinstance(noise, Tensor) else noise
        if given is None and generator is None and self._noise is not None:
            given = self._noise.next(len(q.packed), samples, self.latent, q.packed.device)
        q = DiagonalGaussian(q.packed.unsqueeze(0))
        layers: list[tuple[DiagonalGaussian, Tensor, Tensor]] = []  # q, its sample, the noise in it; bottom up
        for layer in range(len(self.latent)):
            if layer:
                q = DiagonalGaussian(self._upper(layer).infer(layers[-1][1]))
            eps = self._normal(q, samples, generator) if given is None else given[layer]
            z, kl = q.sample(eps)
            layers.append((q, z, eps))

        kls = [kl]  # of the top layer, whose prior is standard
        q, z, eps = layers[-1]
        ratio = q.log_ratio_to_standard(z, eps).sum(-1) if importance else None
        for layer in range(len(layers) - 1, 0, -1):
            prior = DiagonalGaussian(self._upper(layer).generate(z))
            q, z, eps = layers[layer - 1]
            kls.append(q.log_ratio(z, eps, prior))
            ratio = None if ratio is None else ratio + kls[-1].sum(-1)
        return Draw(z, tuple(reversed(kls)), ratio, tuple(q for q, _, _ in layers))

    def draw_prior(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """z of the first layer, (count, L), drawn top down from p(z)."""
        device = next(self.parameters()).device
        z = torch.randn(count, self.latent[-1], generator=generator, device=device)
        for layer in range(len(self.upper), 0, -1):
            prior = DiagonalGaussian(self._upper(layer).generate(z))
            z, _ = prior.sample(torch.randn(count, self.latent[layer - 1], generator=generator, device=device))
        return z

    def set_location_bias(self, location: Tensor) -> None:
        """Writes the decoder's output bias of the location parameters, (*shape), in place."""
        cast(Decoder, self.decoder).set_location_bias(location)

    def _upper(self, layer: int) -> UpperLayer:
        return cast(UpperLayer, self.upper[layer - 1])

    def _normal(self, q: DiagonalGaussian, samples: int, generator: torch.Generator | None) -> Tensor:
        size = q.packed.shape
        shape = (samples, *size[1:-1], size[-1] // 2)
        if generator is None:
            # torch.compile cannot trace the form with a generator where the batch's size is symbolic.
            return torch.randn(shape, device=q.packed.device)
        return torch.randn(shape, generator=generator, device=q.packed.device)
