"""A server: hears workers, does what the policy says with their pushes, and answers."""

import sys
import time
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdvae.deadline import Watchdog
from hvdvae.errors import RankLost
from hvdvae.ps.attendance import Attendance
from hvdvae.ps.channel import PeersDied
from hvdvae.ps.consistency import Action, Apply, Drop, policy
from hvdvae.ps.consistency import Answer as AnswerIt
from hvdvae.ps.cut import Asked, Cut
from hvdvae.ps.hello import Hello
from hvdvae.ps.ledger import Ledger
from hvdvae.ps.link import Link
from hvdvae.ps.options import PushedOptions
from hvdvae.ps.plan import Plan
from hvdvae.ps.protocol import ANSWER, BINS, LATE, OPTIONS, REQUEST, SKIPPED, TEXT, Answer, Header, Kind, Request
from hvdvae.ps.recruiter import Recruiter
from hvdvae.ps.weights import Weights
from hvdvae.signals import Caught


class Server:
    """One of the servers; `run` serves until worker 0 quits."""

    def __init__(
        self,
        link: Link,
        weights: Weights,
        plan: Plan,
        watchdog: Watchdog,
        flag: Caught,
        recruiter: Recruiter | None = None,
    ) -> None:
        """Take the parts: what it hears and answers through, what it holds, and when it does so (`plan`).

        `flag`: the signal that this process got; `recruiter`: starts workers where some die, None to go on with those
        that are left.
        """
        self._flag = flag
        self._link, self._weights, self._watchdog, self._recruiter = link, weights, watchdog, recruiter
        self._is_step = plan.consistency == "bsp"
        self._options = PushedOptions()
        self._may_differ = bool(plan.backup_workers)
        """Whether workers whose pushes make one update may be at other steps of a schedule."""
        self._workers = workers = link.channel.workers
        self.ledger = Ledger(workers)
        self.version = 0
        self._policy = policy(
            plan.consistency, range(workers), staleness=plan.staleness or 0, backup=plan.backup_workers
        )
        self._cut = Cut()
        self._requests: dict[int, Header] = {}
        """The push of each worker that has not been answered."""
        self._pushes: dict[int, Tensor] = {}
        """Gradient (or weights) and buffers of it, (P + F)."""
        self._arrived = [0.0] * workers
        self._staleness = [0] * workers
        self._not_applied: dict[int, int] = {}
        """Workers whose last push was not, and LATE or SKIPPED."""
        self._sequence = [0] * workers
        self._attendance = Attendance(workers)
        self._noted: set[int] = set()
        """Ranks whose death has been seen to."""
        self._epochs = [0.0] * workers
        """That each worker has done."""
        self._signal = 0
        """That workers are told of: where they step together, all after the same step."""

    def run(self) -> None:
        """Serve. Blocks until worker 0 quits."""
        while True:
            try:
                with self._watchdog.waiting("a push of any worker", patient=True):
                    worker, request = self._link.hear()
                kind = Kind(int(request[Request.KIND]))
                if worker in self._noted and kind is not Kind.JOIN:
                    continue  # What the dead sent last may come after the news.
                self._watchdog.step = self.version
                if kind is Kind.QUIT:
                    self._reply(worker, request)
                    self._send_away()
                    return
                self._hear(kind, worker, request)
            except PeersDied:
                pass
            self._bury()

    def _bury(self) -> None:
        """Go on without those that have died since: the policy forgets a worker, and nobody waits for it."""
        while lost := sorted(self._link.deaths() - self._noted):
            self._noted.add(lost[0])
            if lost[0] >= self._workers and self._attendance.all_have_ended:
                continue  # Workers have the final weights.
            if lost[0] >= self._workers:
                if self._link.lost_server(lost[0]):
                    self._cut.forget_pushes()  # They come again.
            else:
                self._link.lost_worker(lost[0])
                self._bury_worker(lost[0])
        if self._recruiter is not None:
            self._recruiter.replace_lost(self._link.deaths())

    def _bury_worker(self, worker: int) -> None:
        if worker == 0:
            raise RankLost(
                "worker 0, which keeps the log and the checkpoints, has died: continue from the last checkpoint with "
                "--resume"
            )
        if self._link.speaks:
            sys.stderr.write(f"hvdvae: worker {worker} has died at step {self._clock(worker)}; the others go on\n")
        self._attendance.die(worker, self._clock(worker))
        self._cut.forget(worker)
        self._requests.pop(worker, None)
        self._act(self._policy.leave(worker))
        self._continue_cut()
        if self._recruiter is not None and not self._attendance.done:
            self._recruiter.replace(worker)
        self._end_if_all_have()

    def _clock(self, worker: int) -> int:
        return self._policy.clocks.get(worker, self._attendance.ended_at.get(worker, 0))

    def _hear(self, kind: Kind, worker: int, request: Header) -> None:
        if kind is Kind.INIT:
            self._initialize(worker)
            self._reply(worker, request)
        elif kind in (Kind.PUSH, Kind.NOTHING):
            if self._cut.frozen:
                self._cut.hold(worker, request)
            else:
                self._pushed(worker, request)
            self._continue_cut()
        elif kind is Kind.FREEZE:
            self._cut.frozen = True
            self._reply(worker, request)
        elif kind is Kind.CUT:
            self._cut.asked = Asked(worker, request, self._link.text(worker, TEXT))
            self._continue_cut()
        elif kind is Kind.DONE:
            self._ended(worker, request)
        elif kind is Kind.JOIN:
            self._admit(worker, request, self._link.text(worker, TEXT))
        elif kind is Kind.BURY:
            self._noted.add(worker)
            self._bury_worker(worker)

    def _initialize(self, worker: int) -> None:
        start = self._link.text(worker, TEXT)
        self._link.vector(worker, self._weights.vector)
        if self._weights.buffers.shape[1]:
            self._link.vector(worker, self._weights.buffers[0])
            self._weights.buffers[1:] = self._weights.buffers[0]
        vectors = []
        for entry, piece in zip(start["state"], self._weights.pieces, strict=True):
            for _ in entry["vectors"]:
                vectors.append(torch.empty(piece.stop - piece.start, dtype=self._weights.vector.dtype))
                self._link.vector(worker, vectors[-1])
        self._weights.start(start["options"], start["state"], vectors)

    def _admit(self, worker: int, request: Header, hello: Hello) -> None:
        """A worker takes a dead one's place: it gets the present weights, and begins where the slowest are."""
        assert self._recruiter is not None
        self._link.admit(worker)
        refusal = self._recruiter.refusal(worker, hello, is_over=self._attendance.all_have_ended)
        if refusal is not None:
            self._reply(worker, request, self._weights.vector)
            self._link.send_text(worker, {"refused": refusal})
            return
        self._noted.discard(worker)
        self._attendance.join(worker)
        self._sequence[worker] = 0
        epochs = min((self._epochs[other] for other in self._policy.clocks), default=0.0)
        self._policy.join(worker)  # Answered here and now, with the weights whatever the rule.
        self._weights.answered(worker)
        self._reply(worker, request, self._weights.vector)
        self._link.send_text(worker, {"epochs": epochs})
        self._epochs[worker] = epochs
        if self._weights.buffers.shape[1]:
            self._link.send_state(worker, self._weights.buffers.view(-1))
        sys.stderr.write(f"hvdvae: a new worker {worker} begins at epoch {epochs:.2f}\n")

    def _send_away(self) -> None:
        """The run is over: tell those that come too late for it."""
        if self._recruiter is not None:
            with self._watchdog.waiting("a worker that was started as the run ended"):
                self._recruiter.wait()
                while self._recruiter.expected - self._link.deaths():
                    with suppress(PeersDied):
                        self._hear(Kind.JOIN, *self._link.hear())

    def _pushed(self, worker: int, request: Header) -> None:
        if self._attendance.all_have_ended:
            for other, clock in self._attendance.begin_again().items():
                self._policy.join(other, clock)
        if request[Request.HAS_OPTIONS]:
            self._options.take(worker, self._link.text(worker, OPTIONS))
        if request[Request.KIND] == Kind.PUSH:
            self._pushes[worker] = self._link.pushed(worker)
        self._take_edit(worker, request)
        if request[Request.SEQUENCE] <= self._sequence[worker]:
            # The worker has not had the answer: it gets one when it is due, and what it pushed is not applied again.
            self.ledger.duplicates += 1
            was_answered = worker not in self._requests
            self._requests[worker] = request
            if was_answered:
                self._answer(worker)
            return
        self._sequence[worker] = int(request[Request.SEQUENCE])
        self._requests[worker] = request
        self._arrived[worker] = time.perf_counter()
        self._epochs[worker] = float(request[Request.EPOCHS])
        self.ledger.reported(worker, request)
        if request[Request.KIND] == Kind.NOTHING:
            self.ledger.skipped[worker] += 1
        else:
            self.ledger.totals[Answer.BYTES_PUSHED] += self._link.push_bytes
        self._act(self._policy.push(worker))

    def _take_edit(self, worker: int, request: Header) -> None:
        if request[Request.HAS_EDIT]:
            edit = torch.empty_like(self._weights.vector)
            self._link.vector(worker, edit)
            if request[Request.SEQUENCE] > self._sequence[worker]:
                self._weights.edit(edit, worker)

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Apply(workers):
                    self._apply(workers)
                case Drop(worker):
                    self._take_buffers(worker)
                    self.ledger.dropped_push(worker)
                    self._not_applied[worker] = LATE
                case AnswerIt(worker):
                    self._answer(worker)

    def _apply(self, workers: tuple[int, ...]) -> None:
        self._note_signal()
        for worker in workers:
            self._take_buffers(worker)
        requests = {worker: self._requests[worker] for worker in workers}
        stalenesses = {worker: self.version - int(request[Request.VERSION]) for worker, request in requests.items()}
        if any(request[Request.KIND] == Kind.NOTHING for request in requests.values()):
            # In BSP all skip what one must skip, as under allreduce; otherwise it is that worker's affair.
            self.version += int(self._is_step)
            for worker in (worker for worker, one in requests.items() if one[Request.KIND] == Kind.PUSH):
                self.ledger.dropped_push(worker)
                self._not_applied[worker] = SKIPPED
            return
        for worker, staleness in stalenesses.items():
            self._staleness[worker] = staleness
        first = workers[0]
        if len(workers) > 1 and not (self._may_differ or self._attendance.died):
            self._options.check_same({worker: request[REQUEST:] for worker, request in requests.items()})
        self._weights.set_options(self._options.of(first))
        pushes = [self._pushes[worker][: self._weights.length] for worker in workers]
        self._weights.update(pushes, requests[first][REQUEST:].tolist(), first, stalenesses[first])
        self.version += 1
        self.ledger.updated(stalenesses)

    def _note_signal(self) -> None:
        self._signal = max(self._signal, int(self.ledger.totals[Answer.SIGNAL]), self._flag.number)

    def _take_buffers(self, worker: int) -> None:
        """With the step that they are of, not before it: a copy has both of one moment."""
        request = self._requests.get(worker)
        if request is not None and request[Request.KIND] == Kind.PUSH and self._weights.buffers.shape[1]:
            self._weights.buffers[worker] = self._pushes[worker][self._weights.length :]

    def _answer(self, worker: int) -> None:
        request = self._requests.pop(worker)
        self.ledger.totals[Answer.QUEUE_SECONDS] += time.perf_counter() - self._arrived[worker]
        weights = self._weights.answer(worker) if request[Request.WANTS] else None
        self._reply(worker, request, weights, is_push=True)
        if weights is not None:
            self._weights.answered(worker, self._link.held(worker))

    def _reply(
        self, worker: int, request: Header, vector: Tensor | None = None, *, is_push: bool = False, takes: bool = True
    ) -> None:
        workers = self._workers
        header = np.empty(ANSWER + 2 * workers + BINS)
        header[:ANSWER] = self.ledger.totals
        if not self._is_step:
            self._note_signal()
        header[Answer.SIGNAL] = self._signal
        header[Answer.KIND] = request[Request.KIND]
        header[Answer.SEQUENCE] = request[Request.SEQUENCE]
        header[Answer.VERSION] = self.version
        header[Answer.STALENESS] = self._staleness[worker]
        header[Answer.DROPPED_MINE] = self._not_applied.pop(worker, 0)
        for other in range(workers):
            header[ANSWER + other] = -1 if other in self._attendance.missing else self._clock(other)
        header[ANSWER + workers : ANSWER + 2 * workers] = self.ledger.step_seconds
        header[ANSWER + 2 * workers :] = self.ledger.histogram
        self.ledger.totals[Answer.BYTES_PULLED] += self._link.answer(
            worker, header, vector, is_push=is_push, takes=takes
        )

    def _continue_cut(self) -> None:
        """Apply what belongs to the cut; once it is complete, send it and go on."""
        for other, push in self._cut.due(self._policy.clocks):
            with suppress(PeersDied):  # Of that worker: the others' are not lost with it.
                self._pushed(other, push)
        if self._cut.asked is None or not self._cut.is_complete(self._policy.clocks):
            return
        worker, request, _ = self._cut.asked
        if request[Request.GOES_ON]:
            self._weights.answered(worker)
        self._reply(worker, request, self._weights.vector, takes=bool(request[Request.GOES_ON]))
        if self._weights.buffers.shape[1]:
            self._link.send_state(worker, self._weights.buffers.view(-1))
        if request[Request.WANTS]:
            manifest, vectors = self._weights.state()
            self._link.send_text(worker, manifest)
            for vector in vectors:
                self._link.send_state(worker, vector)
        for other, push in self._cut.end():
            with suppress(PeersDied):
                self._pushed(other, push)

    def _ended(self, worker: int, request: Header) -> None:
        self._take_edit(worker, request)
        self._attendance.end(worker, request, self._clock(worker))
        if request[Request.SEQUENCE] > self._sequence[worker]:
            self.ledger.reported(worker, request)
            self._sequence[worker] = int(request[Request.SEQUENCE])
            self._act(self._policy.leave(worker))
        self._end_if_all_have()

    def _end_if_all_have(self) -> None:
        if self._attendance.all_have_ended:
            for worker in sorted(self._attendance.unanswered):
                self._attendance.unanswered.discard(worker)
                self._answer_end(worker)

    def _answer_end(self, worker: int) -> None:
        self._weights.answered(worker)
        self._reply(worker, self._attendance.done[worker], self._weights.vector)
        self._link.send_text(worker, self._summary())

    def _summary(self) -> dict[str, Any]:
        return {
            **self.ledger.summary(),
            "died": self._attendance.died,
            "joined": self._attendance.joined,
            "clocks": [self._attendance.ended_at.get(worker, 0) for worker in range(self._workers)],
        }
