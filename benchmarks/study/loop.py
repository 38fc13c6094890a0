"""The loop that all contenders share: batch, forward, backward, exchange, update, and now and then a look.

Examples are counted over all ranks. A look keeps the weights with the time and the examples that it took to get them;
what they are worth is found out after the run, so that judging takes no time from anybody. The clock of those that step
together stands still while they look; where they do not, the others train on.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.study.contender import Contender
from benchmarks.study.stopwatch import DATA, EXCHANGE, PASSES, TROUBLE, UPDATE, Stopwatch
from hvdvae.data import Loader
from hvdvae.disturbance import Disturbance
from hvdvae.seeding import seed_everything

WARM_UP_PASSES = 5
"""Forward and backward before the clock starts; no update is made of them."""


@dataclass
class Track:
    """What the model was, over time."""

    examples: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    weights: list[NDArray[np.float32]] = field(default_factory=list)
    """Floating point values of the state dict, one after the other."""


@dataclass(frozen=True)
class Budget:
    """When a run ends."""

    examples: float
    seconds: float
    look_every: float
    """Examples."""


def train(
    contender: Contender,
    model: nn.Module,
    objective: Callable[[nn.Module, Tensor, float], Any],
    loader: Loader,
    disturbance: Disturbance,
    budget: Budget,
    seed: int,
) -> tuple[Track, Stopwatch, dict[str, Any]]:
    """Train. Blocks; every rank that trains must call it.

    `model`: the contender's without what it was wrapped in. Returns the first rank's track, this rank's times, and what
    the contender counted.
    """
    device = next(model.parameters()).device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches = _endless(loader)
    batch = next(batches)
    model.train()
    seed_everything(device, seed, contender.rank, 2**31)

    def work() -> None:
        # By autograd.grad: hooks that exchange gradients hear nothing of it.
        torch.autograd.grad(objective(model, batch, 0.0)["loss"], parameters)

    for _ in range(WARM_UP_PASSES):
        work()
    batches = _endless(loader)
    track, watch = Track(), Stopwatch()
    contender.prepare()
    start, looks = time.perf_counter(), 0
    for step in itertools.count():
        examples = contender.steps_done() * loader.batch
        if examples >= looks * budget.look_every or examples >= budget.examples:
            looks = int(examples // budget.look_every) + 1
            seconds = time.perf_counter() - start
            over = contender.any(seconds > budget.seconds) or examples >= budget.examples
            begin = time.perf_counter()
            with contender.look():
                if contender.rank == 0:
                    track.weights.append(state_of(model))
                    track.examples.append(examples)
                    track.seconds.append(seconds)
            if over:
                break
            if contender.steps_together:
                # They have just met, and all wait: a slow link may need longer for the weights than for a step.
                start += time.perf_counter() - begin
        with watch.on(DATA):
            batch = next(batches)
        with watch.on(TROUBLE):
            disturbance.before_step(step, work)
        with watch.on(PASSES):
            seed_everything(device, seed, contender.rank, step)
            contender.zero_grad()
            objective(contender.model, batch, examples / loader.examples)["loss"].backward()
        with watch.on(EXCHANGE):
            contender.exchange()
        with watch.on(UPDATE):
            contender.update()
        disturbance.worked(watch.work_seconds)
        watch.next_step()
    return track, watch, contender.end()


def state_of(model: nn.Module) -> NDArray[np.float32]:
    """All floating point values of a model, a copy. Local."""
    return torch.cat([value.detach().flatten() for value in _values(model)]).cpu().numpy().copy()


def load_state(model: nn.Module, state: NDArray[np.float32]) -> None:
    """Put them back. Mutates the model."""
    values = _values(model)
    parts = torch.split(torch.from_numpy(state), [value.numel() for value in values])
    for value, part in zip(values, parts, strict=True):
        value.copy_(part.view(value.shape))


def _values(model: nn.Module) -> list[Tensor]:
    return [value for value in model.state_dict().values() if value.is_floating_point()]


def _endless(loader: Loader) -> Iterator[Tensor]:
    for epoch in itertools.count():
        yield from loader.epoch(epoch)
