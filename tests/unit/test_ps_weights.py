"""A server's weights change in place: after the first update no vector is allocated for another."""

import pytest
import torch
from torch.optim import SGD, Adam
from torch.profiler import ProfilerActivity, profile

from hvdvae.ps.plan import Plan
from hvdvae.ps.weights import Weights

LENGTH, WORKERS = 100_000, 2


def started(plan: Plan, optimizer: str, clip_norm: float | None = None) -> Weights:
    weights = Weights(
        plan,
        workers=WORKERS,
        buffers=0,
        pieces=[slice(0, LENGTH)],
        length=LENGTH,
        dtype=torch.float32,
        optimizer=optimizer,
        clip_norm=clip_norm,
        sum_over_servers=lambda value: value,
    )
    kind = {"Adam": Adam, "SGD": SGD}[optimizer]
    (options,) = kind([torch.nn.Parameter(torch.zeros(1))], lr=0.01, fused=True).param_groups
    options = {key: value for key, value in options.items() if key != "params"}
    weights.start([options], [{"vectors": [], "numbers": {}}], [])
    return weights


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
@pytest.mark.parametrize(
    ("plan", "clip_norm"),
    [
        (Plan(), None),
        (Plan(consistency="bsp"), 0.5),
        (Plan(rule="staleness-lr"), None),
        (Plan(rule="dcasgd"), None),
        (Plan(rule="dcasgd-a"), None),
        (Plan(rule="easgd"), None),
    ],
    ids=str,
)
def test_no_vector_is_allocated(plan: Plan, clip_norm: float | None, optimizer: str) -> None:
    weights = started(plan, optimizer, clip_norm)
    pushes = [torch.randn(LENGTH) for _ in range(WORKERS if plan.consistency == "bsp" else 1)]

    def exchange() -> None:
        weights.update(pushes, [0.01], 0, 1)
        weights.answered(0)
        weights.answer(0)

    exchange()
    before = weights.vector.clone()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        exchange()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in found.key_averages())
    assert allocated < LENGTH, "bytes; a vector has four times as many"
    assert not torch.equal(weights.vector, before)
