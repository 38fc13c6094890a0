"""`--strategy ps`: weights live on parameter servers; a step pushes this worker's gradient and pulls weights.

    worker                                      server
    backward -> gradient ------- push --------> policy: now, or when others have come?
                                                rule: how does it change the weights?
    next forward <- parameters <----- pull ---- answer

Options of the policy and the rule: ps/plan.py. When a worker pushes and pulls: ps/exchange.py. What a server does:
ps/server.py. Workers and servers of one host share memory: a gradient is pushed from where it was gathered, and the
server writes the weights right into the model.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.compression.fp16 import LARGEST
from hvdvae.errors import ConfigError, RankLost
from hvdvae.ps.client import Client
from hvdvae.ps.edits import Untouched, edit_of
from hvdvae.ps.exchange import exchange_of, plain_options
from hvdvae.ps.hello import Hello, worker_hello
from hvdvae.ps.meeting import meet, meet_running, partners
from hvdvae.ps.plan import Plan
from hvdvae.ps.protocol import Answer
from hvdvae.ps.report import Report
from hvdvae.ps.state import joined, packed, unpacked
from hvdvae.strategies.flat_optimizer import check_elementwise
from hvdvae.strategies.optimizer_state import Entries, Groups
from hvdvae.strategies.strategy import Strategy
from hvdvae.world import World


class ParameterServer(Strategy):
    """A worker's optimizer: its `step` is a push and a pull."""

    name = "ps"
    engine = "mpi"
    engine_reason = "parameter servers are mpi4py's"
    synchronous = False
    averages_gradients = False

    def __init__(self, optimizer: Optimizer, model: nn.Module, world: World, *, plan: Plan, **options: Any) -> None:
        """Meet the servers. Blocks; every rank, servers too, must build it (`serve`).

        Raises ConfigError for optimizers that are not elementwise, WorldError where ranks differ.
        """
        check_elementwise(optimizer, "--strategy ps steps on slices of the parameter vector")
        world.check_serves_nobody()
        self.plan = plan
        # Under BSP the servers clip the mean; otherwise every push is a step, and clipped here.
        # One worker's push is the mean already: it clips it itself, as local training does, to the same bits.
        alone = world.size == 1 and not world.joins
        clipped_there = options.pop("clip_norm", None) if plan.consistency == "bsp" and not alone else None
        if clipped_there and plan.replicas and plan.shards(world.servers) > 1:
            raise ConfigError(
                "--clip-norm with --consistency bsp, --replicas 1 and several servers: the norm is a sum over servers, "
                "and one may die in it; use --servers 1"
            )
        super().__init__(optimizer, model, world, **options)
        flat = self.flat
        if plan.compression != "none" and flat.parameters.dtype != torch.float32:
            raise ConfigError(
                f"--compression {plan.compression} works on float32 vectors, found {flat.parameters.dtype}: drop it"
            )
        hello = worker_hello(
            plan,
            flat,
            self.inner,
            passes=self.backward_passes_per_step,
            clip_norm=clipped_there,
            own_clip_norm=self.clip_norm,
        )
        self._channel, shards, groups, _ = (meet_running if world.joins else meet)(world, hello, plan)
        holders = partners(self._channel.workers, len(shards), plan)
        self.client = Client(self._channel, shards, groups, flat.buffers.numel(), holders, plan, flat.layout.runs)
        kind = exchange_of(plan)
        if kind.shares_vectors:
            flat.move_gradient(self.client.outgoing[: flat.gradient.numel()])
            flat.move_parameters(self.client.incoming)
            self.follow_gradient()
            self.follow_parameters()
        self._exchange = kind(self.client, flat, self.inner, plan, world.watchdog)
        self._worker = world.rank
        self._started = self._ended = False
        self._has_copy = False
        """Of the servers' state, for the time of `fetched`."""
        self._skipped_with_others = 0
        self._untouched = Untouched()
        self.ledgers: list[dict[str, Any]] = []
        """What each server counted, known once a run has ended."""
        if world.joins:
            self._join(hello)
        world.begin_to_be_served()
        world.on_close(self._close)

    def _join(self, hello: Hello) -> None:
        """Take a dead worker's place in a run that has started; where it cannot, the process ends."""
        self._started = True
        with self.world.watchdog.waiting("admission by the parameter server"):
            found, rows = self.client.join(hello)
        if "refused" in found:
            sys.stderr.write(f"hvdvae: the new worker {self._worker} has no place: {found['refused']}\n")
            sys.exit(0)
        self._exchange.take()
        self.flat.buffers.copy_(rows[self.client.living].mean(0))
        self.joined_at = found["epochs"]
        self.report.at(found["epochs"])

    def tell_progress(self, epochs: float) -> None:
        """As every strategy's: with the next push, for whoever joins."""
        self.report.at(epochs)

    @property
    def report(self) -> Report:
        """What the next push tells the servers of this worker's steps."""
        return self._exchange.report

    @property
    def signal(self) -> int:
        """Number of the signal that some worker or server got, as far as the servers have told; 0: none."""
        return self._exchange.signal

    def signal_to_leave(self, own: int) -> int:
        """As every strategy's: others hear of it with the next push. Under BSP all leave after the same step."""
        if own:
            self.report.signal(own)
        return self.signal if self.plan.consistency == "bsp" else max(own, self.signal)

    def signal_of_all(self, known: int, own: int) -> int:
        """As every strategy's, after `finish`: some may have got it in their last step."""
        mine = torch.tensor([known or own])
        return int(mine if self.world.joins else self.world.max_(mine, "agreement on a signal"))

    @property
    def share(self) -> tuple[int, int]:
        """This worker's place among those that live, as far as the servers have told."""
        living = self.client.living
        return living.index(self._worker), len(living)

    def exchange(self, gradient: Tensor) -> None:
        """Gradients stay each worker's own until they are pushed. Raises ConfigError where something was frozen."""
        if self.flat.frozen:
            raise ConfigError(
                f"parameter {self.flat.names[self.flat.frozen[0]]!r} was frozen (requires_grad) after the optimizer "
                "was wrapped, and parameter servers would go on moving it: freeze it before DistributedOptimizer, or "
                "use another --strategy"
            )

    def update(self) -> None:
        """Push, and pull. Blocks until the policy lets this worker go on."""
        if self.plan.compression == "fp16" and float(self.flat.gradient.abs().max()) > LARGEST:
            # The server would be told of infinity, and keep it in its weights.
            self.skipped_steps += 1
            self.skip()
            return
        self._take_step(finite=True)

    def skip(self) -> None:
        """Count a step of which nothing is pushed; weights may come all the same."""
        self._take_step(finite=False)
        self.flat.count_change()

    def _take_step(self, *, finite: bool) -> None:
        self.start()
        self._check_untouched()
        self._ended = False
        self._exchange.step(finite=finite)
        self._untouched.note(self.flat.parameters)
        self._count_skipped()

    def _check_untouched(self) -> None:
        if self.plan.rule != "easgd":  # There workers push their own weights, whoever changed them.
            self._untouched.check(self.flat.parameters, self.flat.places())

    @contextmanager
    def editing(self) -> Iterator[None]:
        """As every strategy's: the next push takes along what is new. Blocks while one is under way (--prefetch).

        Where workers do not step together the servers take each worker's edit as it comes. Raises ConfigError with
        --compression.
        """
        if self.plan.compression != "none":
            raise ConfigError(
                f"editing() with --compression {self.plan.compression}: servers send what has changed since they sent "
                "last, and would not know what the worker has; drop one of them"
            )
        if not self._started or self.plan.rule == "easgd":
            yield
            return
        self._check_untouched()
        self._exchange.settle()
        before = self.flat.parameters.clone()
        yield
        self.flat.take_back()
        edit = edit_of(before, self.flat.parameters)
        if edit is not None:
            self.client.edited(edit)
            self._untouched.note(self.flat.parameters)

    def _count_skipped(self) -> None:
        """Of steps that all skip because one must; with --prefetch a step later."""
        # Read once: a push ahead may count meanwhile.
        found = self.client.skipped_with_others
        self.skipped_steps += found - self._skipped_with_others
        self._skipped_with_others = found

    def start(self) -> None:
        """The servers get worker 0's weights and optimizer, which may come from a checkpoint; once.

        Blocks; every worker must call it. The first step does.
        """
        if self._started:
            return
        self._started = True
        if self.world.is_first:
            manifest, vectors = packed(self.inner)
            with self.world.watchdog.waiting("start of the parameter servers"):
                self.client.initialize(
                    self.flat.parameters, self.flat.buffers, plain_options(self.inner), manifest, vectors
                )
        if not self._exchange.steps_itself:
            self.inner.state.clear()  # The servers have it.
        self.world.barrier("start of the parameter servers", patient=True)

    @contextmanager
    def fetched(self, *, state: bool = False) -> Iterator[Tensor]:
        """Inside, the model holds the servers' weights of one moment, all after the same pushes; others train on.

        Yields float buffers of all workers (size, F). With `state`, `state_dict` is the servers', or this worker's own
        under EASGD, where servers have none. Blocks; one worker's affair, after `start`.
        """
        self.start()
        self.flat.take_back()
        if not self._ended:
            self._check_untouched()
        self._exchange.settle()
        self.flat.take_back()
        # Without short messages' rounding the weights here would be others than those of workers that do not look.
        keeps = self._exchange.steps_itself or self.plan.compression != "none"
        own_weights = self.flat.parameters.clone() if keeps else None
        own_state, own_buffers = dict(self.inner.state), self.flat.buffers.clone()
        with self.world.watchdog.waiting("copy of the parameter servers' weights"):
            found = self.client.copy(state=state, goes_on=not keeps)
        try:
            self._exchange.take()
            self.flat.buffers.copy_(found.buffers[self.client.living].mean(0))
            if state and self.plan.rule != "easgd":
                unpacked(self.inner, *joined(self.flat.group_slices, found.states))
                self._has_copy = True
            yield found.buffers
        finally:
            self._has_copy = False
            self.flat.buffers.copy_(own_buffers)
            self.inner.state.clear()
            self.inner.state.update(own_state)
            if own_weights is not None:
                self.flat.parameters.copy_(own_weights)
            self.flat.publish()
            self._untouched.note(self.flat.parameters)

    def state_is_elsewhere(self) -> str:
        """As every strategy's."""
        if not self._started or self._exchange.steps_itself or self._has_copy:
            return ""
        return "the optimizer's state is on the servers of --strategy ps"

    def check_loadable(self) -> None:
        """As every strategy's: the first step gives what was loaded to the servers."""
        if self._started:
            raise ConfigError(
                "restore() or load_state_dict() after the first step: the servers of --strategy ps hold weights and "
                "state now; load before it, or start anew"
            )

    def load_entries(self, groups: Groups, entries: Entries) -> None:
        """As every strategy's; before the first step. Raises ConfigError after it."""
        self.check_loadable()
        super().load_entries(groups, entries)

    def results(self) -> dict[str, Any]:
        """What the servers counted: updates, staleness and pushes of the first, as all hear of the same; bytes of all.

        And this worker's longest wait for them, and how often it went over to a backup.
        """
        if not self.ledgers:
            return {}
        total = {key: sum(ledger[key] for ledger in self.ledgers) for key in ("bytes_pushed", "bytes_pulled")}
        pushes = self.ledgers[0]["pushes"] + self.ledgers[0]["dropped_pushes"]
        total |= {f"{key}_per_push": count / max(pushes, 1) for key, count in total.items()}
        chosen = {key: value for key, value in asdict(self.plan).items() if value is not None}
        mine: dict[str, Any] = {"longest_wait_seconds": self._exchange.longest_wait, "takeovers": self.client.takeovers}
        if self.plan.compression != "none":
            mine["compression_error"] = self.client.compression_error
        return {"servers": len(self.ledgers), **chosen, **self.ledgers[0], **total, **mine}

    def traffic(self) -> dict[str, float]:
        """Bytes that all workers have pushed and pulled, all shards together, in all and a push. Local.

        And the mean size of what pushes left out, as a part of this worker's gradients.
        """
        answer = self.client.answer
        pushes = max(float(answer[Answer.PUSHES] + answer[Answer.DROPPED]), 1.0)
        ways = {"pushed": Answer.BYTES_PUSHED, "pulled": Answer.BYTES_PULLED}
        found = {f"bytes_{way}": float(answer[field]) for way, field in ways.items()}
        found |= {f"bytes_{way}_per_push": float(answer[field]) / pushes for way, field in ways.items()}
        return found | ({"compression_error": self.client.compression_error} if self.plan.compression != "none" else {})

    def finish(self) -> None:
        """Tell the servers that this worker's run is over; return when all are, with the final weights."""
        if self._ended or not self._started:
            return
        self._check_untouched()
        self._exchange.settle()
        self._exchange.flush()
        self._count_skipped()
        with self.world.watchdog.waiting("end of the other workers' runs", patient=True):
            self.ledgers = self.client.done(self.report.taken())
        self._exchange.take()
        self._untouched.note(self.flat.parameters)
        self._ended = True
        world = self.world
        left = world.everyone.size - world.servers - len(set(self.ledgers[0]["died"]))
        if not world.joins and left < world.size:
            world.shrink()  # To those that were there from the start.

    @property
    def is_finished(self) -> bool:  # type: ignore[override]
        """As every strategy's."""
        return self._ended

    def lose(self, ranks: Sequence[int]) -> None:
        """As every strategy's."""
        died = self.ledgers[0]["died"]
        left = [worker for worker in range(self._channel.workers) if worker not in died]
        died += [left[rank] for rank in ranks]

    def _close(self) -> None:
        self._untouched = Untouched()  # Whatever was done to the weights since: nobody will see them.
        self.finish()
        self.world.barrier("end of the parameter servers", patient=True)
        if self.world.is_first:
            # Who has died since has done its work: the workers have the final weights.
            with self.world.watchdog.waiting("end of the parameter servers"), suppress(RankLost):
                self.client.quit()
        self._exchange.close()
        self._channel.close()
