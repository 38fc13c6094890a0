"""Evaluation against a model whose likelihood is known, and at several world sizes."""

import copy
import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvdvae.errors import ConfigError
from hvdvae.vae import VAE, Evaluation, Part, build_model, combine, evaluate
from hvdvae.vae.evaluate import chunk_sizes, round_chunks
from hvdvae.vae.likelihoods import Gaussian
from hvdvae.vae.mlp import MLPDecoder, MLPEncoder

SIGMA = 0.5


def linear_gaussian(dimensions: int = 6, latent: int = 2) -> tuple[VAE, torch.distributions.Distribution]:
    """x = W z + b + noise, and an encoder near the true posterior; with the true p(x)."""
    torch.manual_seed(2)
    decoder = MLPDecoder(latent, (), (dimensions,), 1, "tanh")
    encoder = MLPEncoder((dimensions,), (), latent, "tanh")
    w, b = torch.randn(dimensions, latent), torch.randn(dimensions)
    precision = torch.eye(latent) + w.T @ w / SIGMA**2
    to_mean = torch.linalg.solve(precision, w.T / SIGMA**2)
    head = encoder.network[-1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        decoder.output.weight.copy_(w)
        decoder.output.bias.copy_(b)
        head.weight.copy_(torch.cat((to_mean, torch.zeros(latent, dimensions))))
        spread = torch.linalg.inv(precision).diagonal().log() / 2 + 0.3  # wider than the posterior
        head.bias.copy_(torch.cat((-to_mean @ b, spread)))
    model = VAE((dimensions,), encoder, decoder, Gaussian(SIGMA), (latent,))
    covariance = w @ w.T + SIGMA**2 * torch.eye(dimensions)
    return model, torch.distributions.MultivariateNormal(b, covariance)


def test_bound_reaches_the_true_likelihood_of_a_linear_gaussian_model() -> None:
    model, truth = linear_gaussian()
    x = truth.sample((50,))
    result = evaluate(model, lambda start, stop: x[start:stop], 50, samples=4000)
    exact = -truth.log_prob(x).numpy()
    np.testing.assert_allclose(result.nll_per_example, exact, atol=0.15)
    assert result.nll == pytest.approx(exact.mean(), abs=0.02)
    assert result.rate + result.distortion > result.nll + 0.05  # the ELBO is the looser bound
    assert result.elbo == -(result.rate + result.distortion)
    assert result.active_units == (2,)


def test_rate_kl_and_active_units_are_those_of_the_posterior() -> None:
    model, truth = linear_gaussian()
    head = model.encoder.network[-1]  # type: ignore[index]
    with torch.no_grad():
        head.weight[1] = 0  # the second latent's mean no longer depends on x
    x = truth.sample((40,))
    result = evaluate(model, lambda start, stop: x[start:stop], 40, samples=3)
    q = model.encode(x)
    posterior = torch.distributions.Normal(q.mean, q.log_sigma.exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).detach()
    np.testing.assert_allclose(result.kl_per_dimension[0], kl.mean(0), rtol=1e-4)
    np.testing.assert_allclose(result.rate_per_example, kl.sum(1), rtol=1e-4)
    np.testing.assert_allclose(result.mean_variance[0], q.mean.detach().var(0, correction=0), rtol=1e-4, atol=1e-9)
    assert result.active_units == (1,)
    assert result.samples == 3


def same(left: Evaluation, right: Evaluation) -> bool:
    arrays = [
        (
            e.nll_per_example,
            e.rate_per_example,
            e.distortion_per_example,
            *e.kl_per_dimension,
            *e.mean_variance,
        )
        for e in (left, right)
    ]
    return all(np.array_equal(a, b) for a, b in zip(*arrays, strict=True))


class Meeting:
    """gather_objects over threads; keeps what was sent."""

    def __init__(self, size: int) -> None:
        self.barrier = Barrier(size, timeout=30)
        self.sent: list[list[dict[str, object]]] = [[] for _ in range(size)]

    def gather_objects(self, rank: int, part: dict[str, object]) -> list[dict[str, object]]:
        self.sent[rank].append(json.loads(json.dumps(part)))
        self.barrier.wait()
        meeting = len(self.sent[rank]) - 1
        return [sent[meeting] for sent in self.sent]


def evaluate_together(
    model: VAE, gather: Callable[[int, int], Tensor], count: int, *, size: int, samples: int, seed: int = 0
) -> tuple[list[Evaluation], Meeting]:
    """The results of all ranks."""
    meeting = Meeting(size)

    def one(rank: int) -> Evaluation:
        return evaluate(
            copy.deepcopy(model),
            gather,
            count,
            samples=samples,
            seed=seed,
            rank=rank,
            size=size,
            gather_objects=lambda part: meeting.gather_objects(rank, part),
        )

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(one, range(size))), meeting


