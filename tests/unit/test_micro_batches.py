"""The order of a pipeline's work: what must come before what, how much is held, and how long stages are idle."""

import itertools
from collections.abc import Sequence

import pytest

from hvdvae.parallel.micro_batches import SCHEDULES, Work, bubble, cut_points, order_of

SIZES = list(itertools.product(SCHEDULES, (1, 2, 3, 5), (1, 2, 4, 7)))


@pytest.mark.parametrize(("schedule", "stages", "micros"), SIZES)
def test_every_micro_batch_goes_forward_once_and_then_back_once(schedule: str, stages: int, micros: int) -> None:
    for stage in range(stages):
        order = order_of(schedule, stage, stages, micros)
        assert sorted(order) == sorted(Work(kind, m) for kind in ("forward", "backward") for m in range(micros))
        for micro in range(micros):
            assert order.index(Work("forward", micro)) < order.index(Work("backward", micro))
        for kind in ("forward", "backward"):
            turns = [micro for what, micro in order if what == kind]
            assert turns == sorted(turns), "messages arrive in the order in which they are awaited"


def played(schedule: str, stages: int, micros: int) -> tuple[int, int]:
    """Turns until the end where each work takes one, and most micro-batches that a stage held."""
    orders = [order_of(schedule, stage, stages, micros) for stage in range(stages)]
    done: dict[tuple[str, int, int], int] = {}
    free, most = [0] * stages, 0
    held = [0] * stages
    while any(orders):
        moved = False
        for stage, order in enumerate(orders):
            if not order:
                continue
            kind, micro = order[0]
            neighbour = stage - 1 if kind == "forward" else stage + 1
            needs = done.get((kind, neighbour, micro), 0) if 0 <= neighbour < stages else 0
            if 0 <= neighbour < stages and (kind, neighbour, micro) not in done:
                continue
            free[stage] = max(free[stage], needs) + 1
            done[kind, stage, micro] = free[stage]
            held[stage] += 1 if kind == "forward" else -1
            most = max(most, held[stage])
            order.pop(0)
            moved = True
        assert moved, "stages wait for each other"
    return max(free), most


@pytest.mark.parametrize(("schedule", "stages", "micros"), SIZES)
def test_stages_are_idle_as_long_as_theory_says_and_never_wait_for_each_other(
    schedule: str, stages: int, micros: int
) -> None:
    turns, held = played(schedule, stages, micros)
    assert 1 - 2 * micros / turns == pytest.approx(bubble(stages, micros))
    assert held == (micros if schedule == "gpipe" else min(stages, micros))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("costs", [[1, 1, 1, 1], [5, 1, 1, 1], [1, 1, 1, 5], [4, 1, 1, 4, 1, 1], [3, 0, 0, 2, 9, 2]])
def test_the_dearest_stage_is_as_cheap_as_can_be(costs: list[float], stages: int) -> None:
    def dearest(cuts: Sequence[int]) -> float:
        return max(sum(costs[start:stop]) for start, stop in itertools.pairwise([*cuts, len(costs)]))

    found = cut_points(costs, stages)
    every = [(0, *cuts) for cuts in itertools.combinations(range(1, len(costs)), stages - 1)]
    assert tuple(found) in every
    assert dearest(found) == min(map(dearest, every))
