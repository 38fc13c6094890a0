"""`--strategy ps`: weights live on parameter servers; a step pushes this worker's gradient and pulls weights.

    worker                                      server
    backward -> gradient ------- push --------> policy: now, or when others have come?
                                                rule: how does it change the weights?
    next forward <- parameters <----- pull ---- answer

Options of the policy and the rule: ps/plan.py. Workers and servers of one host share memory: a gradient is pushed from
where it was gathered, and the server writes the weights right into the model.
"""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.errors import ConfigError
from hvdvae.ps.channel import Channel
from hvdvae.ps.client import Client
from hvdvae.ps.plan import Plan, check_hello
from hvdvae.ps.protocol import REQUEST, Answer, Request
from hvdvae.ps.server import Server
from hvdvae.ps.shards import cut, pieces
from hvdvae.ps.state import packed, unpacked
from hvdvae.signals import caught
from hvdvae.strategies.flat_optimizer import is_elementwise
from hvdvae.strategies.strategy import Strategy
from hvdvae.version import __version__
from hvdvae.world import World


class ParameterServer(Strategy):
    """A worker's optimizer: its `step` is a push and a pull."""

    name = "ps"
    engine = "mpi"
    engine_reason = "parameter servers are mpi4py's"
    synchronous = False

    def __init__(self, optimizer: Optimizer, model: nn.Module, world: World, *, plan: Plan, **options: Any) -> None:
        """Meet the servers. Blocks; every rank, servers too, must build it (`serve`).

        Raises ConfigError for optimizers that are not elementwise, WorldError where ranks differ.
        """
        if not is_elementwise(optimizer):
            raise ConfigError(
                f"--strategy ps steps on slices of the parameter vector, and {type(optimizer).__name__} is not "
                "elementwise: use SGD, Adam, AdamW, RMSprop or Adagrad"
            )
        self.plan = plan
        # Under BSP the servers clip the mean; otherwise every push is a step, and clipped here.
        clipped_there = options.pop("clip_norm", None) if plan.consistency == "bsp" else None
        super().__init__(optimizer, model, world, **options)
        flat = self.flat
        hello = {
            **_greeting(self.plan),
            "parameters": flat.parameters.numel(),
            "buffers": flat.buffers.numel(),
            "dtype": str(flat.parameters.dtype).removeprefix("torch."),
            "groups": [[part.start, part.stop] for part in flat.group_slices],
            "optimizer": type(optimizer).__name__,
            "layout": flat.digest(),
            "clip_norm": clipped_there,
        }
        channel, shards, groups, _ = _meet(world, hello)
        self.client = Client(channel, shards, groups, flat.buffers.numel())
        self._channel = channel
        # Where the worker steps by itself, gradients are summed up in what is pushed.
        self._steps_itself = plan.rule == "easgd" or plan.pull_every > 1
        if not self._steps_itself and not plan.prefetch:
            flat.move_gradient(self.client.outgoing[: flat.gradient.numel()])
            flat.move_parameters(self.client.incoming)
            self.follow_gradient()
            self.follow_parameters()
        self._steps = 0
        self._worker = world.rank
        self._started = self._ended = False
        self._computing = self.client.versions
        self._options: list[dict[str, Any]] | None = None
        self._report = np.zeros(REQUEST)
        self._rows: Tensor | None = None
        self._thread = ThreadPoolExecutor(1, "hvdvae-ps") if plan.prefetch else None
        self._under_way: Future[None] | None = None
        self.ledgers: list[dict[str, Any]] = []
        """What each server counted, known once a run has ended."""
        world.on_close(self._close)

    def report(
        self, *, examples: int, loss: float, rate: float, distortion: float, data_seconds: float, seconds: float
    ) -> None:
        """Tell the servers, with the next push, what a step was like: means over its examples, nats. Local."""
        report = self._report
        finite = np.isfinite([loss, rate, distortion]).all()
        report[Request.STEPS] += 1
        report[Request.EXAMPLES] += examples
        report[Request.DATA_SECONDS] += data_seconds
        report[Request.SECONDS] += seconds
        if finite:
            report[Request.FINITE] += examples
            report[Request.LOSS : Request.DISTORTION + 1] += np.multiply(examples, [loss, rate, distortion])

    @property
    def signal(self) -> int:
        """Number of the signal that some worker got, as far as the servers have told; 0: none."""
        return int(self.client.answer[Answer.SIGNAL])

    @signal.setter
    def signal(self, number: int) -> None:
        self._report[Request.SIGNAL] = number

    def exchange(self, gradient: Tensor) -> None:
        """Gradients stay each worker's own until they are pushed."""

    def update(self) -> None:
        """Push, and pull. Blocks until the policy lets this worker go on."""
        self._take_step(finite=True)

    def skip(self) -> None:
        """Count a step of which nothing is pushed."""
        self._take_step(finite=False)

    def _take_step(self, *, finite: bool) -> None:
        self._start()
        self._ended = False
        if not self._steps_itself:
            self.inner.state.clear()  # The servers have it; here it may be from a checkpoint that was written.
        self._steps += 1
        if self._steps_itself:
            self._step_by_itself(finite=finite)
        elif self.plan.prefetch:
            self._exchange_ahead(finite=finite)
        else:
            self._exchange_now(finite=finite, pull=True)

    def _exchange_now(self, *, finite: bool, pull: bool) -> None:
        with self._blocked():
            self._push(finite=finite, pull=pull)
        self._computing = self.client.versions

    def _exchange_ahead(self, *, finite: bool) -> None:
        """Take the weights that the last push brought, and push this gradient while the next one is computed."""
        computed_with = self._computing
        self._await_weights()
        self.client.outgoing[: self.flat.gradient.numel()].copy_(self.flat.gradient)
        assert self._thread is not None
        self._under_way = self._thread.submit(self._push, finite=finite, pull=True, versions=computed_with)

    def _await_weights(self) -> None:
        if self._under_way is None:
            return
        with self._blocked():
            self._under_way.result()
        self._under_way = None
        self.flat.parameters.copy_(self.client.incoming)
        self._computing = self.client.versions

    @contextmanager
    def _blocked(self) -> Iterator[None]:
        start = time.perf_counter()
        with self.world.watchdog.waiting("answer of the parameter servers"):
            yield
        self._report[Request.BLOCKED_SECONDS] += time.perf_counter() - start

    def _step_by_itself(self, *, finite: bool) -> None:
        plan, pushed = self.plan, self.client.outgoing[: self.flat.gradient.numel()]
        if finite:
            self.inner.step()
            if plan.rule != "easgd":
                pushed.add_(self.flat.gradient)
        if self._steps % plan.push_every:
            return
        pull = self._steps % plan.pull_every == 0
        if plan.rule == "easgd":
            pushed.copy_(self.flat.parameters)
        self._exchange_now(finite=True, pull=pull)
        if plan.rule == "easgd":
            self.flat.parameters.sub_(self.client.incoming)
        elif pull:
            self.flat.parameters.copy_(self.client.incoming)
        pushed.zero_()

    def _push(self, *, finite: bool, pull: bool, versions: Any = None) -> None:
        buffers = self.flat.buffers
        if buffers.numel():
            self.client.outgoing[-buffers.numel() :] = buffers
        options = self._changed_options()
        report, self._report = self._report, np.zeros(REQUEST)
        self._report[Request.SIGNAL] = report[Request.SIGNAL]
        self.client.push(
            [float(group["lr"]) for group in self.param_groups],
            report,
            options=options,
            versions=self._computing if versions is None else versions,
            finite=finite,
            pull=pull,
        )

    def _changed_options(self) -> list[dict[str, Any]] | None:
        options = [_plain_options(group) for group in self.inner.param_groups]
        for group in options:
            group.pop("lr")  # Every push has it.
        if options == self._options:
            return None
        self._options = options
        return options

    def _start(self) -> None:
        """Before the first step: the servers get worker 0's weights and optimizer, which may come from a checkpoint."""
        if self._started:
            return
        self._started = True
        manifest, vectors = packed(self.inner)
        if self.world.is_first:
            options = [_plain_options(group) for group in self.inner.param_groups]
            with self.world.watchdog.waiting("start of the parameter servers"):
                self.client.initialize(self.flat.parameters, options, manifest, vectors)
        self.world.barrier("start of the parameter servers", patient=True)

    def fetch(self, *, state: bool = False) -> None:
        """Replace the model's weights by the servers' of this moment, all after the same pushes; others train on.

        With `state` also the optimizer's, for `state_dict`. Blocks; one worker's affair.
        """
        self._start()
        self._await_weights()
        with self.world.watchdog.waiting("copy of the parameter servers' weights"):
            found = self.client.copy(state=state)
        self._rows = found.buffers
        if self.flat.parameters.data_ptr() != self.client.incoming.data_ptr():
            self.flat.parameters.copy_(self.client.incoming)
        self._computing = self.client.versions
        if state:
            self._take_state(found.states)

    def _take_state(self, states: list[Any]) -> None:
        """Put the servers' pieces together."""
        shards, groups = cut(self.flat.group_slices, len(states)), self.flat.group_slices
        manifest = states[0][0]
        whole = [torch.empty(g.stop - g.start) for g, e in zip(groups, manifest, strict=True) for _ in e["vectors"]]
        whole = [vector.to(self.flat.parameters.dtype) for vector in whole]
        for shard, (_, vectors) in zip(shards, states, strict=True):
            left, filled = iter(vectors), iter(whole)
            for group, entry, piece in zip(groups, manifest, pieces(groups, shard), strict=True):
                start = shard.start + piece.start - group.start
                for _ in entry["vectors"]:
                    part = next(left)
                    next(filled)[start : start + part.numel()] = part
        unpacked(self.inner, manifest, whole)

    @contextmanager
    def averaged_buffers(self) -> Iterator[None]:
        """Inside, float buffers are the mean over workers, as the servers had them at the last `fetch`."""
        own = self.flat.buffers.clone()
        if self._rows is not None:
            self.flat.buffers.copy_(self._rows.mean(0))
        try:
            yield
        finally:
            self.flat.buffers.copy_(own)

    def gathered_buffers(self) -> Tensor:
        """Float buffers of all workers (size, F), as of the last `fetch`."""
        assert self._rows is not None
        return self._rows

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every strategy's; before the first step, which gives it to the servers. Raises ConfigError after it."""
        if self._started:
            raise ConfigError("load_state_dict after the first step: the servers hold the state now; load it before")
        super().load_state_dict(state_dict)

    @property
    def share(self) -> tuple[int, int]:
        """This worker's place among those that live, as far as the servers have told."""
        living = self.client.living
        return living.index(self._worker), len(living)

    def results(self) -> dict[str, Any]:
        """What the servers counted: updates, staleness and pushes of the first (all hear of the same), bytes of all."""
        if not self.ledgers:
            return {}
        total = {key: sum(ledger[key] for ledger in self.ledgers) for key in ("bytes_pushed", "bytes_pulled")}
        chosen = {key: value for key, value in asdict(self.plan).items() if value is not None}
        return {"servers": len(self.ledgers), **chosen, **self.ledgers[0], **total}

    def finish(self) -> None:
        """Tell the servers that this worker's run is over; return when all are, with the final weights."""
        if self._ended or not self._started:
            return
        self._await_weights()
        with self.world.watchdog.waiting("end of the other workers' runs", patient=True):
            self.ledgers = self.client.done(self._report)
        self._report = np.zeros(REQUEST)
        if self.flat.parameters.data_ptr() != self.client.incoming.data_ptr():
            self.flat.parameters.copy_(self.client.incoming)
        self._computing = self.client.versions
        self._ended = True
        if len(self.ledgers[0]["died"]) > self.world.everyone.size - self.world.servers - self.world.size:
            self.world.shrink()

    def _close(self) -> None:
        self.finish()
        self.world.barrier("end of the parameter servers", patient=True)
        if self.world.is_first:
            self.client.quit()
        if self._thread is not None:
            self._thread.shutdown()
        self._channel.close()


