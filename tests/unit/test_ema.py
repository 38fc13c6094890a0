"""The moving average of the weights."""

import pytest
import torch

from hvdvae.ema import MovingAverage


def test_the_average_is_its_recursion() -> None:
    parameters = torch.tensor([1.0, -2.0])
    average = MovingAverage(parameters, 0.75)
    expected = parameters.clone()
    for step in range(5):
        parameters.add_(step)
        average.update()
        expected = 0.75 * expected + 0.25 * parameters
    torch.testing.assert_close(average.average, expected)
    assert not torch.equal(expected, parameters)


def test_it_is_applied_inside_only_also_when_the_inside_fails() -> None:
    parameters = torch.tensor([1.0, 2.0])
    average = MovingAverage(parameters, 0.5)
    parameters.fill_(9.0)
    average.update()
    with average.applied():
        assert parameters.tolist() == [5, 5.5]
    assert parameters.tolist() == [9, 9]
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert parameters.tolist() == [9, 9]
    assert average.average.tolist() == [5, 5.5]
