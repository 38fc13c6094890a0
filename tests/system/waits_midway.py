"""`python waits_midway.py WHERE ARGUMENTS` is `hvdvae ARGUMENTS`, which waits for a signal at a place that is known.

WHERE is the number of a step, in which rank 0 waits until a signal has come, or `test`: the final test has begun. It
makes the file `waits` there, so that whoever sends the signal need not guess, however slow the machine is.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hvdvae import pulse, trainer
from hvdvae.cli import run
from hvdvae.cli import train as command
from hvdvae.signals import Caught, caught

WAITS, SECONDS = Path("waits"), 60.0
where = sys.argv.pop(1)
flags: list[Caught] = []
take_step, assess = trainer.Stepper.step, command.assess


@contextmanager
def noted() -> Iterator[Caught]:
    with caught() as flag:
        flags.append(flag)
        yield flag


def step(self: trainer.Stepper, batch: Any, number: int, *rest: Any) -> None:
    if str(number) == where and self._optimizer.world.is_first:
        WAITS.touch()
        give_up = time.monotonic() + SECONDS
        while not flags[-1].number and time.monotonic() < give_up:
            time.sleep(0.01)
    take_step(self, batch, number, *rest)


def final_test(*arguments: Any, **options: Any) -> Any:
    if where == "test" and options.get("title", "").startswith("test"):
        WAITS.touch()
    return assess(*arguments, **options)


pulse.PERIOD_SECONDS = 0.0  # A signal is acted on after the step in which it came.
trainer.caught = noted  # type: ignore[attr-defined]
trainer.Stepper.step = step  # type: ignore[method-assign]
command.assess = final_test  # type: ignore[attr-defined]
if __name__ == "__main__":
    sys.exit(run())
