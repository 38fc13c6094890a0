"""The heartbeat of a run: at agreed steps all ranks lay down what they did, and agree whether to stop.

    sums, one row a rank, float64:
        [stop, steps, examples, finite examples, loss, rate, distortion, data s, exchange s, step s]

One small sum of an (N, 10) matrix in which every rank filled its own row. All ranks get the same matrix, so whatever
they decide from it (stop now, when to meet next) they decide alike.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from hvdvae.world import World

PERIOD_SECONDS = 0.1
"""How often ranks meet, about: a signal is acted on within this time."""

_NONE = np.zeros((0, 3))

STOP, STEPS, EXAMPLES, FINITE, LOSS, RATE, DISTORTION, DATA, EXCHANGE, TOTAL = range(10)


@dataclass(frozen=True)
class Beat:
    """What all ranks did since the last beat."""

    signal: int
    """Number of the signal that some rank got; 0: go on."""
    examples: int
    finite_examples: int
    """Those whose loss was finite."""
    loss: float
    rate: float
    distortion: float
    """Means over the finite examples of all ranks, nats per example; NaN if there were none."""
    seconds: float
    """Longest time a rank took, since the last beat."""
    data_share: float
    exchange_share: float
    """Shares of the time spent waiting for data, and in the exchange, mean over ranks."""
    step_seconds: list[float]
    """Mean time of a step, one number a rank."""


@dataclass(frozen=True)
class ServedBeat(Beat):
    """What all workers of parameter servers did since this worker's last beat, and how stale."""

    updates: int
    dropped: int
    """Pushes that came too late."""
    staleness_mean: float
    """Updates between pull and push, mean over pushes; NaN if there were none."""
    staleness_max: int
    """Since the start."""
    lags: list[int]
    """Steps that each worker is behind the fastest."""
    staleness: list[int]
    """Pushes that were applied with a staleness of 0, 1, ...; the last counts all beyond."""
    queue_seconds: float
    """Mean time that a push waited at a server for its answer."""
    bytes_pushed: int
    bytes_pulled: int


class Pulse:
    """Sums of this rank since the last beat, and the count of steps to the next."""

    def __init__(self, world: World, *, speaks: bool = True) -> None:
        """Local. `speaks`: whether this rank's examples are told; one of those that compute a model together does."""
        self._world, self._speaks = world, speaks
        self._every = 1
        self._terms: list[torch.Tensor] = []
        self._weights: list[int] = []
        self.start()

    def start(self) -> None:
        """Begin anew now: time that was spent since the last beat (in validation, say) is no step's. Local."""
        self._steps = self._examples = 0
        self._data = 0.0
        self._terms.clear()
        self._weights.clear()
        self._waited = self._world.watchdog.waited
        self._start = time.perf_counter()

    def count(self, loss: torch.Tensor, rate: torch.Tensor, distortion: torch.Tensor, examples: int) -> None:
        """Note one pass: means over `examples`, scalars without a gradient; they stay on their device until a beat."""
        self._terms += (loss, rate, distortion)
        self._weights.append(examples if self._speaks else 0)

    def count_step(self, examples: int, data_seconds: float) -> None:
        """Note one step, after its passes."""
        self._steps += 1
        self._examples += examples if self._speaks else 0
        self._data += data_seconds

    @property
    def due(self) -> bool:
        """Whether this is the agreed step to meet; the same on all ranks."""
        return self._steps >= self._every

    def beat(self, signal: int) -> Beat:
        """Meet. Blocks; every rank must call it after the same step."""
        world = self._world
        waited = world.watchdog.waited - self._waited
        total = time.perf_counter() - self._start
        terms = torch.stack(self._terms).cpu().double().view(-1, 3).numpy() if self._terms else _NONE
        # Passes that were not finite have no say in the means.
        finite = np.isfinite(terms).all(1)
        weights = np.array(self._weights, np.float64)[finite]
        mine = weights @ terms[finite]
        table = np.zeros((world.size, 10))
        table[world.rank] = (signal, self._steps, self._examples, weights.sum(), *mine, self._data, waited, total)
        world.sum_(torch.from_numpy(table), "pulse")
        each = table[:, TOTAL] / np.maximum(table[:, STEPS], 1)
        self._every = min(max(int(PERIOD_SECONDS / max(each.max(), 1e-6)), 1), 1000)
        self.start()
        sums = table.sum(0)
        finite_examples = float(sums[FINITE])
        loss, rate, distortion = (
            float(sums[term]) / (finite_examples or math.nan) for term in (LOSS, RATE, DISTORTION)
        )
        return Beat(
            signal=int(table[:, STOP].max()),
            examples=int(sums[EXAMPLES]),
            finite_examples=int(finite_examples),
            loss=loss,
            rate=rate,
            distortion=distortion,
            seconds=float(table[:, TOTAL].max()),
            data_share=float(sums[DATA] / sums[TOTAL]),
            exchange_share=float(sums[EXCHANGE] / sums[TOTAL]),
            step_seconds=each.tolist(),
        )
