"""Error feedback: what a message left out is remembered and goes with the next one. Nothing is lost, only late.

    compensated = gradient + remembered;   send a part of it;   remembered = compensated - sent

(Seide et al. 2014; Karimireddy et al. 2019). Where a message says elements as they are, or nothing of them, that is
exact in float32. Where it says something near them, what is remembered is float64: beside a large part that was sent,
float32 would drop a small one that was not. With momentum correction (Lin et al. 2018, Deep Gradient Compression,
section 3.1) a velocity is remembered too, and what has been sent is taken out of both.
"""

import torch
from torch import Tensor

from hvdvae.errors import ConfigError

WITH_MOMENTUM = ("topk", "randomk")
"""Codecs that say elements as they are: momentum correction was made for these."""


def check_momentum(compression: str, momentum: float) -> None:
    """Raises ConfigError where a codec has no momentum correction, or not of this size. Pure."""
    if momentum and compression not in WITH_MOMENTUM:
        raise ConfigError(
            f"--compression-momentum is for --compression {' and '.join(WITH_MOMENTUM)}, found {compression}: it "
            "corrects for elements that are sent late"
        )
    if not 0 <= momentum < 1:
        raise ConfigError(f"--compression-momentum is {momentum}, expected 0 to below 1")


class Feedback:
    """Of one rank. Shapes: P elements."""

    def __init__(self, length: int, codec: str, momentum: float = 0.0) -> None:
        """Nothing remembered. `codec`: its name; `momentum`: of the velocity; 0 for none."""
        dtype = torch.float32 if codec in WITH_MOMENTUM else torch.float64
        self.remembered = torch.zeros(length, dtype=dtype)
        self._next = torch.zeros(length, dtype=dtype)
        self._rounded = None if dtype == torch.float32 else torch.zeros(length)
        """What the codec gets of what is to be said."""
        self._momentum = momentum
        self._velocity = torch.zeros(length if momentum else 0)
        self._next_velocity = torch.zeros_like(self._velocity)

    def memory(self) -> dict[str, Tensor]:
        """By name."""
        return {"remembered": self.remembered} | ({"velocity": self._velocity} if self._momentum else {})

    def compensate(self, gradient: Tensor) -> Tensor:
        """The vector (P,), float32, to send of; valid until the next call. Leaves the gradient alone."""
        if not self._momentum:
            whole = torch.add(gradient, self.remembered, out=self._next)
            return whole if self._rounded is None else self._rounded.copy_(whole)
        torch.add(gradient, self._velocity, alpha=self._momentum, out=self._next_velocity)
        return torch.add(self._next_velocity, self.remembered, out=self._next)

    def remember(self, sent: Tensor) -> Tensor:
        """Take out what was sent (P,); returns what is left, which counts from `keep` on."""
        if self._momentum:
            self._next_velocity.masked_fill_(sent != 0, 0.0)
        return self._next.sub_(sent)

    def keep(self) -> None:
        """The step was taken. Otherwise all is as it was before, and the gradient of that step is nobody's."""
        self.remembered, self._next = self._next, self.remembered
        self._velocity, self._next_velocity = self._next_velocity, self._velocity
