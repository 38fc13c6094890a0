"""Models by name, from values that a command line or a YAML file can hold."""

import math
from collections.abc import Sequence

from torch import Tensor

from hvdvae.errors import ConfigError
from hvdvae.vae.conv import ConvDecoder, ConvEncoder
from hvdvae.vae.likelihoods import Likelihood, build_likelihood
from hvdvae.vae.mlp import GaussianMLP, MLPDecoder, MLPEncoder
from hvdvae.vae.model import VAE, UpperLayer

MODELS = ("mlp", "mlp2", "conv")
_HIDDEN = {"mlp": (200, 200), "mlp2": (200, 200, 100, 100)}
_CHANNELS = (32, 64)
_LATENT = {"mlp": (50,), "mlp2": (100, 50), "conv": (20,)}


def resolved_sizes(
    name: str, hidden: Sequence[int] | None, latent: Sequence[int] | None, activation: str | None
) -> tuple[list[int], list[int], str]:
    """Hidden sizes (channels of conv), latent sizes and activation, with nothing left to defaults. Pure."""
    widths = hidden or _HIDDEN.get(name, _CHANNELS)
    return list(widths), list(latent or _LATENT[name]), activation or ("relu" if name == "conv" else "tanh")


def build_model(
    name: str,
    shape: Sequence[int],
    *,
    likelihood: str = "bernoulli",
    sigma: float | None = None,
    hidden: Sequence[int] | None = None,
    latent: Sequence[int] | None = None,
    channels: Sequence[int] = _CHANNELS,
    activation: str | None = None,
    batch_norm: bool = False,
) -> VAE:
    """A VAE for examples of that shape, (C, H, W) or (D,); weights from torch's default generator.

    mlp: one stochastic layer, hidden layer sizes of the encoder (the decoder mirrors them), latent of one
    size. mlp2: two stochastic layers; hidden holds as many sizes for x-to-z1 as for z1-to-z2, in this order;
    latent z1, z2. Their defaults are the networks of Burda et al. 2016. conv: stride-2 convolutions of these
    channels, one stochastic layer. activation: tanh or relu; None is tanh for mlp and mlp2, relu for conv.
    sigma: fixes the Gaussian's deviation. Raises ConfigError, naming the setting, for an unknown name or a
    setting that does not fit the model or the shape.
    """
    if name not in MODELS:
        raise ConfigError(f"model: found {name!r}, expected one of {', '.join(MODELS)}")
    sizes = tuple(latent) if latent is not None else _LATENT[name]
    expected = 2 if name == "mlp2" else 1
    if len(sizes) != expected or min(sizes) < 1:
        raise ConfigError(
            f"latent (--latent): found {list(sizes)}, expected {expected} positive size(s) for model {name!r}"
        )
    if batch_norm and name != "conv":
        raise ConfigError(f"batch-norm: model {name!r} has none; use it with model 'conv'")
    family = build_likelihood(likelihood, sigma=sigma)
    if name == "conv":
        if hidden is not None:
            raise ConfigError(
                f"hidden (--hidden): found {list(hidden)}, but model 'conv' has channels instead: set channels"
            )
        return _conv(shape, family, sizes[0], channels, activation or "relu", batch_norm)
    widths = tuple(hidden) if hidden is not None else _HIDDEN[name]
    if any(width < 1 for width in widths):
        raise ConfigError(f"hidden (--hidden): found {list(widths)}, expected positive sizes")
    if name == "mlp2" and (len(widths) % 2 or not widths):
        raise ConfigError(
            f"hidden (--hidden): found {len(widths)} sizes {list(widths)}, expected an even number for model 'mlp2': "
            "the first half for x to z1, the second half for z1 to z2, such as 200 200 100 100"
        )
    return _mlp(shape, family, sizes, widths, activation or "tanh")


def _mlp(
    shape: Sequence[int],
    likelihood: Likelihood,
    latent: Sequence[int],
    hidden: Sequence[int],
    activation: str,
) -> VAE:
    layers = len(latent)
    lower, higher = hidden[: len(hidden) // layers], hidden[len(hidden) // layers :]
    encoder = MLPEncoder(shape, lower, latent[0], activation)
    # In the order in which VAE names them: layers draw their weights in it, whoever makes them.
    decoder = MLPDecoder(latent[0], lower[::-1], shape, likelihood.parameters_per_dimension, activation)
    upper = [
        UpperLayer(
            GaussianMLP(latent[0], higher, above, activation),
            GaussianMLP(above, higher[::-1], latent[0], activation),
        )
        for above in latent[1:]
    ]
    return VAE(shape, encoder, decoder, likelihood, latent, upper)


def _conv(
    shape: Sequence[int],
    likelihood: Likelihood,
    latent: int,
    channels: Sequence[int],
    activation: str,
    batch_norm: bool,
) -> VAE:
    encoder = ConvEncoder(shape, channels, latent, activation, batch_norm)
    parameters = likelihood.parameters_per_dimension
    decoder = ConvDecoder(latent, channels, shape, parameters, activation, batch_norm)
    return VAE(shape, encoder, decoder, likelihood, (latent,))


def set_output_bias(model: VAE, mean_image: Tensor) -> None:
    """Sets the decoder's output bias, in place, to show the training mean (Burda et al. 2016).

    mean_image: (*shape) in [0, 1], the mean over the training set; for Bernoulli its logit, of means clamped
    to [0.001, 0.999]. Convolutions have one bias a channel and take the median over its pixels. Every rank
    must call it with the same image, or on one before the weights are broadcast. Raises ConfigError if the
    shape is another.
    """
    if mean_image.numel() != math.prod(model.shape):
        raise ConfigError(f"mean image: found shape {tuple(mean_image.shape)}, expected the model's {model.shape}")
    model.set_location_bias(model.likelihood.location(mean_image.float().reshape(model.shape)))
