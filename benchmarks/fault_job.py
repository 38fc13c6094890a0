"""`hvdvae train`, with a line of metrics at every beat, and, if asked, one loss that is not a number.

python benchmarks/fault_job.py NAN_STEP RANK train ...       NAN_STEP 0: none
"""

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # A script's own folder is on the path; the packages are beside it.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import Tensor

from hvdvae.cli import assemble, main
from hvdvae.monitor import jsonl
from hvdvae.trainer import Trainer

jsonl.SECONDS_BETWEEN_LINES = 0.0
nan_step, nan_rank = int(sys.argv[1]), int(sys.argv[2])


def spoil() -> None:
    """Make one rank's loss of one step not a number."""
    made, step = assemble.objective, Trainer._step
    now = {"step": 0, "rank": -1}

    def noted(trainer: Trainer, *batch: Any) -> None:
        now.update(step=trainer.position.step, rank=trainer.world.rank)
        step(trainer, *batch)

    def objective(config: Any) -> Any:
        inner = made(config)

        def loss(*values: Any) -> dict[str, Tensor]:
            found = dict(inner(*values))
            if now == {"step": nan_step, "rank": nan_rank}:
                found["loss"] = found["loss"] * float("nan")
                sys.stderr.write(f"fault_job: the loss of step {nan_step} of rank {nan_rank} is not a number now\n")
            return found

        return loss

    Trainer._step = noted  # type: ignore[method-assign]
    assemble.objective = objective


if nan_step:
    spoil()
sys.exit(main(sys.argv[3:]))
