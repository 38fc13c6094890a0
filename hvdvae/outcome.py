"""How a run ended."""

import signal
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What Trainer.fit returns."""

    epochs: float
    """Epochs done, counting those before a resume."""
    step: int
    examples: int
    """Examples of all ranks in this run."""
    seconds: float
    """Time in training steps, without validation, checkpoints and pictures."""
    signal: int
    """Number of the signal that ended it early; 0: it ran to the end."""
    skipped_steps: int


def exit_status(outcome: Outcome) -> int:
    """What a shell expects: 0, or 128 plus the number of the signal that ended the run early."""
    return 128 + signal.Signals(outcome.signal).value if outcome.signal else 0
