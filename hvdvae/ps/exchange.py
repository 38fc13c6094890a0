"""How a worker's step becomes pushes and pulls: at every step, ahead of the next step, or once a period.

Shapes: P parameters, F elements of float buffers. `client.outgoing` (P + F) is what is pushed, `client.incoming` (P)
what was pulled.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from hvdvae.deadline import Watchdog
from hvdvae.errors import ConfigError
from hvdvae.flat import FlatModel
from hvdvae.ps.client import Client
from hvdvae.ps.plan import Plan
from hvdvae.ps.protocol import Answer
from hvdvae.ps.report import Report


class Exchange:
    """One way. `inner` is the flat optimizer: its groups hold the options that the servers shall use."""

    shares_vectors = False
    """Whether the model's gradient and parameters are to lie in the client's vectors, and need no copy."""
    steps_itself = False
    """Whether the worker has weights and an optimizer's state of its own, not only the servers'."""

    def __init__(self, client: Client, flat: FlatModel, inner: Optimizer, plan: Plan, watchdog: Watchdog) -> None:
        """Take the parts."""
        self.client, self.flat, self.inner, self.plan = client, flat, inner, plan
        self.report = Report()
        self.longest_wait = 0.0
        """Seconds that this worker waited for servers at most, as when a backup had to take over."""
        self.signal = 0
        """That the servers told with the last answer to a push that this worker took."""
        self._watchdog = watchdog
        self._options: list[dict[str, Any]] | None = None

    @abstractmethod
    def step(self, *, finite: bool) -> None:
        """Do with the gradient vector what this way does. Blocks until the policy lets this worker go on."""

    def settle(self) -> None:
        """Return once nothing is under way. Blocks."""

    def flush(self) -> None:
        """Push what a run's end leaves of a period. Blocks until the policy lets this worker go on."""

    def take(self) -> None:
        """Let the model have the weights that were pulled last."""
        if self.flat.parameters.data_ptr() != self.client.incoming.data_ptr():
            self.flat.parameters.copy_(self.client.incoming)
        self.flat.publish()

    def close(self) -> None:
        """Give back what this way needed."""

    @property
    def _gradient(self) -> Tensor:
        """The part of `outgoing` before the buffers, (P,)."""
        return self.client.outgoing[: self.flat.gradient.numel()]

    def _push(self, *, finite: bool, pull: bool, versions: NDArray[np.float64]) -> None:
        self._prepared(finite=finite, pull=pull, versions=versions)()

    def _prepared(self, *, finite: bool, pull: bool, versions: NDArray[np.float64]) -> Callable[[], None]:
        """A push of all that is so now; what is called may run beside the next step."""
        buffers = self.flat.buffers
        if buffers.numel():
            self.client.outgoing[-buffers.numel() :] = buffers
        return partial(
            self.client.push,
            [float(group["lr"]) for group in self.inner.param_groups],
            self.report.taken(),
            options=self._changed_options(),
            versions=versions,
            finite=finite,
            pull=pull,
        )

    def _changed_options(self) -> list[dict[str, Any]] | None:
        options = plain_options(self.inner)
        for group in options:
            group.pop("lr")  # Every push has it.
        if options == self._options:
            return None
        self._options = options
        return options

    @contextmanager
    def _blocked(self) -> Iterator[None]:
        start = time.perf_counter()
        # Patient: where workers wait for each other, one of them may be evaluating or saving.
        with self._watchdog.waiting("answer of the parameter servers", patient=True):
            yield
        self.signal = int(self.client.answer[Answer.SIGNAL])
        seconds = time.perf_counter() - start
        self.report.add_blocked(seconds)
        self.longest_wait = max(self.longest_wait, seconds)


class EveryStep(Exchange):
    """Push the gradient, wait for the weights."""

    shares_vectors = True

    def step(self, *, finite: bool) -> None:
        """Blocks for a round trip."""
        with self._blocked():
            self._push(finite=finite, pull=True, versions=self.client.versions)


