"""The objectives, on models small enough to know the answer."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hvdvae.errors import ConfigError
from hvdvae.vae import VAE, Elbo, FreeBits, Iwae, build_model
from hvdvae.vae.gaussian import DiagonalGaussian
from hvdvae.vae.model import Terms
from hvdvae.vae.objectives import importance_bound


def small(name: str = "mlp") -> VAE:
    torch.manual_seed(1)
    hidden, latent = ((16,), (3,)) if name == "mlp" else ((16, 8), (4, 2))
    model = build_model(name, (12,), hidden=hidden, latent=latent)
    with torch.no_grad():  # away from the prior, so that no term vanishes
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


class Replay(nn.Module):
    """Gives a model fixed noise, as a wrapper would."""

    def __init__(self, model: VAE, noise: list[Tensor]) -> None:
        super().__init__()
        self.model, self.noise = model, noise

    def forward(self, x: Tensor, samples: int = 1, importance: bool = False) -> Terms:
        result: Terms = self.model(x, samples, importance, noise=[n[:samples] for n in self.noise])
        return result


BATCH = torch.rand(6, 12, generator=torch.Generator().manual_seed(0)).round()


def test_closed_form_kl_equals_monte_carlo() -> None:
    torch.manual_seed(0)
    q = DiagonalGaussian(torch.tensor([[0.5, -1.0, 0.3, -0.7]]))
    noise = torch.randn(200_000, 1, 2)
    z, kl = q.sample(noise)
    sampled = q.log_ratio_to_standard(z, noise)
    error = sampled.std(0) / math.sqrt(len(noise))
    assert ((sampled.mean(0) - kl).abs() < 5 * error).all()
    reference = torch.distributions.kl_divergence(
        torch.distributions.Normal(q.mean, q.log_sigma.exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(kl, reference)


def test_log_ratios_are_the_densities() -> None:
    torch.manual_seed(0)
    q, p = DiagonalGaussian(torch.randn(1, 5, 6)), DiagonalGaussian(torch.randn(4, 5, 6))
    noise = torch.randn(4, 5, 3)
    z, _ = q.sample(noise)
    of_q = torch.distributions.Normal(q.mean, q.log_sigma.exp()).log_prob(z)
    of_p = torch.distributions.Normal(p.mean, p.log_sigma.exp()).log_prob(z)
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(q.log_ratio(z, noise, p), of_q - of_p, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(q.log_ratio_to_standard(z, noise), of_q - standard, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("samples", [1, 3])
def test_sampling_gradient(samples: int) -> None:
    torch.manual_seed(0)
    packed = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(samples, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda given: DiagonalGaussian(given).sample(noise), packed)


@pytest.mark.parametrize("name", ["mlp", "mlp2"])
def test_iwae_with_one_sample_is_the_sampled_elbo(name: str) -> None:
    model = small(name)
    noise = [torch.randn(1, 6, size) for size in model.latent]
    terms = model(BATCH, 1, importance=True, noise=noise)
    assert terms.log_ratio is not None
    expected = (terms.log_ratio - terms.log_px).mean()
    found = Iwae(samples=1)(Replay(model, noise), BATCH, 0.0)["loss"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["mlp", "mlp2"])
def test_iwae_with_one_sample_is_the_elbo_in_expectation(name: str) -> None:
    model, count = small(name), 20_000
    torch.manual_seed(0)
    with torch.no_grad():
        terms = model(BATCH, count, importance=True)
    assert terms.log_ratio is not None
    exact = sum((kl.sum(-1) for kl in terms.kl), torch.zeros(()))
    difference = (exact - terms.log_ratio).mean(1)  # (K,), zero on average; of one layer the KL has no K
    assert difference.std() > 0
    assert abs(difference.mean()) < 5 * difference.std() / math.sqrt(count)


def test_elbo_with_k_samples_is_the_mean_over_single_samples() -> None:
    model = small("mlp2")
    noise = [torch.randn(4, 6, size) for size in model.latent]
    together = Elbo(samples=4)(Replay(model, noise), BATCH, 0.0)
    singles = [Elbo()(Replay(model, [n[k : k + 1] for n in noise]), BATCH, 0.0) for k in range(4)]
    for key, value in together.items():
        torch.testing.assert_close(value, torch.stack([single[key] for single in singles]).mean())


def test_importance_bound_rises_with_k() -> None:
    model = small()
    torch.manual_seed(0)
    with torch.no_grad():
        terms = model(BATCH, 64 * 300, importance=True)
    assert terms.log_ratio is not None
    weights = (terms.log_px - terms.log_ratio).unflatten(0, (300, 64))
    bounds = [(torch.logsumexp(weights[:, :k], 1) - math.log(k)).mean(1) for k in (1, 4, 16, 64)]
    for fewer, more in itertools.pairwise(bounds):
        rise = more - fewer
        assert rise.mean() > 3 * rise.std() / math.sqrt(300)


def test_importance_bound_needs_the_weights() -> None:
    with pytest.raises(ValueError, match="importance=True"):
        importance_bound(small()(BATCH))


def test_beta_weighs_the_rate_and_warms_up() -> None:
    model = small()
    noise = [torch.randn(1, 6, 3)]
    objective = Elbo(beta=4.0, warmup_epochs=10)
    for epoch, beta in ((0.0, 0.0), (2.5, 1.0), (10.0, 4.0), (50.0, 4.0)):
        found = objective(Replay(model, noise), BATCH, epoch)
        torch.testing.assert_close(found["loss"], found["distortion"] + beta * found["rate"])
    assert Elbo().beta_at(0.0) == 1.0


def test_free_bits_replace_only_the_dimensions_below() -> None:
    model = small()
    noise = [torch.randn(1, 6, 3)]
    per_dimension = model(BATCH, noise=noise).kl[0].mean((0, 1)).detach()
    level = float(per_dimension.sort().values[1]) + 1e-4  # two of three are below
    found = FreeBits(nats=level)(Replay(model, noise), BATCH, 0.0)
    torch.testing.assert_close(found["loss"] - found["distortion"], per_dimension.max() + 2 * level)
    torch.testing.assert_close(found["rate"], per_dimension.sum())
    free = FreeBits(nats=0)(Replay(model, noise), BATCH, 0.0)
    torch.testing.assert_close(free["loss"], free["distortion"] + free["rate"])


@pytest.mark.parametrize("objective", [Elbo(), FreeBits(nats=0.5), Iwae(samples=5)])
@pytest.mark.parametrize("name", ["mlp", "mlp2"])
def test_gradient_reaches_every_parameter(name: str, objective: Elbo | FreeBits | Iwae) -> None:
    model = small(name)
    found = objective(model, BATCH, 1.0)
    assert set(found) == {"loss", "rate", "distortion"}
    assert all(value.shape == () and value.dtype == torch.float32 for value in found.values())
    found["loss"].backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Elbo(beta=-1.0), r"beta: found -1\.0"),
        (lambda: Elbo(warmup_epochs=math.nan), "warmup-epochs: found nan"),
        (lambda: FreeBits(nats=-0.5), r"free-bits: found -0\.5"),
        (lambda: Iwae(samples=0), "samples: found 0"),
    ],
)
def test_objectives_name_what_is_wrong(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
