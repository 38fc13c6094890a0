"""A worker's side of the parameter server: pushes, pulls, and consistent copies of what the servers hold.

Shapes: P parameters, F elements of float buffers, N workers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdvae.flat_layout import Runs
from hvdvae.ps.asking import Servers
from hvdvae.ps.channel import Channel
from hvdvae.ps.edits import merged
from hvdvae.ps.plan import Plan
from hvdvae.ps.protocol import (
    ANSWER,
    BINS,
    OPTIONS,
    REQUEST,
    SKIPPED,
    STATE,
    TEXT,
    Answer,
    Header,
    Kind,
    Request,
)
from hvdvae.ps.shards import pieces
from hvdvae.ps.state import Manifest
from hvdvae.ps.wire import PullMessage, PushMessage, codec_for
from hvdvae.seeding import stream


class Copy(NamedTuple):
    """What all servers held after the same pushes."""

    buffers: Tensor
    """(N, F): each worker's."""
    states: list[tuple[Manifest, list[Tensor]]]
    """The optimizer's state, a server, of the pieces of its shard; empty if it was not asked for."""


class Client:
    """One worker's requests to all servers. Every method blocks; a thread of its own may call it, one at a time."""

    def __init__(
        self,
        channel: Channel,
        shards: list[slice],
        groups: list[slice],
        buffers: int,
        holders: list[list[int]],
        plan: Plan,
        runs: Runs,
    ) -> None:
        """`channel.vectors[rank]` are this worker's vectors from now on.

        `shards`, `groups`: slices of the whole vector; `holders`: of each shard, the ranks of server and backup;
        `plan`: says which codec, if any, messages have; `runs`: what such messages say of the whole vector.
        """
        self._channel, self._shards = channel, shards
        self._servers = Servers(channel, holders)
        self.outgoing, self.incoming = channel.vectors[channel.rank]
        """(P + F): what is pushed, gradient and buffers; (P): what was pulled."""
        self._groups, self._buffers = groups, buffers
        self._pushes: list[PushMessage] = []
        self._pulls: list[PullMessage] = []
        """Of each shard, with a codec."""
        make = codec_for(plan)
        if make is not None:
            said = [runs.within(shard) for shard in shards]
            tails = [0] * (len(shards) - 1) + [buffers]
            momentum = plan.compression_momentum
            self._pushes = [
                PushMessage(make(part.count), part.length, tail, momentum, part)
                for part, tail in zip(said, tails, strict=True)
            ]
            self._pulls = [PullMessage(make(part.count), part.length, part) for part in said]
        self._versions = np.zeros(len(shards))
        """Updates that the pulled weights have had, a server."""
        self._sequence = 0
        self._edit: Tensor | None = None
        """That the next push takes along."""
        self.answer: Header = np.zeros(ANSWER + 2 * channel.workers + BINS)
        """The last answer of the first server: totals of all workers."""
        self.skipped_with_others = 0
        """Pushes that were not applied because another worker's gradient of the step was not finite."""
        self.staleness = 0
        """Of this worker's last push: the largest of all servers."""

    @property
    def compression_error(self) -> float:
        """Mean size of what pushes left out, as a part of the gradients'; 0 without a codec."""
        return sum(push.error for push in self._pushes) / max(len(self._pushes), 1)

    @property
    def takeovers(self) -> int:
        """How often a backup took the place of a server that died."""
        return self._servers.takeovers

    @property
    def versions(self) -> NDArray[np.float64]:
        """Of the pulled weights, (servers,); a push says with which it was computed."""
        return self._versions.copy()

    @property
    def clocks(self) -> list[int]:
        """Finished steps of each worker, as the first server counted when it answered."""
        return [int(clock) for clock in self.answer[ANSWER : ANSWER + self._channel.workers]]

    @property
    def living(self) -> list[int]:
        """Workers that are not known to have died, in order."""
        return [worker for worker, clock in enumerate(self.clocks) if clock >= 0]

    @property
    def step_seconds(self) -> list[float]:
        """Seconds of each worker's last steps."""
        return [float(seconds) for seconds in self.answer[ANSWER + self._channel.workers :][: self._channel.workers]]

    @property
    def histogram(self) -> list[int]:
        """Pushes that were applied with a staleness of 0, 1, ...; the last counts all beyond."""
        return [int(count) for count in self.answer[ANSWER + 2 * self._channel.workers :]]

    def initialize(
        self,
        weights: Tensor,
        buffers: Tensor,
        options: list[dict[str, Any]],
        manifest: Manifest,
        state: list[Tensor],
    ) -> None:
        """Give the servers weights (P,), float buffers (F,), and the optimizer's options and state, vectors of groups.

        Worker 0 calls it, before anybody pushes: it returns once the servers have all of it, as a push of another
        worker could overtake it. `state`: of whole groups, in the manifest's order.
        """
        for number, shard in enumerate(self._shards):
            vectors = [weights[shard]]
            if number == len(self._shards) - 1 and self._buffers:
                vectors.append(buffers)
            left = iter(state)
            for entry, group, piece in zip(manifest, self._groups, pieces(self._groups, shard), strict=True):
                start = shard.start + piece.start - group.start
                vectors += [next(left)[start : start + piece.stop - piece.start] for _ in entry["vectors"]]
            self._servers.ask(number, partial(self._send_start, {"options": options, "state": manifest}, vectors))
        self._answers(pull=False)

    def _send_start(self, record: dict[str, Any], vectors: list[Tensor], server: int) -> None:
        self._channel.send(server, self._request(Kind.INIT))
        self._channel.send_text(server, record, TEXT)
        for vector in vectors:
            self._channel.send_vector(server, vector, STATE)

    def join(self, hello: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """Take a dead worker's place; the present weights are in `incoming` then.

        Returns {"epochs": how many the slowest worker has done}, or {"refused": why}; and each worker's buffers (N, F).
        """
        found: dict[str, Any] = {}
        buffers = torch.zeros(self._channel.workers, self._buffers, dtype=self._channel.dtype)

        def send(server: int) -> None:
            self._channel.send(server, self._request(Kind.JOIN))
            self._channel.send_text(server, hello, TEXT)

        self._servers.ask(0, send)

        def rest(number: int, server: int) -> None:
            found.update(self._channel.receive_text(server, TEXT))
            if "epochs" in found:
                self._channel.receive_vector(server, buffers.view(-1), STATE)

        self._answers(pull=True, rest=rest)
        return found, buffers

    def edited(self, edit: Tensor) -> None:
        """Have the next request take along weights that were changed by hand, (P,), as edits.py has them. Local."""
        self._edit = merged(self._edit, edit)

    def _taken_edit(self, request: Header, shard: slice) -> Tensor | None:
        """A shard's part of it, announced in the request."""
        request[Request.HAS_EDIT] = float(self._edit is not None)
        return None if self._edit is None else self._edit[shard]

    def push(
        self,
        rates: list[float],
        report: NDArray[np.float64],
        *,
        options: list[dict[str, Any]] | None,
        versions: NDArray[np.float64],
        finite: bool,
        pull: bool,
    ) -> None:
        """Push `outgoing`; return once the servers have answered, with their weights in `incoming` if `pull`.

        `rates`: learning rate of each group. `options`: all options of all groups, if they changed. `report`: fields
        of a request from STEPS on, and SIGNAL. `versions`: of the weights that the push was computed with. Without
        `finite` the step is counted, and nothing is pushed.
        """
        self._sequence += 1
        kind = Kind.PUSH if finite else Kind.NOTHING
        for number, shard in enumerate(self._shards):
            request = self._request(kind, report if number == 0 else None, groups=len(rates))
            request[Request.SIGNAL] = report[Request.SIGNAL]
            request[Request.VERSION] = versions[number]
            request[Request.WANTS] = float(pull)
            request[Request.HAS_OPTIONS] = float(options is not None)
            request[REQUEST:] = rates
            vector = self.outgoing[shard.start :] if number == len(self._shards) - 1 else self.outgoing[shard]
            if self._pushes and finite:
                # The last message has arrived: its push was answered.
                vector = self._pushes[number].write(vector, stream(self._channel.rank, shard.start))
            edit = self._taken_edit(request, shard)
            self._servers.ask(number, partial(self._send_push, request, options, vector if finite else None, edit))
        answers = self._answers(pull=pull)
        self._edit = None
        self.staleness = int(max(answer[Answer.STALENESS] for answer in answers))
        self.skipped_with_others += int(finite and answers[0][Answer.DROPPED_MINE] == SKIPPED)
        if self._pushes and finite:
            for message, answer in zip(self._pushes, answers, strict=True):
                if not answer[Answer.DROPPED_MINE]:
                    message.keep()

    def _send_push(
        self,
        request: Header,
        options: list[dict[str, Any]] | None,
        vector: Tensor | None,
        edit: Tensor | None,
        server: int,
    ) -> None:
        if options is not None:
            self._channel.send_text(server, options, OPTIONS)
        self._channel.send(server, request)
        if vector is not None and not self._channel.shares_memory(server):
            self._channel.send_vector(server, vector)
        if edit is not None:
            self._channel.send_vector(server, edit, STATE)

    def copy(self, *, state: bool, goes_on: bool) -> Copy:
        """What all servers hold after the same pushes; weights go to `incoming`. Others push on meanwhile.

        `goes_on`: this worker computes with these weights from now on; otherwise with those that it had.
        """
        versions = self.versions
        while True:
            takeovers = self.takeovers
            found = self._copy_once(state=state, goes_on=goes_on)
            if self.takeovers == takeovers or len(self._shards) == 1:
                break  # Otherwise a backup may have gone on past the moment that the others copied.
        if not goes_on:
            self._versions[:] = versions
        return found

    def _copy_once(self, *, state: bool, goes_on: bool) -> Copy:
        clocks = [0] * self._channel.workers
        if len(self._shards) > 1:
            self._sequence += 1
            for number in range(len(self._shards)):
                self._servers.ask(number, partial(self._channel.send, header=self._request(Kind.FREEZE)))
            workers = slice(ANSWER, ANSWER + self._channel.workers)
            # -1 stands for a worker that has died.
            clocks = np.max([answer[workers] for answer in self._answers(pull=False)], axis=0).astype(int).tolist()
        self._sequence += 1
        request = self._request(Kind.CUT)
        request[Request.WANTS] = float(state)
        request[Request.GOES_ON] = float(goes_on)
        buffers = torch.zeros(self._channel.workers, self._buffers, dtype=self._channel.dtype)
        states: dict[int, tuple[Manifest, list[Tensor]]] = {}

        def rest(number: int, server: int) -> None:
            if number == len(self._shards) - 1:
                self._channel.receive_vector(server, buffers.view(-1), STATE)
            if state:
                states[number] = self._receive_state(number, server)

        for number in range(len(self._shards)):
            self._servers.ask(number, partial(self._send_cut, request, clocks))
        self._answers(pull=True, rest=rest, takes=goes_on)
        return Copy(buffers, [states[number] for number in sorted(states)])

    def _send_cut(self, request: Header, clocks: list[int], server: int) -> None:
        self._channel.send_text(server, clocks, TEXT)
        self._channel.send(server, request)

    def done(self, report: NDArray[np.float64]) -> list[dict[str, Any]]:
        """Push no more for now. Returns once no worker does, with the final weights and each server's ledger."""
        self._sequence += 1
        ledgers: dict[int, dict[str, Any]] = {}

        def rest(number: int, server: int) -> None:
            ledgers[number] = self._channel.receive_text(server, TEXT)

        for number, shard in enumerate(self._shards):
            request = self._request(Kind.DONE, report if number == 0 else None)
            edit = self._taken_edit(request, shard)
            self._servers.ask(number, partial(self._send_push, request, None, None, edit))
        self._answers(pull=True, rest=rest)
        self._edit = None
        return [ledgers[number] for number in sorted(ledgers)]

    def quit(self) -> None:
        """Worker 0: end the servers."""
        for number in range(len(self._shards)):
            self._servers.ask(number, partial(self._channel.send, header=self._request(Kind.QUIT)))
        self._answers(pull=False)

    def _request(self, kind: Kind, report: NDArray[np.float64] | None = None, groups: int = 0) -> Header:
        request = np.zeros(REQUEST + groups)
        if report is not None:
            request[:REQUEST] = report
        request[Request.KIND] = kind
        request[Request.SEQUENCE] = self._sequence
        return request

    def _answers(
        self, *, pull: bool, rest: Callable[[int, int], None] | None = None, takes: bool = True
    ) -> list[Header]:
        """Of all servers, to their last requests; `rest` takes what comes after the weights, from (number, rank).

        `takes`: this worker computes with the weights that it pulls.
        """
        answers = [
            self._servers.answer(number, self._sequence, partial(self._take, number, pull, takes, rest))
            for number in range(len(self._shards))
        ]
        self.answer = answers[0]
        # Only one server may have got it.
        self.answer[Answer.SIGNAL] = max(answer[Answer.SIGNAL] for answer in answers)
        for field in (Answer.BYTES_PUSHED, Answer.BYTES_PULLED):
            self.answer[field] = sum(answer[field] for answer in answers)
        return answers

    def _take(
        self,
        number: int,
        pull: bool,
        takes: bool,
        rest: Callable[[int, int], None] | None,
        server: int,
        answer: Header,
    ) -> None:
        """What comes with an answer."""
        if pull and not self._channel.shares_memory(server):
            into = self.incoming[self._shards[number]]
            if answer[Answer.SHORT]:
                self._channel.receive_vector(server, self._pulls[number].message)
                self._pulls[number].read(into)
            else:
                self._channel.receive_vector(server, into)
                if self._pulls and takes:
                    self._pulls[number].holds(into)
        if pull:
            self._versions[number] = answer[Answer.VERSION]
        if rest is not None:
            rest(number, server)

    def _receive_state(self, number: int, server: int) -> tuple[Manifest, list[Tensor]]:
        manifest: Manifest = self._channel.receive_text(server, TEXT)
        vectors = []
        for entry, piece in zip(manifest, pieces(self._groups, self._shards[number]), strict=True):
            for _ in entry["vectors"]:
                vectors.append(torch.empty(piece.stop - piece.start, dtype=self._channel.dtype))
                self._channel.receive_vector(server, vectors[-1], STATE)
        return manifest, vectors
