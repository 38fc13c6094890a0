"""What an epoch of training comes to: the numbers that monitors and metrics.jsonl are told at its end."""

import torch
from torch import Tensor

from hvdvae.pulse import Beat
from hvdvae.strategies import Strategy


class EpochSums:
    """Sums over the examples of an epoch whose loss was finite."""

    def __init__(self) -> None:
        """Of nothing yet."""
        self._sums: Tensor = torch.zeros(4, dtype=torch.float64)
        """Examples, and over them loss, rate and distortion (nats)."""

    def add(self, beat: Beat) -> None:
        """Count what a beat tells. Local."""
        if beat.finite_examples:
            means = torch.tensor([1.0, beat.loss, beat.rate, beat.distortion], dtype=torch.float64)
            self._sums += beat.finite_examples * means

    def metrics(self, optimizer: Strategy, examples: int, seconds: float) -> dict[str, float]:
        """Means in nats per example, and what the strategy has to tell. Local.

        `examples`, `seconds`: of the epoch, all ranks. Rate and distortion only where the loss has them.
        """
        state = {
            "lr": float(optimizer.param_groups[0]["lr"]),
            "skipped_steps": float(optimizer.skipped_steps),
        }
        if not examples:  # A resume at the remainder of an epoch: nothing was trained in it.
            return state
        # No mean of none: NaN.
        loss, rate, distortion = (self._sums[1:] / self._sums[0]).tolist()
        terms = {"rate": rate, "distortion": distortion, "elbo": -(rate + distortion)} if rate or distortion else {}
        return {
            "loss": loss,
            **terms,
            "examples_per_second": examples / max(seconds, 1e-9),
            **state,
            "gradient_norm": optimizer.gradient_norm,
            **optimizer.traffic(),
        }
