"""From what the ranks and the judge of a cell wrote to its numbers. Pure.

Shapes: N ranks that train, S steps of each.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.study.stopwatch import CPU, DATA, EXCHANGE, PASSES, QUEUE, TROUBLE, UPDATE

FIRST_STEPS = 20
"""Of each rank, left out of latencies, throughput and the split of time: connections are made in them."""
SPLIT = ("compute", "core", "data", "communicate", "wait")
"""Shares of a rank's time: at work, and what a scenario adds to it; ready to, while others had the cores; getting
batches; moving vectors; waiting."""

Steps = NDArray[np.float64]


def numbers(
    order: Mapping[str, Any], ranks: Sequence[tuple[Mapping[str, Any], Steps]], servers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Throughput, latencies, memory and so on of one cell, JSON-able.

    `ranks`: each one's record and times (S, stopwatch.COLUMNS), as job.py wrote them.
    """
    warm = [steps[FIRST_STEPS:] if len(steps) > 2 * FIRST_STEPS else steps for _, steps in ranks]
    latencies = [_latency(steps) for steps in warm]
    batch = ranks[0][0]["batch"]
    throughput = sum(len(each) * batch / each.sum() for each in latencies if len(each))
    quantiles = np.quantile(np.concatenate(latencies), [0.5, 0.95, 0.99]).tolist()
    counted = ranks[0][0]["counted"]
    steps = [len(each) for _, each in ranks]
    everyone = [record for record, _ in ranks] + list(servers)
    return {
        "steps": steps,
        "examples_per_second": throughput,
        "latency_seconds": dict(zip(("p50", "p95", "p99"), quantiles, strict=True)),
        "throughput_over_latency": throughput / quantiles[0],
        "split": _split(warm, counted),
        "staleness": counted.get("staleness_histogram") or {"0": sum(steps)},
        "dropped_pushes": counted.get("dropped_pushes", 0),
        "payload_bytes_per_step": _payload(order, ranks[0][0]["parameters"], counted, sum(steps)),
        "sent_bytes_per_step": _sent(everyone) / max(sum(steps), 1),
        "cpu_cores": [record["cpu_seconds"] / record["seconds"] for record in everyone],
        "peak_rss_bytes": [record["peak_rss_bytes"] for record in everyone],
        "servers": len(servers),
    }


def height(point: Mapping[str, Any], bound: str) -> float | None:
    """The bound on log p(x), higher is better: the ELBO, or minus the NLL; None where it was not finite."""
    value = point[bound]
    return None if value is None else float(-value if bound == "nll" else value)


def crossing(points: Sequence[Mapping[str, Any]], target: float, key: str, bound: str = "elbo") -> float | None:
    """When (`key`: seconds or examples) the bound first was at the target; None: never.

    By a straight line between the two looks around it. A look without a finite bound is below every target.
    """
    before, low = None, None
    for point in points:
        high = height(point, bound)
        if high is not None and high >= target:
            if before is None or low is None:
                return float(point[key])
            share = (target - low) / (high - low)
            return float(before[key] + share * (point[key] - before[key]))
        before, low = point, high
    return None


def height_at(points: Sequence[Mapping[str, Any]], examples: float, bound: str = "elbo") -> float | None:
    """The bound after so many examples, by a straight line between two looks; None where the run is shorter."""
    for before, after in itertools.pairwise(points):
        low, high = height(before, bound), height(after, bound)
        if before["examples"] <= examples <= after["examples"] and low is not None and high is not None:
            share = (examples - before["examples"]) / max(after["examples"] - before["examples"], 1)
            return float(low + share * (high - low))
    return None


def _latency(steps: Steps) -> NDArray[np.float64]:
    """Of each step."""
    return np.asarray(steps[:, [DATA, TROUBLE, PASSES, EXCHANGE, UPDATE]].sum(1))


def _split(warm: Sequence[Steps], counted: Mapping[str, Any]) -> list[dict[str, float]]:
    """Shares of each rank's time, by SPLIT.

    Time in which a pass was blocked is exchange, too: there DDP does it. Where ranks step together, whoever comes last
    waits for nobody: what the exchange of a step took at least, on any rank, is communication, and the rest waiting.
    Under parameter servers waiting is the time that pushes spent at the server.
    """
    length = min(len(steps) for steps in warm)
    exchanges = [
        np.maximum(steps[:, EXCHANGE] - steps[:, EXCHANGE + QUEUE], 0)
        + np.maximum(steps[:, PASSES] - steps[:, PASSES + CPU] - steps[:, PASSES + QUEUE], 0)
        for steps in warm
    ]
    least = np.min([each[:length] for each in exchanges], axis=0)
    shares = []
    for steps, exchange in zip(warm, exchanges, strict=True):
        total = _latency(steps).sum()
        if "queue_seconds_mean" in counted:
            waits = min(counted["queue_seconds_mean"] * len(steps), exchange.sum())
            communicates = exchange.sum() - waits
        elif length == len(steps):
            communicates, waits = least.sum(), (exchange - least).sum()
        else:  # A rank is missing steps, as one that was killed.
            communicates, waits = exchange.sum(), 0.0
        queue = steps[:, [TROUBLE + QUEUE, PASSES + QUEUE, EXCHANGE + QUEUE, UPDATE + QUEUE]].sum()
        data = steps[:, DATA].sum()
        compute = max(total - communicates - waits - queue - data, 0.0)
        parts = (compute, queue, data, communicates, waits)
        shares.append({name: float(part / total) for name, part in zip(SPLIT, parts, strict=True)})
    return shares


def _payload(order: Mapping[str, Any], parameters: int, counted: Mapping[str, Any], steps: int) -> float | None:
    """Bytes that a rank's exchange moves in a step: as was counted, else those of a ring; None: unknown."""
    if "bytes_pushed" in counted:
        return float((counted["bytes_pushed"] + counted["bytes_pulled"]) / max(steps, 1))
    if "bytes_sent_per_step" in counted:
        return float(counted["bytes_sent_per_step"])
    if order["hook"] == "powersgd" or order["config"]["reduce_op"] == "adasum":
        return None
    width = 2 if "fp16" in (order["hook"], order["config"]["compression"]) else 4
    return float(2 * (order["size"] - 1) / order["size"] * parameters * width)


def _sent(everyone: Sequence[Mapping[str, Any]]) -> float:
    """Bytes that went out by network interfaces, the loopback too: those of a host are seen by all of its ranks."""
    hosts: dict[int, float] = {}
    for record in everyone:
        hosts[record["network"]] = max(hosts.get(record["network"], 0.0), record["sent_bytes"])
    return sum(hosts.values())


def is_number(value: Any) -> bool:
    """Whether it can be compared and averaged."""
    return isinstance(value, int | float) and math.isfinite(value)
