"""Variational autoencoders: networks, likelihoods, objectives, evaluation, pictures."""

from hvdvae.config import LIKELIHOODS
from hvdvae.vae.build import MODELS, build_model, set_output_bias
from hvdvae.vae.evaluate import evaluate
from hvdvae.vae.evaluation import Evaluation, Part, combine
from hvdvae.vae.generate import reconstruct, sample_images
from hvdvae.vae.likelihoods import Likelihood, build_likelihood
from hvdvae.vae.model import VAE, Terms
from hvdvae.vae.objectives import Elbo, FreeBits, Iwae, Objective
from hvdvae.vae.pictures import image_grid, pair_grid, save_grid, save_picture

__all__ = [
    "LIKELIHOODS",
    "MODELS",
    "VAE",
    "Elbo",
    "Evaluation",
    "FreeBits",
    "Iwae",
    "Likelihood",
    "Objective",
    "Part",
    "Terms",
    "build_likelihood",
    "build_model",
    "combine",
    "evaluate",
    "image_grid",
    "pair_grid",
    "reconstruct",
    "sample_images",
    "save_grid",
    "save_picture",
    "set_output_bias",
]
