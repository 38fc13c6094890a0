"""In which order a stage of a pipeline works on micro-batches. Pure.

    GPipe (Huang et al. 2019), S = 3, M = 4            1F1B (PipeDream, Narayanan et al. 2019; flushed)
    stage 0  F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3       F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
    stage 1     F0 F1 F2 F3 .  .  B0 B1 B2 B3             F0 F1 .  B0 F2 B1 F3 B2 .  B3
    stage 2        F0 F1 F2 F3 B0 B1 B2 B3                   F0 B0 F1 B1 F2 B2 F3 B3

Both leave each stage idle for (S - 1) / (M + S - 1) of a step; 1F1B holds activations of at most S micro-batches, GPipe
of M.
"""

from typing import Literal, NamedTuple

SCHEDULES = ("1f1b", "gpipe")


class Work(NamedTuple):
    """One turn of a stage."""

    kind: Literal["forward", "backward"]
    micro: int
    """Number of the micro-batch."""


def order_of(schedule: str, stage: int, stages: int, micros: int) -> list[Work]:
    """All turns of a stage in a step. Pure."""
    ahead = micros if schedule == "gpipe" else min(stages - stage, micros)
    order = [Work("forward", micro) for micro in range(ahead)]
    for micro in range(micros):
        order.append(Work("backward", micro))
        if ahead + micro < micros:
            order.append(Work("forward", ahead + micro))
    return order


def bubble(stages: int, micros: int) -> float:
    """The part of a step in which a stage has nothing to do, if all take equally long (Huang et al. 2019). Pure."""
    return (stages - 1) / (micros + stages - 1)


def cut_points(costs: list[float], stages: int) -> list[int]:
    """First step of each stage, so that the dearest stage is as cheap as can be. Pure.

    `costs`: of each step, in order; each stage gets at least one. Dynamic programming over the places of the last cut.
    """
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    best = [(total[stop], [0]) for stop in range(len(total))]
    for stage in range(2, stages + 1):
        best = [
            min(
                ((max(best[cut][0], total[stop] - total[cut]), [*best[cut][1], cut]) for cut in range(stage - 1, stop)),
                default=(float("inf"), []),
            )
            for stop in range(len(total))
        ]
    return best[-1][1]
