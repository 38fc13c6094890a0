"""What training minimizes: callables (model, batch, epoch) -> {"loss", "rate", "distortion"}.

All three are scalars in nats per example, means over this rank's batch, float32. rate is KL(q(z|x) || p(z)),
in closed form where there is one (see VAE.draw), distortion is -log p(x|z), whatever weights the loss gives
them. epoch counts the epochs done, with its fraction, and drives the warm-up of beta.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from hvdvae.errors import ConfigError
from hvdvae.vae.model import Terms

Losses = dict[str, Tensor]


class Objective(Protocol):
    """The shape of an objective; the trainer takes any callable like it."""

    def __call__(self, model: nn.Module, batch: Tensor, epoch: float) -> Losses: ...


def _rate(terms: Terms) -> Tensor:
    rates = [kl.sum() / kl[..., 0].numel() for kl in terms.kl]
    return rates[0] if len(rates) == 1 else torch.stack(rates).sum()


@dataclass(frozen=True, kw_only=True)
class Elbo:
    """loss = distortion + beta * rate (Kingma and Welling 2014; beta: Higgins et al. 2017).

    beta: weight of the rate, 1 for the ELBO. warmup_epochs: beta rises linearly from 0 over this many epochs
    (Bowman et al. 2016; Sonderby et al. 2016), 0 for none. samples: latents an example, averaged.
    """

    beta: float = 1.0
    warmup_epochs: float = 0.0
    samples: int = 1

    def __post_init__(self) -> None:
        _at_least("beta", self.beta, 0)
        _at_least("warmup-epochs", self.warmup_epochs, 0)
        _at_least("samples", self.samples, 1)

    def beta_at(self, epoch: float) -> float:
        """The weight of the rate after that many epochs."""
        return self.beta * (min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0)

    def __call__(self, model: nn.Module, batch: Tensor, epoch: float) -> Losses:
        """One forward pass; model: a VAE, or a wrapper that passes `samples` on to one."""
        terms: Terms = model(batch, self.samples)
        rate, distortion = _rate(terms), -terms.log_px.mean()
        beta = self.beta_at(epoch)
        return {
            "loss": distortion + (rate if beta == 1 else beta * rate),
            "rate": rate,
            "distortion": distortion,
        }


@dataclass(frozen=True, kw_only=True)
class FreeBits:
    """loss = distortion + sum over latent dimensions of max(nats, KL) (Kingma et al. 2016, eq. 15).

    nats: lambda, for each latent dimension of each stochastic layer: the paper's groups are single dimensions
    here. The KL is averaged over this rank's batch before the maximum, as in the paper's minibatch; so with
    more ranks the maximum is taken over smaller batches. samples: latents an example, averaged.
    """

    nats: float = 0.1
    samples: int = 1

    def __post_init__(self) -> None:
        _at_least("free-bits", self.nats, 0)
        _at_least("samples", self.samples, 1)

    def __call__(self, model: nn.Module, batch: Tensor, epoch: float) -> Losses:
        """One forward pass; epoch is not used."""
        terms: Terms = model(batch, self.samples)
        per_dimension = torch.cat([kl.mean((0, 1)) for kl in terms.kl])
        distortion = -terms.log_px.mean()
        loss = distortion + per_dimension.clamp_min(self.nats).sum()
        return {"loss": loss, "rate": per_dimension.sum(), "distortion": distortion}


@dataclass(frozen=True, kw_only=True)
class Iwae:
    """loss = -log (1/k) sum_i p(x, z_i) / q(z_i|x) (Burda, Grosse, Salakhutdinov 2016). samples: its k."""

    samples: int = 50

    def __post_init__(self) -> None:
        _at_least("samples", self.samples, 1)

    def __call__(self, model: nn.Module, batch: Tensor, epoch: float) -> Losses:
        """One forward pass of k samples an example; epoch is not used."""
        terms: Terms = model(batch, self.samples, importance=True)
        loss = -importance_bound(terms).mean()
        return {"loss": loss, "rate": _rate(terms), "distortion": -terms.log_px.mean()}


def importance_bound(terms: Terms) -> Tensor:
    """log (1/K) sum_k p(x, z_k) / q(z_k|x) of each example, (B,) nats; terms drawn with importance=True."""
    if terms.log_ratio is None:
        raise ValueError("terms: found no log_ratio, expected the result of model(x, k, importance=True)")
    log_weights = terms.log_px - terms.log_ratio
    return torch.logsumexp(log_weights, 0) - math.log(log_weights.shape[0])


def _at_least(flag: str, found: float, least: float) -> None:
    if not (found >= least and math.isfinite(found)):
        raise ConfigError(f"{flag}: found {found}, expected a number of at least {least}")