def serve(world: World, plan: Plan) -> list[dict[str, Any]]:
    """Be a server until the workers have ended. Blocks; every server must call it, while workers build the strategy.

    Returns the server's ledger. Raises WorldError where ranks differ.
    """
    torch.set_num_threads(1)
    channel, shards, groups, hello = _meet(world, _greeting(plan))
    number = world.rank
    server = Server(
        channel,
        plan,
        groups=groups,
        shard=shards[number],
        is_last=number == world.size - 1,
        buffers=hello["buffers"],
        optimizer=hello["optimizer"],
        clip_norm=hello["clip_norm"],
        watchdog=world.watchdog,
        sum_over_servers=lambda value: world.sum_(value, "norm of the gradient"),
    )
    with caught():  # Signals end the workers' runs, and those end this one.
        server.run()
    channel.close()
    return [server.ledger.summary()]


def serve_and_exit(world: World, plan: Plan) -> None:
    """Serve, then end this process: what a server's rank does in a program that was written for workers."""
    serve(world, plan)
    world.close()
    sys.exit(0)


def _greeting(plan: Plan) -> dict[str, Any]:
    return {"version": __version__, "plan": asdict(plan)}


def _meet(world: World, hello: dict[str, Any]) -> tuple[Channel, list[slice], list[slice], dict[str, Any]]:
    """Compare what all ranks say of themselves and open the channel. Blocks; workers and servers must call it."""
    hellos = world.gather_from_everyone(hello, "meeting of workers and parameter servers")
    workers = world.everyone.size - world.servers
    check_hello(hellos, workers)
    first = hellos[0]
    groups = [slice(start, stop) for start, stop in first["groups"]]
    with world.watchdog.waiting("memory shared by workers and parameter servers"):
        lengths = (first["parameters"], first["buffers"])
        channel = Channel(world.everyone, workers, lengths, getattr(torch, first["dtype"]))
    return channel, cut(groups, world.servers), groups, first


def _plain_options(group: dict[str, Any]) -> dict[str, Any]:
    return {
        key: float(value) if isinstance(value, Tensor) else value for key, value in group.items() if key != "params"
    }
