"""Sides that are ours: the Trainer, as a user builds it, with two ranks or with one."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from benchmarks.side import Run, Side, plain_loop
from benchmarks.task import LEARNING_RATE, SEED, Task, endless
from hvdvae import DistributedOptimizer, Trainer, World
from hvdvae.data import Loader

DEADLINE = 60.0
"""Seconds that a rank waits for the other before the job is ended with a report."""
MADE_BEFORE = 8
"""Batches of the sides that are forward, backward and optimizer alone."""


class Stretch:
    """So many batches at a time as an epoch of the Trainer, each stretch going on where the last one ended."""

    def __init__(self, loader: Loader) -> None:
        self._global_batch = loader.global_batch
        self._batches = endless(loader)
        self.examples = 0

    def set_length(self, steps: int) -> None:
        """Steps of the next stretch."""
        self.examples = steps * self._global_batch

    def steps(self, start: int = 0) -> int:
        """Steps left from position `start`."""
        return (self.examples - start) // self._global_batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """The next batches."""
        for _ in range(self.steps(start)):
            yield next(self._batches)


def train(
    task: Task,
    world: World,
    *,
    strategy: str,
    engine: str | None = None,
    precision: str = "fp32",
    channels_last: bool = False,
) -> Run:
    """A Trainer as a user builds it. Blocks; every rank of `world` must call it, and what it returns."""
    model = task.network()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    adam = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    optimizer = DistributedOptimizer(adam, model, world=world, strategy=strategy, engine=engine)
    stretch = Stretch(task.loader(world.rank, world.size))
    trainer = Trainer(model, optimizer, task.objective, stretch, seed=SEED, precision=precision)

    def run(steps: int) -> None:
        stretch.set_length(steps)
        trainer.fit(trainer.position.epoch + 1)

    return run


@contextmanager
def _two_ranks(task: Task, *, engine: str) -> Iterator[Run]:
    # A world of its own, because closing it is what stops Horovod's thread.
    world = World.create(device="cpu", deadline=DEADLINE)
    try:
        yield train(task, world, strategy="allreduce", engine=engine)
    finally:
        world.close()


@contextmanager
def _one_process(task: Task, *, precision: str = "fp32", channels_last: bool = False) -> Iterator[Run]:
    world = World.alone(device="cpu")
    yield train(task, world, strategy="local", precision=precision, channels_last=channels_last)


@contextmanager
def _bare(task: Task) -> Iterator[Run]:
    model = task.network()
    adam = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)
    yield plain_loop(task, model, adam, _made_before(task))


@contextmanager
def _our_optimizer(task: Task) -> Iterator[Run]:
    model = task.network()
    adam = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    optimizer = DistributedOptimizer(adam, model, world=World.alone(device="cpu"), strategy="local")
    yield plain_loop(task, model, optimizer, _made_before(task))


def _made_before(task: Task) -> Iterator[Tensor]:
    """Batches that cost nothing to make any more; several, so that each is as cold as the Trainer's are."""
    return itertools.cycle([batch.clone() for batch in itertools.islice(endless(task.loader()), MADE_BEFORE)])


MPI = Side("mpi", "our Trainer, engine mpi", partial(_two_ranks, engine="mpi"))
HOROVOD = Side("horovod", "our Trainer, engine horovod", partial(_two_ranks, engine="horovod"))
APART = Side("apart", "our Trainer twice, which exchange nothing", _one_process)
ONE_PROCESS = (
    Side("local", "our Trainer, one process", _one_process),
    Side("bare", "forward, backward and fused Adam alone", _bare),
    Side("optimizer", "forward, backward and our optimizer alone", _our_optimizer),
    Side("bf16", "our Trainer, bf16", partial(_one_process, precision="bf16")),
    Side("local_cl", "our Trainer, channels last", partial(_one_process, channels_last=True), ("conv",)),
    Side(
        "bf16_cl",
        "our Trainer, bf16, channels last",
        partial(_one_process, precision="bf16", channels_last=True),
        ("conv",),
    ),
)
