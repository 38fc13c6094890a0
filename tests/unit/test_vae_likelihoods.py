"""The likelihoods are the distributions they say they are."""

import math

import pytest
import torch
from torch.nn import functional

from hvdvae.errors import ConfigError
from hvdvae.vae import build_likelihood
from hvdvae.vae.bernoulli import bernoulli_log_prob
from hvdvae.vae.gaussian import DiagonalGaussian
from hvdvae.vae.likelihoods import Bernoulli, DiscretizedLogistic, Gaussian


@pytest.mark.parametrize("width", [1, 2, 7, 63, 64, 100, 784, 785])
@pytest.mark.parametrize("scale", [0.1, 5.0, 50.0])
def test_bernoulli_equals_cross_entropy_at_every_width(width: int, scale: float) -> None:
    torch.manual_seed(width)
    logits = torch.randn(3, 4, width) * scale
    x = torch.rand(4, width).round()
    expected = -functional.binary_cross_entropy_with_logits(
        logits.double(), x.double().expand(3, 4, width), reduction="none"
    ).sum(-1)
    found = bernoulli_log_prob(logits, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-5)


def test_bernoulli_is_finite_where_sigmoids_are_saturated() -> None:
    logits = torch.tensor([[200.0, -200.0, 1e4, -1e4]])
    right = bernoulli_log_prob(logits, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    wrong = bernoulli_log_prob(logits, torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
    assert right.item() == 0
    assert wrong.item() == -200


def test_bernoulli_reports_nan_logits() -> None:
    logits = torch.zeros(2, 784)
    logits[1, 5] = math.nan
    assert bernoulli_log_prob(logits, torch.zeros(2, 784)).isnan().tolist() == [False, True]


@pytest.mark.parametrize("shape", [(2, 7), (3, 2, 8)])
def test_bernoulli_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x = torch.rand(shape[-2:], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda given: bernoulli_log_prob(given, x), logits)


def test_bernoulli_gradient_keeps_the_logits_dtype() -> None:
    logits = torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True)
    bernoulli_log_prob(logits, torch.ones(2, 8)).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, 1 - torch.sigmoid(logits.detach().float()).bfloat16(), atol=1e-2, rtol=0)


@pytest.mark.parametrize("sigma", [None, 0.3])
def test_gaussian_equals_torch_distributions(sigma: float | None) -> None:
    torch.manual_seed(0)
    likelihood = Gaussian(sigma)
    x = torch.randn(4, 2, 3, 3)
    params = torch.randn(5, 4, 2 * likelihood.parameters_per_dimension, 3, 3)
    mean = params[:, :, :2]
    deviation = (
        torch.tensor(0.3) if sigma else torch.exp(functional.softplus(params[:, :, 2:] + math.log(256)) - math.log(256))
    )
    expected = torch.distributions.Normal(mean, deviation).log_prob(x).sum((2, 3, 4))
    torch.testing.assert_close(likelihood.log_prob(params, x), expected)


def test_gaussian_sigma_has_a_floor_and_a_gradient_below_it() -> None:
    params = torch.tensor([[0.0, -50.0]], requires_grad=True)
    log_prob = Gaussian().log_prob(params, torch.tensor([[0.0]]))
    torch.testing.assert_close(log_prob.exp().item(), 256 / math.sqrt(2 * math.pi), rtol=1e-4, atol=0)
    params = torch.tensor([[0.0, -8.0]], requires_grad=True)
    Gaussian().log_prob(params, torch.tensor([[0.5]])).sum().backward()
    assert params.grad is not None
    assert params.grad[0, 1] > 0


@pytest.mark.parametrize("mean", [-1.2, -0.3, 0.0, 0.99])
@pytest.mark.parametrize("log_scale", [-9.0, -4.0, 0.0, 3.0])
def test_discretized_logistic_sums_to_one_over_the_256_values(mean: float, log_scale: float) -> None:
    x = torch.arange(256).float()[:, None] / 255
    params = torch.tensor([[mean, log_scale]]).expand(256, 2)
    log_prob = DiscretizedLogistic().log_prob(params, x)
    assert log_prob.shape == (256,)
    assert log_prob.double().exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_discretized_logistic_gradient_is_finite_far_from_the_mean() -> None:
    params = torch.tensor([[0.9, -9.0], [-5.0, -9.0], [0.0, 8.0]], requires_grad=True)
    log_prob = DiscretizedLogistic().log_prob(params, torch.tensor([[0.0], [1.0], [0.5]]))
    log_prob.sum().backward()
    assert params.grad is not None
    assert log_prob.isfinite().all()
    assert params.grad.isfinite().all()


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "discretized-logistic"])
def test_samples_have_the_mean_and_the_support(name: str) -> None:
    likelihood = build_likelihood(name)
    image = torch.tensor([0.2, 0.5, 0.8])
    wide = (
        torch.cat((likelihood.location(image), torch.full((3,), -4.0)))
        if name != "bernoulli"
        else likelihood.location(image)
    )
    params = wide.expand(4000, -1)
    torch.testing.assert_close(likelihood.mean(params[:1])[0], image)
    samples = likelihood.sample(params, torch.Generator().manual_seed(0))
    low, high = likelihood.support
    assert samples.shape == (4000, 3)
    assert ((samples >= low) & (samples <= high)).all()
    torch.testing.assert_close(samples.mean(0), image, atol=0.04, rtol=0)  # five standard errors of the widest
    again = likelihood.sample(params, torch.Generator().manual_seed(0))
    assert torch.equal(samples, again)


def test_log_prob_of_images_equals_that_of_vectors() -> None:
    torch.manual_seed(0)
    x, params = torch.rand(4, 3, 2, 2), torch.randn(5, 4, 6, 2, 2)
    for likelihood in (Gaussian(), DiscretizedLogistic()):
        flat = likelihood.log_prob(params.flatten(2), x.flatten(1))
        torch.testing.assert_close(likelihood.log_prob(params, x), flat)
    flat = Bernoulli().log_prob(params[:, :, :3].flatten(2), x.flatten(1))
    torch.testing.assert_close(Bernoulli().log_prob(params[:, :, :3], x), flat)


def test_unknown_names_and_useless_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'poisson'.*bernoulli"):
        build_likelihood("poisson")
    with pytest.raises(ConfigError, match=r"sigma: found 0\.1"):
        build_likelihood("bernoulli", sigma=0.1)
    with pytest.raises(ConfigError, match="positive"):
        build_likelihood("gaussian", sigma=-1)


def test_second_derivatives_are_refused_and_not_wrong() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    packed = torch.randn(1, 2, 6, requires_grad=True)
    for value, of in (
        (bernoulli_log_prob(logits, torch.ones(2, 3)), logits),
        (DiagonalGaussian(packed).sample(torch.randn(1, 2, 3))[1], packed),
    ):
        with pytest.raises(RuntimeError, match="has no second derivative here"):
            torch.autograd.grad(value.sum(), of, create_graph=True)
