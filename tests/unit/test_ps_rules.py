"""The update rules against their papers' formulas, written out."""

import pytest
import torch
from torch import Tensor

from hvdvae.ps.rules import RULES, Rule, ShardOptimizer, rule

LR = 0.1


def weights() -> Tensor:
    return torch.tensor([1.0, -2.0, 0.5, 3.0])


def make(name: str, start: Tensor) -> Rule:
    groups = [{"start": 0, "stop": 3, "lr": LR}, {"start": 3, "stop": 4, "lr": 2 * LR}]
    return rule(name, ShardOptimizer(start, torch.optim.SGD, groups), workers=2, strength=0.5, elasticity=0.25)


RATES = torch.tensor([LR, LR, LR, 2 * LR])
PUSH = torch.tensor([0.3, -0.1, 2.0, 1.0])


@pytest.mark.parametrize(("staleness", "divisor"), [(0, 1), (1, 1), (2, 2), (7, 7)])
def test_staleness_divides_the_learning_rate(staleness: int, divisor: int) -> None:
    for name, by in (("plain", 1), ("staleness-lr", divisor)):
        start = weights()
        make(name, start).apply(PUSH.clone(), 0, staleness)
        torch.testing.assert_close(start, weights() - RATES * PUSH / by)


def test_the_rate_is_whole_again_for_the_next_push() -> None:
    start = weights()
    staleness_rule = make("staleness-lr", start)
    staleness_rule.apply(PUSH.clone(), 0, 5)
    staleness_rule.apply(PUSH.clone(), 0, 0)
    torch.testing.assert_close(start, weights() - RATES * PUSH * 1.2)


def test_delay_compensation_is_the_papers_formula() -> None:
    """Worker 1 pulls, worker 0 moves the weights, then worker 1 pushes (Zheng et al. 2017, eq. 10)."""
    start = weights()
    compensated = make("dcasgd", start)
    compensated.answered(1, start)
    compensated.apply(PUSH.clone(), 0, 0)
    moved, late = start.clone(), torch.tensor([1.0, 1.0, -1.0, 0.5])
    compensated.apply(late.clone(), 1, 1)
    expected = moved - RATES * (late + 0.5 * late * late * (moved - weights()))
    torch.testing.assert_close(start, expected)


def test_delay_is_counted_from_what_the_worker_has() -> None:
    """With short messages it has other weights than the server had."""
    start = weights()
    compensated = make("dcasgd", start)
    held = start + 0.25
    compensated.answered(1, held)
    late = torch.tensor([1.0, 1.0, -1.0, 0.5])
    compensated.apply(late.clone(), 1, 0)
    torch.testing.assert_close(start, weights() - RATES * (late + 0.5 * late * late * (weights() - held)))


def test_the_normalized_form_divides_by_the_mean_square() -> None:
    start = weights()
    compensated = make("dcasgd-a", start)
    compensated.answered(1, start)
    compensated.apply(PUSH.clone(), 0, 0)
    moved, late = start.clone(), torch.tensor([1.0, 1.0, -1.0, 0.5])
    mean_square = 0.95 * 0.05 * PUSH**2 + 0.05 * late**2
    compensated.apply(late.clone(), 1, 1)
    strength = 0.5 / (mean_square + 1e-7).sqrt()
    torch.testing.assert_close(start, moved - RATES * (late + strength * late * late * (moved - weights())))


@pytest.mark.parametrize("name", [name for name in RULES if name != "easgd"])
def test_without_delay_all_are_plain_to_the_last_bit(name: str) -> None:
    start, plain = weights(), weights()
    mine, reference = make(name, start), make("plain", plain)
    for step in range(5):
        push = PUSH * (step + 1)
        mine.apply(push.clone(), 0, 0)
        mine.answered(0, start)
        reference.apply(push.clone(), 0, 0)
    assert torch.equal(start, plain)


def test_elastic_averaging_pulls_both_ways_alike() -> None:
    """x + center stays what it was (Zhang et al. 2015, eqs. 2 and 3)."""
    center, x = weights(), torch.tensor([0.0, 0.0, 1.0, -1.0])
    elastic = make("easgd", center)
    elastic.apply(x.clone(), 0, 3)
    after = x - elastic.reply(0)
    torch.testing.assert_close(center, weights() + 0.25 * (x - weights()))
    torch.testing.assert_close(after, x - 0.25 * (x - weights()))
    torch.testing.assert_close(after + center, x + weights())
