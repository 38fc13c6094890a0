"""One way of training, to be timed against others; and the plain loop that most of them share.

A side is opened for a block and closed after it, so that none of its threads lives while another side is timed, and
every block lays out its memory anew.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.task import Task

Run = Callable[[int], None]
"""Takes so many training steps. Every rank of the side calls it with the same number."""


@dataclass(frozen=True)
class Side:
    """A name and how to open it."""

    key: str
    """Name in the JSON file."""
    what: str
    """Name in tables, and how it was set up."""
    open: Callable[[Task], AbstractContextManager[Run]]
    models: tuple[str, ...] = ("mlp", "conv")


def plain_loop(task: Task, model: nn.Module, optimizer: Optimizer, batches: Iterable[Tensor]) -> Run:
    """The loop of every tutorial: batch, zero_grad, loss, backward, step. Mutates model and optimizer."""
    ahead = iter(batches)
    model.train()

    def run(steps: int) -> None:
        for _ in range(steps):
            batch = next(ahead)
            optimizer.zero_grad()
            task.objective(model, batch, 0.0)["loss"].backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return run
