"""Variational autoencoders: networks, likelihoods, objectives, evaluation, pictures."""

from hvdvae.vae.build import MODELS, build_model, set_output_bias
from hvdvae.vae.likelihoods import LIKELIHOODS, Likelihood, build_likelihood
from hvdvae.vae.model import VAE, Terms
from hvdvae.vae.objectives import OBJECTIVES, Elbo, FreeBits, Iwae, Objective, build_objective

__all__ = [
    "LIKELIHOODS",
    "MODELS",
    "OBJECTIVES",
    "VAE",
    "Elbo",
    "FreeBits",
    "Iwae",
    "Likelihood",
    "Objective",
    "Terms",
    "build_likelihood",
    "build_model",
    "build_objective",
    "set_output_bias",
]