class Ahead(Exchange):
    """Take the weights that the last push brought, and push this gradient while the next one is computed.

    So every gradient is of weights one pull older than with EveryStep, and its push says so.
    """

    def __init__(self, client: Client, flat: FlatModel, inner: Optimizer, plan: Plan, watchdog: Watchdog) -> None:
        """Start the thread that pushes."""
        super().__init__(client, flat, inner, plan, watchdog)
        self._thread = ThreadPoolExecutor(1, "hvdvae-ps")
        self._under_way: Future[None] | None = None
        self._computing = client.versions

    def step(self, *, finite: bool) -> None:
        """Blocks while the last push is under way."""
        computed_with = self._computing
        self.settle()
        self._gradient.copy_(self.flat.gradient)
        self._under_way = self._thread.submit(self._prepared(finite=finite, pull=True, versions=computed_with))

    def settle(self) -> None:
        """Wait for the push that is under way, and compute with the weights that it brought."""
        if self._under_way is None:
            return
        with self._blocked():
            self._under_way.result()
        self._under_way = None
        self.take()

    def take(self) -> None:
        """Compute with the weights that were pulled last; the next push says so."""
        super().take()
        self._computing = self.client.versions

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


class Periodic(Exchange):
    """The worker's own optimizer steps; every `push_every` steps the sum of gradients goes to the servers.

    Every `pull_every` steps the servers' weights replace its own (Dean et al. 2012, Downpour SGD).
    """

    steps_itself = True
    _steps = 0
    _has_some = False
    """Whether a step of this period was finite."""

    def step(self, *, finite: bool) -> None:
        """Blocks where a period ends."""
        if finite:
            self.inner.step()
            self._gradient.add_(self.flat.gradient)
            self._has_some = True
        self._steps += 1
        if self._steps % self.plan.push_every == 0:
            self._end_period(pull=self._steps % self.plan.pull_every == 0)

    def flush(self) -> None:
        """A period that a run's end cuts short is pushed as it is; the next run begins with a new one."""
        if self._steps % self.plan.push_every:
            self._end_period(pull=True)
        self._steps = 0

    def _end_period(self, *, pull: bool) -> None:
        with self._blocked():
            self._push(finite=self._has_some, pull=pull, versions=self.client.versions)
        if pull:
            self.take()
        self._gradient.zero_()
        self._has_some = False


class Elastic(Exchange):
    """The worker's own optimizer steps; every `push_every` steps it and the center pull at each other.

    The worker pushes its weights, and the answer is the elastic force (Zhang et al. 2015, EASGD).
    """

    steps_itself = True
    _steps = 0

    def step(self, *, finite: bool) -> None:
        """Blocks where a period ends."""
        if finite:
            self.inner.step()
        self._steps += 1
        if self._steps % self.plan.push_every == 0:
            self._pull_at_each_other()

    def flush(self) -> None:
        """A period that a run's end cuts short ends there."""
        if self._steps % self.plan.push_every:
            self._pull_at_each_other()
        self._steps = 0

    def _pull_at_each_other(self) -> None:
        self._gradient.copy_(self.flat.parameters)
        with self._blocked():
            self._push(finite=True, pull=True, versions=self.client.versions)
        self.flat.parameters.sub_(self.client.incoming)


def exchange_of(plan: Plan) -> type[Exchange]:
    """The way that a plan asks for."""
    if plan.rule == "easgd":
        return Elastic
    if plan.pull_every > 1:
        return Periodic
    return Ahead if plan.prefetch else EveryStep


def plain_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options that the optimizer knows, of each parameter group, JSON-able.

    Raises ConfigError naming one that cannot be sent.
    """
    return [
        {key: _plain(group[key], key) for key in optimizer.defaults if key in group} for group in optimizer.param_groups
    ]


def _plain(value: Any, key: str) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(one, key) for one in value]
    if isinstance(value, Tensor | np.generic) and np.ndim(value) == 0:
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"option {key!r} of the optimizer is a {type(value).__name__}, expected a number, a text or numbers: parameter "
        "servers are sent it"
    )
