"""What a training loop tells of its steps and hears of the others', whichever way they keep in touch."""

from typing import Protocol

import torch

from hvdvae.pulse import Beat, Pulse
from hvdvae.strategies import Strategy


class Heartbeat(Protocol):
    """What the loop tells, and when it looks up from its steps."""

    @property
    def due(self) -> bool:
        """Whether to beat after this step."""

    def start(self) -> None:
        """Begin anew now: time that was spent since the last beat (in validation, say) is no step's. Local."""

    def count(self, loss: torch.Tensor, rate: torch.Tensor, distortion: torch.Tensor, examples: int) -> None:
        """Note one pass, before the optimizer's step: means over `examples`, scalars without a gradient."""

    def count_step(self, examples: int, data_seconds: float) -> None:
        """Note one step, after it."""

    def beat(self, signal: int) -> Beat:
        """What all ranks did since the last, and whether to stop. `signal`: that this rank got, or 0."""


def pulse_of(optimizer: Strategy) -> Heartbeat:
    """The heartbeat that goes with a strategy: a meeting where ranks step together, else what the servers tell."""
    if optimizer.synchronous:
        speaks = optimizer.parts is None or optimizer.parts.speaks
        return Pulse(optimizer.whole, speaks=speaks)
    # Imported here: they need MPI.
    from hvdvae.pulse_served import ServedPulse
    from hvdvae.strategies.ps import ParameterServer

    assert isinstance(optimizer, ParameterServer)
    return ServedPulse(optimizer)