@pytest.mark.parametrize("meetings", ["one", "many"])
@pytest.mark.parametrize("name", ["mlp", "mlp2", "conv"])
def test_the_same_numbers_bit_for_bit_at_every_world_size(
    monkeypatch: pytest.MonkeyPatch, name: str, meetings: str
) -> None:
    torch.manual_seed(0)
    sizes = {"mlp": ((16,), (4,)), "mlp2": ((16, 8), (4, 2)), "conv": (None, (4,))}[name]
    model = build_model(name, (1, 8, 8), hidden=sizes[0], latent=sizes[1], channels=(4,))
    x = torch.rand(150, 1, 8, 8).round()

    def gather(start: int, stop: int) -> Tensor:
        return x[start:stop]

    alone = evaluate(model, gather, 150, samples=20, seed=1)
    if meetings == "many":
        module = sys.modules["hvdvae.vae.evaluate"]  # the package has a function of this name
        monkeypatch.setattr(module, "_ROUND_NUMBERS", 1)
        assert same(evaluate(model, gather, 150, samples=20, seed=1), alone)
    for size in (2, 3, 7):  # with 7 ranks two have nothing to do
        results, meeting = evaluate_together(model, gather, 150, size=size, samples=20, seed=1)
        assert all(same(result, alone) for result in results)
        assert {len(sent) for sent in meeting.sent} == {-(-5 // size) if meetings == "many" else 1}
    assert not same(evaluate(model, gather, 150, samples=20, seed=2), alone)


def test_evaluation_leaves_model_and_noise_as_they_were() -> None:
    model = build_model("conv", (1, 8, 8), channels=(4,), batch_norm=True)
    x = torch.rand(8, 1, 8, 8)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    noise = torch.get_rng_state()
    for mode in (True, False):
        model.train(mode)
        first = evaluate(model, lambda a, b: x[a:b], 8, samples=4)
        assert model.training is mode
        assert same(first, evaluate(model, lambda a, b: x[a:b], 8, samples=4))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), noise)


def test_samples_are_streamed() -> None:
    """Many more samples than one pass holds: every decoder pass stays within the bound."""
    model, _ = linear_gaussian()
    rows = []
    model.decoder.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    evaluate(model, lambda a, b: torch.zeros(b - a, 6), 40, samples=2000)
    assert sum(rows) == 40 * 2000
    assert max(rows) <= 512


def test_bound_of_mlp2_is_at_least_its_elbo() -> None:
    torch.manual_seed(0)
    model = build_model("mlp2", (16,), hidden=(8, 8), latent=(4, 2))
    x = torch.rand(30, 16).round()
    result = evaluate(model, lambda a, b: x[a:b], 30, samples=500)
    assert (result.nll_per_example < result.rate_per_example + result.distortion_per_example).all()
    assert [len(kl) for kl in result.kl_per_dimension] == [4, 2]
    assert sum(kl.sum() for kl in result.kl_per_dimension) == pytest.approx(result.rate)


def test_ranks_meet_after_a_bounded_number_of_decoded_pixels() -> None:
    for shape, samples in (((1, 28, 28), 5000), ((3, 64, 64), 500), ((6,), 1)):
        examples, _ = chunk_sizes(shape, samples)
        pixels = examples * samples * math.prod(shape)
        assert round_chunks(shape, samples) == 1 or round_chunks(shape, samples) * pixels <= 2**28
    assert round_chunks((1, 28, 28), 1) * 32 > 10_000, "a validation is one meeting"


def test_missing_and_doubled_chunks_are_refused() -> None:
    model, _ = linear_gaussian()
    _, meeting = evaluate_together(model, lambda a, b: torch.zeros(b - a, 6), 70, size=2, samples=2)
    parts = [Part.from_json(sent) for (sent,) in meeting.sent]
    with pytest.raises(ValueError, match=r"found chunks \[0, 2\]"):
        combine(parts[:1])
    with pytest.raises(ValueError, match="once"):
        combine([*parts, parts[1]])
    empty = Part.from_json(Part.empty(70, 2, 32, (2,)).to_json())
    assert empty.chunks == []
    assert same(combine([empty, *parts]), combine(parts))


def test_nothing_to_evaluate_is_refused() -> None:
    model, _ = linear_gaussian()
    with pytest.raises(ConfigError, match="0 examples"):
        evaluate(model, lambda a, b: torch.zeros(b - a, 6), 0)


def test_standard_error_of_one_example_is_unknown() -> None:
    model, _ = linear_gaussian()
    assert math.isnan(evaluate(model, lambda a, b: torch.zeros(b - a, 6), 1, samples=2).nll_error)
