"""The networks: shapes, sizes of the paper, initialization, precision, memory formats."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional

from hvdvae.errors import ConfigError
from hvdvae.vae import VAE, Elbo, Iwae, build_model, set_output_bias
from hvdvae.vae.activations import Tanh
from hvdvae.vae.upsample import Upsample

SHAPES = [(64,), (1, 8, 8), (3, 8, 12)]


def build(name: str, shape: tuple[int, ...], likelihood: str = "bernoulli", *, batch_norm: bool = False) -> VAE:
    torch.manual_seed(0)
    if name == "conv":
        return build_model(name, shape, likelihood=likelihood, channels=(4, 8), latent=(3,), batch_norm=batch_norm)
    hidden, latent = ((16, 8), (5,)) if name == "mlp" else ((16, 8), (5, 3))
    return build_model(name, shape, likelihood=likelihood, hidden=hidden, latent=latent)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "discretized-logistic"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["mlp", "mlp2", "conv"])
def test_every_model_takes_every_shape_and_likelihood(name: str, shape: tuple[int, ...], likelihood: str) -> None:
    if name == "conv" and len(shape) == 1:
        with pytest.raises(ConfigError, match=re.escape("(64,)")):
            build(name, shape, likelihood)
        return
    model = build(name, shape, likelihood)
    x = torch.rand(6, *shape)
    terms = model(x, 4, importance=True)
    assert terms.log_px.shape == (4, 6)
    assert terms.log_ratio is not None
    assert terms.log_ratio.shape == (4, 6)
    assert [kl.shape[-2:] for kl in terms.kl] == [(6, size) for size in model.latent]
    z = model.draw_prior(7)
    assert model.likelihood.mean(model.decode(z)).shape == (7, *shape)


def test_sizes_of_the_paper() -> None:
    def linears(model: VAE) -> list[tuple[int, int]]:
        return [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]

    one = [(784, 200), (200, 200), (200, 2 * 50), (50, 200), (200, 200), (200, 784)]
    assert linears(build_model("mlp", (1, 28, 28))) == one
    two = [(784, 200), (200, 200), (200, 2 * 100), (100, 200), (200, 200), (200, 784)]
    above = [(100, 100), (100, 100), (100, 2 * 50), (50, 100), (100, 100), (100, 2 * 100)]
    assert linears(build_model("mlp2", (1, 28, 28))) == two + above
    assert sum(isinstance(m, Tanh) for m in build_model("mlp", (784,)).modules()) == 4
    assert not any(isinstance(m, Tanh) for m in build_model("mlp", (784,), activation="relu").modules())


def test_initialization_is_glorot_uniform_with_zero_biases() -> None:
    model = build_model("mlp2", (784,))
    heads = {"encoder.network.4", "upper.0.infer.4", "upper.0.generate.4"}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            parts = 2 if name in heads else 1  # mean and log sigma: two matrices in one
            fan_out = module.out_features // parts
            bound = math.sqrt(6 / (module.in_features + fan_out))
            assert 0.97 * bound < module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
            assert not module.bias.any(), name


def test_state_names_are_stable() -> None:
    """Checkpoints hold these names: a change here breaks reading old ones."""
    layers = ("weight", "bias")
    mlp = ["encoder.network.0", "encoder.network.2", "encoder.network.4"]
    mlp += ["decoder.network.0", "decoder.network.2", "decoder.output"]
    assert list(build("mlp", (64,)).state_dict()) == [f"{name}.{kind}" for name in mlp for kind in layers]
    upper = ["upper.0.infer.0", "upper.0.infer.2", "upper.0.generate.0", "upper.0.generate.2"]
    both = ["encoder.network.0", "encoder.network.2", "decoder.network.0", "decoder.output", *upper]
    assert list(build("mlp2", (64,)).state_dict()) == [f"{name}.{kind}" for name in both for kind in layers]
    conv = ["encoder.network.0", "encoder.network.2", "encoder.output"]
    conv += ["decoder.input", "decoder.network.1", "decoder.output"]
    assert list(build("conv", (1, 8, 8)).state_dict()) == [f"{name}.{kind}" for name in conv for kind in layers]


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 1), (4, 3), (3, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_upsample_is_the_transposed_convolution(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = Upsample(inputs, outputs, bias=bias)
    x = torch.randn(2, inputs, 3, 5, requires_grad=True)
    reference = functional.conv_transpose2d(x, layer.weight, layer.bias, stride=2, padding=1)
    found = layer(x)
    torch.testing.assert_close(found, reference)
    weights = torch.randn_like(reference)
    tensors = [x, *layer.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), tensors),
        torch.autograd.grad((reference * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_tanh_and_its_gradient() -> None:
    x = torch.linspace(-20, 20, 4001, requires_grad=True)
    torch.testing.assert_close(Tanh()(x), torch.tanh(x), atol=2e-7, rtol=0)
    double = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Tanh(), double)


@pytest.mark.parametrize(("size", "near"), [(30, "28 or 32"), (3, "to 4"), (9, "8 or 12")])
def test_conv_names_the_size_that_does_not_divide_and_the_nearest_that_do(size: int, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"width is {size}.*multiple of 4.*{near}"):
        build_model("conv", (1, 28, size))
    with pytest.raises(ConfigError, match=rf"height is {size}"):
        build_model("conv", (3, size, 28))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("unet", {}, "model: found 'unet'"),
        ("mlp", {"latent": (50, 20)}, "latent.*: found .* expected 1"),
        ("mlp2", {"latent": (50,)}, "latent.*: found .* expected 2"),
        ("mlp2", {"hidden": (200, 200, 100)}, "hidden.*: found 3 sizes"),
        ("mlp", {"hidden": (200, 0)}, "hidden"),
        ("mlp", {"activation": "gelu"}, "activation: found 'gelu'"),
        ("mlp", {"batch_norm": True}, "batch-norm"),
        ("conv", {"hidden": (200,)}, "set channels"),
        ("conv", {"channels": ()}, "channels"),
    ],
)
def test_build_model_names_what_is_wrong(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(name, (1, 28, 28), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "discretized-logistic"])
@pytest.mark.parametrize("name", ["mlp", "mlp2"])
def test_output_bias_shows_the_mean_image(name: str, likelihood: str) -> None:
    model = build(name, (1, 8, 8), likelihood)
    image = torch.linspace(0, 1, 64).view(1, 8, 8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    set_output_bias(model, image)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["decoder.output.bias"]
    bias = model.get_parameter("decoder.output.bias")[None, :]
    shown = model.likelihood.mean(bias.view(1, -1, 8, 8))
    torch.testing.assert_close(shown[0], image.clamp(0.001, 0.999) if likelihood == "bernoulli" else image)


def test_output_bias_of_convolutions_is_one_a_channel() -> None:
    model = build("conv", (3, 8, 8), "bernoulli")
    set_output_bias(model, torch.tensor([0.1, 0.5, 0.9])[:, None, None].expand(3, 8, 8))
    torch.testing.assert_close(model.get_parameter("decoder.output.bias"), torch.logit(torch.tensor([0.1, 0.5, 0.9])))
    with pytest.raises(ConfigError, match=r"mean image: found shape \(1, 8, 8\)"):
        set_output_bias(model, torch.zeros(1, 8, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "mlp2", "conv"])
def test_autocast_is_close_to_float32(name: str, dtype: torch.dtype) -> None:
    model = build(name, (1, 8, 8))
    x = torch.rand(32, 1, 8, 8).round()
    found = []
    for enabled in (False, True):
        for objective in (Elbo(), Iwae(samples=3)):
            torch.manual_seed(0)
            model.zero_grad()
            with torch.autocast("cpu", dtype, enabled=enabled):
                losses = objective(model, x, 1.0)
            losses["loss"].backward()
            assert all(value.dtype == torch.float32 for value in losses.values())
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            found.append((losses, gradient))
    for (exact, gradient), (cast, cast_gradient) in zip(found[:2], found[2:], strict=True):
        for key in exact:
            torch.testing.assert_close(cast[key], exact[key], rtol=0.02, atol=0.02)
        assert not torch.equal(cast["loss"], exact["loss"])  # that it was really another precision
        assert functional.cosine_similarity(gradient, cast_gradient, dim=0) > 0.99


@pytest.mark.parametrize("name", ["mlp", "mlp2", "conv"])
def test_parameters_can_become_views_of_one_vector(name: str) -> None:
    model, x = build(name, (1, 8, 8)), torch.rand(4, 1, 8, 8)
    flat = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    torch.manual_seed(0)
    before = Elbo()(model, x, 1.0)["loss"]
    nn.utils.vector_to_parameters(flat, model.parameters())  # each .data is a view of flat now
    flat.mul_(1.5)
    moved = copy.deepcopy(model)
    for scaled in (model, moved):
        torch.manual_seed(0)
        after = Elbo()(scaled, x, 1.0)["loss"]
        assert after != before
    nn.utils.vector_to_parameters(flat / 1.5, moved.parameters())
    torch.manual_seed(0)
    torch.testing.assert_close(Elbo()(moved, x, 1.0)["loss"], before)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_channels_last_changes_nothing(shape: tuple[int, int, int]) -> None:
    model, x = build("conv", shape, batch_norm=True), torch.rand(4, *shape)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    results = []
    for network, batch in ((model, x), (last, x.contiguous(memory_format=torch.channels_last))):
        torch.manual_seed(0)
        loss = Elbo()(network, batch, 1.0)["loss"]
        loss.backward()
        results.append((loss, torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_batch_norm_has_no_bias_before_it_and_buffers() -> None:
    model = build("conv", (1, 8, 8), batch_norm=True)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 3
    assert model.get_submodule("encoder.network.0").bias is None
    assert model.get_submodule("decoder.network.1").bias is None


def test_noise_is_the_default_generators_or_the_given_ones() -> None:
    model, x = build("mlp2", (64,)), torch.rand(4, 64)
    torch.manual_seed(3)
    first, second = model(x).log_px, model(x).log_px
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(model(x).log_px, first)
    state = torch.get_rng_state()
    mine = [model(x, 2, generator=torch.Generator().manual_seed(5)).log_px for _ in range(2)]
    assert torch.equal(mine[0], mine[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["mlp", "mlp2", "conv"])
def test_compiled_is_the_same_function(name: str) -> None:
    """Compilation traces other formulas than eager mode runs; without code generation, which is slow."""
    model, x = build(name, (1, 8, 8)), torch.rand(4, 1, 8, 8).round()
    noise = [torch.randn(2, 4, size) for size in model.latent]
    results = []
    for network in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        terms = network(x, 2, importance=True, noise=noise)
        (terms.log_px.sum() - terms.log_ratio.sum() - terms.kl[-1].sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((terms.log_px, terms.log_ratio, gradient))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
