"""What a decoder's numbers mean: p(x | z) of one image, independent over its dimensions.

Shapes: x (B, *event) with event (C, H, W) or (D,); params (..., B, *wide), where `wide` is `event` with its
first dimension multiplied by `parameters`: first all locations, then all scales. x is in [0, 1], any real number
for the Gaussian. log_prob sums over the event in float32 whatever the params are (autocast), and returns nats
per example.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdvae.config import LIKELIHOODS
from hvdvae.errors import ConfigError
from hvdvae.vae.bernoulli import bernoulli_log_prob


class Likelihood(ABC, nn.Module):
    """One family of p(x | z). It has no parameters of its own: they come from the decoder."""

    name: str
    parameters_per_dimension: int
    support: tuple[float, float]  # the closed interval that data must lie in

    @abstractmethod
    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """log p(x | z) in nats, (..., B); params (..., B, *wide), x (B, *event)."""

    @abstractmethod
    def mean(self, params: Tensor) -> Tensor:
        """The mean of x, (N, *event) float32 on the data's own scale; params (N, *wide)."""

    @abstractmethod
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw of x, (N, *event) float32; params (N, *wide). Noise: the default generator unless given."""

    @abstractmethod
    def location(self, mean_image: Tensor) -> Tensor:
        """The location parameter whose `mean` is this image in [0, 1]; for the output bias."""

    def _halves(self, params: Tensor, event: int) -> tuple[Tensor, Tensor]:
        location, scale = params.float().chunk(2, dim=-event)
        return location, scale


class Bernoulli(Likelihood):
    """p(x=1) = sigmoid(logit); fractional x in [0, 1] is scored by the same formula (Burda et al. 2016)."""

    name = "bernoulli"
    parameters_per_dimension = 1
    support = (0.0, 1.0)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        flat = params.flatten(-(x.dim() - 1)) if x.dim() > 2 else params
        return bernoulli_log_prob(flat, x.flatten(1))

    def mean(self, params: Tensor) -> Tensor:
        return torch.sigmoid(params.float())

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self.mean(params), generator=generator)

    def location(self, mean_image: Tensor) -> Tensor:
        return torch.logit(mean_image.clamp(0.001, 0.999))


class Gaussian(Likelihood):
    """A normal density on the data's own scale, any real x.

    sigma None: a standard deviation per dimension from the decoder, never below MIN_SIGMA (a pixel that is
    constant in the data would otherwise make the density unbounded). sigma given: fixed for all dimensions.
    """

    name = "gaussian"
    support = (-math.inf, math.inf)
    MIN_SIGMA = 1 / 256

    def __init__(self, sigma: float | None = None) -> None:
        super().__init__()
        if sigma is not None and not (sigma > 0 and math.isfinite(sigma)):
            raise ConfigError(f"sigma: found {sigma}, expected a positive number, or none to learn it")
        self.sigma = sigma
        self.parameters_per_dimension = 2 if sigma is None else 1

    def _mean_and_log_sigma(self, params: Tensor, event: int) -> tuple[Tensor, Tensor]:
        if self.sigma is not None:
            return params.float(), torch.full((), math.log(self.sigma), device=params.device)
        mean, raw = self._halves(params, event)
        return mean, _floored(raw, math.log(self.MIN_SIGMA))

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        event = x.dim() - 1
        mean, log_sigma = self._mean_and_log_sigma(params, event)
        scaled = (x - mean) * torch.exp(-log_sigma)
        return (-0.5 * scaled.square() - log_sigma - 0.5 * math.log(2 * math.pi)).flatten(-event).sum(-1)

    def mean(self, params: Tensor) -> Tensor:
        return self._mean_and_log_sigma(params, params.dim() - 1)[0]

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, log_sigma = self._mean_and_log_sigma(params, params.dim() - 1)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return mean + torch.exp(log_sigma) * noise

    def location(self, mean_image: Tensor) -> Tensor:
        return mean_image


class DiscretizedLogistic(Likelihood):
    """256 bins on [-1, 1] under a logistic density (Kingma et al. 2016; Salimans et al. 2017).

    x in [0, 1] is put on the grid of 256 values 0, 1/255, ..., 1 and rescaled to [-1, 1]. The two outer bins
    reach to infinity, so the 256 probabilities sum to one. Written without the sigmoids' difference, which
    cancels in float32: sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)).
    """

    name = "discretized-logistic"
    parameters_per_dimension = 2
    support = (0.0, 1.0)
    BINS = 256
    MIN_LOG_SCALE = -7.0

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        event = x.dim() - 1
        mean, raw = self._halves(params, event)
        log_scale = _floored(raw, self.MIN_LOG_SCALE)
        level = torch.round(x * (self.BINS - 1))
        centered = level * (2 / (self.BINS - 1)) - 1 - mean
        half_bin = 1 / (self.BINS - 1)
        inverse_scale = torch.exp(-log_scale)
        below_upper = functional.logsigmoid((centered + half_bin) * inverse_scale)
        above_lower = functional.logsigmoid((half_bin - centered) * inverse_scale)
        inside = torch.log(-torch.expm1(-2 * half_bin * inverse_scale))
        log_prob = torch.where(level == 0, below_upper, below_upper + above_lower + inside)
        log_prob = torch.where(level == self.BINS - 1, above_lower, log_prob)
        return log_prob.flatten(-event).sum(-1)

    def mean(self, params: Tensor) -> Tensor:
        location, _ = self._halves(params, params.dim() - 1)
        return (location.clamp(-1, 1) + 1) / 2

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, raw = self._halves(params, params.dim() - 1)
        uniform = torch.rand(mean.shape, generator=generator, device=mean.device)
        logistic = torch.logit(uniform.clamp(1e-6, 1 - 1e-6))
        x = (mean + torch.exp(_floored(raw, self.MIN_LOG_SCALE)) * logistic + 1) / 2
        return torch.round(x.clamp(0, 1) * (self.BINS - 1)) / (self.BINS - 1)

    def location(self, mean_image: Tensor) -> Tensor:
        return 2 * mean_image - 1


def _floored(raw: Tensor, floor: float) -> Tensor:
    """A smooth max(raw, floor): with a gradient everywhere, a scale can come back from the floor."""
    return floor + functional.softplus(raw - floor)


def build_likelihood(name: str, *, sigma: float | None = None) -> Likelihood:
    """The likelihood of that name; sigma fixes the Gaussian's standard deviation (None learns it).

    Raises ConfigError for an unknown name, or a sigma that the likelihood has no use for.
    """
    if name not in LIKELIHOODS:
        raise ConfigError(f"likelihood: found {name!r}, expected one of {', '.join(LIKELIHOODS)}")
    if name == "gaussian":
        return Gaussian(sigma)
    if sigma is not None:
        raise ConfigError(f"sigma: found {sigma} with likelihood {name!r}; only 'gaussian' has one, leave it out")
    return Bernoulli() if name == "bernoulli" else DiscretizedLogistic()
