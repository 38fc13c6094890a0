"""The heartbeat of a run over parameter servers: nobody meets.

Each worker reports with its pushes, and every answer tells what all workers did. Beats are each worker's own, at its
own times.
"""

import time

import numpy as np
import torch

from hvdvae.ps.ledger import answered
from hvdvae.ps.protocol import ANSWER, Answer
from hvdvae.pulse import PERIOD_SECONDS, ServedBeat
from hvdvae.strategies.ps import ParameterServer


class ServedPulse:
    """As pulse.Pulse, by what the servers tell."""

    def __init__(self, optimizer: ParameterServer) -> None:
        """Local."""
        self._optimizer = optimizer
        self._seen = np.zeros(ANSWER)
        self._terms: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]] = []
        self._data = 0.0
        self.start()

    def start(self) -> None:
        """Begin anew now: time since the last step is no step's. Local."""
        self._start = self._step_start = time.perf_counter()

    def count(self, loss: torch.Tensor, rate: torch.Tensor, distortion: torch.Tensor, examples: int) -> None:
        """Note one pass: means over `examples`. It travels with the push that follows."""
        now = time.perf_counter()
        self._optimizer.report.add_step(
            examples=examples,
            loss=float(loss),
            rate=float(rate),
            distortion=float(distortion),
            data_seconds=self._data,
            seconds=now - self._step_start,
        )
        self._data, self._step_start = 0.0, now

    def count_step(self, examples: int, data_seconds: float) -> None:
        """Note one step, after its passes."""
        self._data = data_seconds

    @property
    def due(self) -> bool:
        """Whether it is time for a beat, or to leave. Each worker's own matter."""
        return bool(self._optimizer.signal) or time.perf_counter() - self._start >= PERIOD_SECONDS

    def beat(self, signal: int) -> ServedBeat:
        """What happened since the last. `signal`: this worker's, which the others hear of. Does not block."""
        optimizer = self._optimizer
        now = optimizer.client.answer[:ANSWER].copy()
        since, self._seen = now - self._seen, now
        seconds, self._start = time.perf_counter() - self._start, time.perf_counter()
        finite, pushes, spent = since[Answer.FINITE], since[Answer.PUSHES], max(since[Answer.SECONDS], 1e-9)
        clocks = optimizer.client.clocks
        return ServedBeat(
            signal=optimizer.signal_to_leave(signal),
            examples=int(since[Answer.EXAMPLES]),
            finite_examples=int(finite),
            loss=float(since[Answer.LOSS] / finite) if finite else float("nan"),
            rate=float(since[Answer.RATE] / finite) if finite else float("nan"),
            distortion=float(since[Answer.DISTORTION] / finite) if finite else float("nan"),
            seconds=seconds,
            data_share=float(since[Answer.DATA_SECONDS] / spent),
            exchange_share=float(since[Answer.BLOCKED_SECONDS] / spent),
            step_seconds=optimizer.client.step_seconds,
            updates=int(since[Answer.UPDATES]),
            dropped=int(since[Answer.DROPPED]),
            staleness_mean=float(since[Answer.STALENESS_SUM] / pushes) if pushes else float("nan"),
            staleness_max=int(now[Answer.STALENESS_MAX]),
            lags=[max(clocks) - clock for clock in clocks if clock >= 0],
            staleness=optimizer.client.histogram,
            queue_seconds=float(since[Answer.QUEUE_SECONDS] / waited) if (waited := answered(since)) else float("nan"),
            bytes_pushed=int(now[Answer.BYTES_PUSHED]),
            bytes_pulled=int(now[Answer.BYTES_PULLED]),
        )
