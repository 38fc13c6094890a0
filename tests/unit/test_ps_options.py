"""Options that workers push with: of one update they are the same, or named."""

import numpy as np
import pytest

from hvdvae.errors import ConfigError
from hvdvae.ps.options import PushedOptions


def pushed(*decays: float) -> PushedOptions:
    options = PushedOptions()
    for worker, decay in enumerate(decays):
        options.take(worker, [{"betas": [0.9, 0.999]}, {"weight_decay": decay}])
    return options


def test_the_same_rates_and_options_make_one_update() -> None:
    pushed(0.1, 0.1).check_same({0: np.array([0.1, 0.2]), 1: np.array([0.1, 0.2 * (1 + 1e-9)])})
    PushedOptions().check_same({3: np.array([0.1])})


@pytest.mark.parametrize(
    ("decays", "rate", "found"),
    [
        ((0.1, 0.1, 0.1), 0.02, r"lr of group 1 is 0\.2 on worker 0 and 0\.02 on worker 2"),
        ((0.1, 0.1, 0.3), 0.2, r"weight_decay of group 1 is 0\.1 on worker 0 and 0\.3 on worker 2"),
    ],
)
def test_what_differs_is_named(decays: tuple[float, ...], rate: float, found: str) -> None:
    rates = {worker: np.array([0.1, 0.2]) for worker in range(2)} | {2: np.array([0.1, rate])}
    with pytest.raises(ConfigError, match=found):
        pushed(*decays).check_same(rates)
