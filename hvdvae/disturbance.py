"""Trouble on purpose: a rank that is slower than others, that stutters, stops for a while, or dies.

What a real cluster does by chance, a comparison of strategies needs in equal doses: a disturbance is a function of
(seed, rank, step), so that every strategy suffers the same. It never changes what is computed: work that it adds is
thrown away.
"""

import math
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hvdvae.errors import ConfigError
from hvdvae.seeding import stream

By = Literal["compute", "sleep"]
"""compute: the step's own work over again, which takes what it takes from a shared core; sleep: idle time."""


@dataclass(frozen=True, kw_only=True)
class Slow:
    """One rank takes `factor` times as long for a step."""

    rank: int
    factor: float
    by: By = "compute"

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        _check_rank(self.rank)
        if not 1 <= self.factor < math.inf:
            raise ConfigError(f"factor is {self.factor}, expected a number of at least 1")
        _check_by(self.by)

    def extra(self, seed: int, rank: int, step: int) -> float:
        """Work on top of a step's own, in units of that."""
        return self.factor - 1 if rank == self.rank else 0.0


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Every rank's steps take longer by a log-normal share of their own: now and then by a lot."""

    mean: float
    """Of the extra work, in units of a step's own."""
    sigma: float
    """Of its logarithm: 0 is the same for every step; at 1.5 one step in a hundred has eleven times the mean."""
    by: By = "compute"

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        for name, value in (("mean", self.mean), ("sigma", self.sigma)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name} is {value}, expected a number of at least 0")
        _check_by(self.by)

    def extra(self, seed: int, rank: int, step: int) -> float:
        """Work on top of a step's own, in units of that; independent of all other ranks and steps."""
        normal = np.random.default_rng(stream(_JITTER, seed, rank, step)).standard_normal()
        return float(self.mean * math.exp(self.sigma * normal - self.sigma**2 / 2))


@dataclass(frozen=True, kw_only=True)
class Stop:
    """One rank stops, all its threads at once (SIGSTOP), and goes on after some seconds."""

    rank: int
    seconds: float
    at_step: int

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        _check_rank(self.rank)
        if not 0 < self.seconds < math.inf:
            raise ConfigError(f"seconds is {self.seconds}, expected a number above 0")
        _check_step(self.at_step)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One rank dies (SIGKILL)."""

    rank: int
    at_step: int

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        _check_rank(self.rank)
        _check_step(self.at_step)


Trouble = Slow | Jitter | Stop | Kill


class Disturbance:
    """What one rank suffers. A loop calls `before_step` before every step's own work."""

    def __init__(self, troubles: list[Trouble], *, seed: int, rank: int) -> None:
        """Nothing happens yet. `rank`: among those that train."""
        self._troubles, self._seed, self._rank = troubles, seed, rank
        self._owed: dict[By, float] = {"compute": 0.0, "sleep": 0.0}
        self._work_seconds = 0.0
        """Of the processor, that the last step's own work took."""

    def before_step(self, step: int, work: Callable[[], None]) -> None:
        """Suffer what this step brings. Blocks for that long; may end the process.

        `work`: does a step's own work once more and throws the result away. Where a part of it is owed, that is
        carried over until a whole is due.
        """
        for trouble in self._troubles:
            match trouble:
                case Slow() | Jitter():
                    self._owed[trouble.by] += trouble.extra(self._seed, self._rank, step)
                case Stop(rank=self._rank, at_step=at_step) if at_step == step:
                    _stop_for(trouble.seconds)
                case Kill(rank=self._rank, at_step=at_step) if at_step == step:
                    os.kill(os.getpid(), signal.SIGKILL)
        # Sums such as ten times 0.1 shall be whole.
        due = math.floor(self._owed["compute"] + 1e-9)
        self._owed["compute"] -= due
        for _ in range(due):
            work()
        if self._owed["sleep"] and self._work_seconds:
            time.sleep(self._owed["sleep"] * self._work_seconds)
            self._owed["sleep"] = 0.0

    def worked(self, seconds: float) -> None:
        """Tell how long the step's own work kept the processor: what a sleep is measured in."""
        self._work_seconds = seconds


_JITTER = 0x6A17
"""Names the stream of random numbers."""


def _stop_for(seconds: float) -> None:
    """As an operating system or a debugger would: from outside, since who is stopped cannot wake itself."""
    me = os.getpid()
    waker = subprocess.Popen(["sh", "-c", f"kill -STOP {me}; sleep {seconds}; kill -CONT {me}"])
    waker.wait()


def _check_rank(rank: int) -> None:
    if rank < 0:
        raise ConfigError(f"rank is {rank}, expected at least 0")


def _check_step(step: int) -> None:
    if step < 0:
        raise ConfigError(f"at_step is {step}, expected at least 0")


def _check_by(by: str) -> None:
    if by not in ("compute", "sleep"):
        raise ConfigError(f"by is {by!r}, expected compute or sleep")
