"""Which number of a validation makes an epoch the best."""

import numpy as np
import pytest

from hvdvae.cli.assemble import validation_samples
from hvdvae.cli.assessment import validation_numbers
from hvdvae.config import TrainConfig
from hvdvae.vae import Evaluation

FOUND = Evaluation(
    samples=5,
    nll_per_example=np.array([90.0, 92.0]),
    rate_per_example=np.array([20.0, 22.0]),
    distortion_per_example=np.array([75.0, 77.0]),
    kl_per_dimension=(np.array([21.0]),),
    mean_variance=(np.array([1.0]),),
)


@pytest.mark.parametrize(
    ("config", "samples", "loss"),
    [
        (TrainConfig(objective="iwae", samples=5), 5, 91.0),
        (TrainConfig(samples=5), 1, 97.0),
        (TrainConfig(beta=4.0), 1, 97.0),
        (TrainConfig(free_bits=0.5), 1, 97.0),
    ],
)
def test_the_best_epoch_is_that_of_the_bound_that_is_trained(config: TrainConfig, samples: int, loss: float) -> None:
    assert validation_samples(config) == samples
    numbers = validation_numbers(config, FOUND)
    assert numbers["loss"] == loss
    assert (numbers["elbo"], numbers["rate"], numbers["distortion"]) == (-97.0, 21.0, 76.0)
    assert ("nll" in numbers) == (config.objective == "iwae")
