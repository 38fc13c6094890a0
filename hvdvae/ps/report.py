"""What a worker did since its last push, which the next one tells the servers."""

import numpy as np
from numpy.typing import NDArray

from hvdvae.ps.protocol import REQUEST, Request


class Report:
    """Sums over steps, in the fields of a request."""

    def __init__(self) -> None:
        """Nothing done yet."""
        self._sums = np.zeros(REQUEST)

    def add_step(
        self, *, examples: int, loss: float, rate: float, distortion: float, data_seconds: float, seconds: float
    ) -> None:
        """Count a step. Losses: means over its examples, nats; a step with one that is not finite adds none of them."""
        sums = self._sums
        sums[Request.STEPS] += 1
        sums[Request.EXAMPLES] += examples
        sums[Request.DATA_SECONDS] += data_seconds
        sums[Request.SECONDS] += seconds
        if np.isfinite([loss, rate, distortion]).all():
            sums[Request.FINITE] += examples
            sums[Request.LOSS : Request.DISTORTION + 1] += np.multiply(examples, [loss, rate, distortion])

    def add_blocked(self, seconds: float) -> None:
        """Count time that the worker waited for servers."""
        self._sums[Request.BLOCKED_SECONDS] += seconds

    def at(self, epochs: float) -> None:
        """Say how far this worker has come."""
        self._sums[Request.EPOCHS] = epochs

    def signal(self, number: int) -> None:
        """Say from now on that the operating system asked this worker to end."""
        self._sums[Request.SIGNAL] = number

    def taken(self) -> NDArray[np.float64]:
        """The sums, (REQUEST,); they begin again from zero."""
        sums, self._sums = self._sums, np.zeros(REQUEST)
        for lasting in (Request.SIGNAL, Request.EPOCHS):
            self._sums[lasting] = sums[lasting]
        return sums
