"""Learning rates as functions of the epoch."""

import math
from typing import Literal

import pytest

from hvdvae.schedule import Schedule, learning_rate, world_scale


def schedule(kind: Literal["constant", "cosine", "step"], warmup: float = 0.0) -> Schedule:
    return learning_rate(kind, epochs=20, warmup=warmup, step_epochs=4, gamma=0.5)


def test_constant_is_one() -> None:
    assert [schedule("constant")(epoch) for epoch in (0.0, 0.3, 19.99, 50)] == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["constant", "cosine", "step"])
def test_warm_up_is_linear_from_zero_and_joins_on(kind: Literal["constant", "cosine", "step"]) -> None:
    factor = schedule(kind, warmup=2)
    assert [factor(epoch) for epoch in (0, 0.5, 1, 1.5)] == [0, 0.25, 0.5, 0.75]
    assert factor(2 - 1e-9) == pytest.approx(1)
    assert factor(2) == 1


def test_cosine_falls_to_zero_at_the_last_epoch_and_stays() -> None:
    factor = schedule("cosine", warmup=2)
    assert factor(11) == pytest.approx(0.5)
    assert factor(6.5) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert factor(20) == pytest.approx(0, abs=1e-12)
    assert factor(25) == pytest.approx(0, abs=1e-12)
    values = [factor(2 + epoch / 10) for epoch in range(181)]
    assert values == sorted(values, reverse=True)


def test_a_warm_up_as_long_as_the_run_divides_by_nothing() -> None:
    assert learning_rate("cosine", epochs=2, warmup=2, step_epochs=1, gamma=0.1)(2) == 1


def test_steps_drop_by_gamma_counted_from_the_end_of_the_warm_up() -> None:
    factor = schedule("step", warmup=2)
    assert [factor(epoch) for epoch in (2, 5.99, 6, 9.99, 10, 18.5)] == [1, 1, 0.5, 0.5, 0.25, 0.0625]


def test_scaling_with_the_ranks() -> None:
    assert [world_scale("none", n) for n in (1, 4)] == [1, 1]
    assert [world_scale("linear", n) for n in (1, 4)] == [1, 4]
    assert [world_scale("sqrt", n) for n in (1, 4)] == [1, 2]
