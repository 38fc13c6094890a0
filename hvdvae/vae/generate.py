"""What a model imagines: draws from the prior, and reconstructions of given examples."""

import torch
from torch import Tensor

from hvdvae.vae.evaluate import evaluating
from hvdvae.vae.model import VAE


def sample_images(model: VAE, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Means of p(x|z) for z drawn from the prior, (count, *shape) float32 on the data's scale and the model's device.

    generator: of that device; torch's default one otherwise. The model is in eval mode meanwhile.
    """
    with evaluating(model):
        return model.likelihood.mean(model.decode(model.draw_prior(count, generator)))


def draw_images(model: VAE, count: int, generator: torch.Generator | None = None) -> Tensor:
    """As `sample_images`, but x drawn from p(x|z): its noise, too, as the data has it."""
    with evaluating(model):
        return model.likelihood.sample(model.decode(model.draw_prior(count, generator)), generator)


def reconstruct(model: VAE, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Means of p(x|z) for one z drawn from q(z|x), (B, *shape) float32 on the scale of x; x: (B, *shape)."""
    with evaluating(model):
        drawn = model.draw(model.encode(x), generator=generator)
        return model.likelihood.mean(model.decode(drawn.z[0]))
