"""A model in stages, one a rank: micro-batches flow through them, their gradients flow back (micro_batches.py).

Messages, over the communicator of a pipeline (a rank's number is its stage), all of bytes:

    tag        from -> to         what
    FORM       s -> s + 1         JSON [[shape, dtype, has a gradient], ...]: once for each length of micro-batches
    FORWARD    s -> s + 1         a step's result, its tensors one after the other
    BACKWARD   s + 1 -> s         the gradients of those that have one, in the same order

A receive is posted before the work that comes before it: the message finds its place while this rank computes.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hvdvae.batch import Batch, chunks, examples_of
from hvdvae.dtypes import DTYPES
from hvdvae.parallel.mesh import Groups
from hvdvae.parallel.micro_batches import bubble, order_of
from hvdvae.parallel.stages import Chain, Payload, finish

FORM, FORWARD, BACKWARD = range(3)
Form = list[tuple[list[int], str, bool]]


class _Held(NamedTuple):
    """Of a micro-batch between its two turns."""

    inputs: Payload
    outputs: list[Tensor]
    """Those that have a gradient; of the last stage the loss."""


class Pipeline:
    """This rank's stage."""

    def __init__(
        self,
        chain: Chain,
        steps: slice,
        groups: Groups,
        *,
        micros: int,
        schedule: str = "1f1b",
        recompute: bool = False,
    ) -> None:
        """`steps`: those that this rank computes (stages.keep_stage). `micros`: micro-batches that a batch is cut into.

        `recompute`: activations are not kept between forward and backward but computed once more (Chen et al. 2016).
        """
        self._chain, self._steps, self._micros = chain, chain.steps[steps], micros
        self._first_step = steps.start
        self._count = micros
        """Of them in a step, with those of its passes."""
        self._schedule, self._recompute = schedule, recompute
        self._world = groups.stages
        self._stage, self._stages = groups.stages.rank, groups.stages.size
        self._told: dict[int, Form] = {}
        self._heard: dict[int, Form] = {}
        self._busy = self._total = 0.0
        self._groups = groups
        self._open: list[tuple[MPI.Request, Tensor]] = []
        """Messages of the step that is taken."""
        self._abandoned: list[list[tuple[MPI.Request, Tensor]]] = []
        """Those of steps in which a rank died: MPI may still write there."""

    def run(
        self, batch: Batch, epoch: float, passes: int, autocast: AbstractContextManager[None]
    ) -> list[tuple[Mapping[str, Tensor], int]]:
        """Forward and backward of a batch, whose gradients add up in the parameters. Blocks; every stage must call it.

        `passes`: as many times the batch of a step; gradients are of the mean times `passes`. Returns losses and
        numbers of examples of each micro-batch, on the last stage.
        """
        begin = time.perf_counter()
        self._chain.begin(batch)
        micros = chunks(batch, self._micros * passes)
        self._count = len(micros)
        lengths = [examples_of(micro) for micro in micros]
        stops = np.cumsum(lengths).tolist()
        places = [slice(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
        held: dict[int, _Held] = {}
        found: list[tuple[Mapping[str, Tensor], int]] = []
        order = order_of(self._schedule, self._stage, self._stages, len(micros))
        sent: list[tuple[MPI.Request, Tensor]] = []
        incoming = _Incoming(self, [(kind, lengths[micro]) for kind, micro in order if self._hears(kind)])
        for kind, micro in order:
            message = incoming.next() if self._hears(kind) else None
            finish(self._world.device)
            working = time.perf_counter()
            if kind == "forward":
                inputs = (
                    self._chain.inputs(micros[micro]) if message is None else self._unpacked(message, lengths[micro])
                )
                with autocast:
                    outputs = self._forward(inputs, places[micro])
                    if self._stage == self._stages - 1:
                        result = self._chain.loss(outputs, micros[micro], epoch)
                        values = result if isinstance(result, Mapping) else {"loss": result}
                        found.append((values, lengths[micro]))
                        weight = lengths[micro] / sum(lengths) * passes
                        held[micro] = _Held(inputs, [values["loss"] * weight])
                    else:
                        held[micro] = _Held(inputs, [tensor for tensor in outputs if tensor.requires_grad])
                finish(self._world.device)
                self._busy += time.perf_counter() - working
                if self._stage < self._stages - 1:
                    self._tell_form(outputs, lengths[micro])
                    sent.append(self._send(outputs, self._stage + 1, FORWARD))
            else:
                inputs, outputs_held = held.pop(micro)
                if message is None:
                    torch.autograd.backward(outputs_held)
                else:
                    form: Form = [(list(tensor.shape), str(tensor.dtype), True) for tensor in outputs_held]
                    gradients = [piece.to(self._world.device) for piece in _views(message, form)]
                    torch.autograd.backward(outputs_held, gradients)
                finish(self._world.device)
                self._busy += time.perf_counter() - working
                if self._stage > 0:
                    backward = tuple(_gradient(tensor) for tensor in inputs if tensor.requires_grad)
                    sent.append(self._send(backward, self._stage - 1, BACKWARD))
        for request, _ in sent:  # One by one: of several MPI does not tell why it failed.
            self._wait(request, "a stage that takes what was sent to it")
        self._open.clear()
        self._total += time.perf_counter() - begin
        return found

    @property
    def _comm(self) -> Any:
        return self._world.comm

    def recover(self) -> None:
        """Take up the work with other neighbours: what was told is told again. Local."""
        self._abandoned.append(self._open)
        self._open = []
        self._told.clear()
        self._heard.clear()

    def forget(self) -> None:
        """Begin to measure anew. Local."""
        self._busy = self._total = 0.0

    def results(self) -> dict[str, Any]:
        """What stages did, and how long they had nothing to do. Blocks; every rank of the model must call it."""
        mine = [self._busy, self._total, self._first_step]
        rows = self._groups.model.gather_objects(mine, "times of the stages")[:: self._groups.mesh.tp]
        busy = [seconds for seconds, *_ in rows]
        total = max(seconds for _, seconds, _ in rows) or float("nan")
        return {
            "stages": self._stages,
            "first_steps": [start for *_, start in rows],
            "micro_batches": self._count,
            "schedule": self._schedule,
            "stage_seconds": busy,
            "imbalance": max(busy) * len(busy) / (sum(busy) or float("nan")),
            "idle": 1 - sum(busy) / len(busy) / total,
            "bubble": bubble(self._stages, self._count),
        }

    def _hears(self, kind: str) -> bool:
        return self._stage > 0 if kind == "forward" else self._stage < self._stages - 1

    def _forward(self, inputs: Payload, place: slice) -> Payload:
        def whole(*payload: Tensor) -> Payload:
            for step in self._steps:
                payload = step.run(payload, place)
            return payload

        if not self._recompute:
            return whole(*inputs)
        outputs: Payload = checkpoint(whole, *inputs, use_reentrant=False)
        return outputs

    def _tell_form(self, outputs: Payload, length: int) -> None:
        if length not in self._told:
            self._told[length] = [(list(t.shape), str(t.dtype), t.requires_grad) for t in outputs]
            message = np.frombuffer(json.dumps(self._told[length]).encode(), np.uint8)
            with self._world.waiting("the next stage", among=()):
                self._comm.Send(message, self._stage + 1, FORM)

    def form(self, length: int) -> Form:
        """Of what the stage before sends of so many examples. Blocks the first time."""
        if length not in self._heard:
            with self._world.waiting("the stage before", among=()):
                status = MPI.Status()
                self._comm.Probe(self._stage - 1, FORM, status)
                message = np.empty(status.Get_count(MPI.BYTE), np.uint8)
                self._comm.Recv(message, self._stage - 1, FORM)
            self._heard[length] = json.loads(message.tobytes())
        return self._heard[length]

    def post(self, kind: str, length: int) -> tuple[MPI.Request, Tensor]:
        """Make room for a message. Local, but for the first of a length."""
        if kind == "forward":
            nbytes, source, tag = sum(map(_nbytes, self.form(length))), self._stage - 1, FORWARD
        else:
            nbytes = sum(_nbytes(one) for one in self._told[length] if one[2])
            source, tag = self._stage + 1, BACKWARD
        room = torch.empty(nbytes, dtype=torch.uint8)
        return self._begin(self._comm.Irecv, room, source, tag)

    def knows(self, kind: str, length: int) -> bool:
        """Whether a message's length is known. Local."""
        return length in (self._heard if kind == "forward" else self._told)

    def arrived(self, posted: tuple[MPI.Request, Tensor]) -> Tensor:
        """The message that room was made for. Blocks."""
        request, room = posted
        self._wait(request, "a neighbouring stage")
        return room

    def _wait(self, request: MPI.Request, what: str) -> None:
        with self._world.waiting(what, among=()):
            request.Wait()

    def _begin(self, action: Callable[..., Any], message: Tensor, other: int, tag: int) -> tuple[MPI.Request, Tensor]:
        with self._world.waiting("a neighbouring stage", among=()):
            begun = action(message.numpy(), other, tag), message
        self._open.append(begun)
        return begun

    def _send(self, tensors: Payload, to: int, tag: int) -> tuple[MPI.Request, Tensor]:
        forms: Form = [(list(tensor.shape), str(tensor.dtype), True) for tensor in tensors]
        message = torch.empty(sum(map(_nbytes, forms)), dtype=torch.uint8)
        for place, tensor in zip(_views(message, forms), tensors, strict=True):
            place.copy_(tensor.detach())
        return self._begin(self._comm.Isend, message, to, tag)

    def _unpacked(self, message: Tensor, length: int) -> Payload:
        form = self.form(length)
        pieces = zip(_views(message, form), form, strict=True)
        return tuple(piece.to(self._world.device).requires_grad_(trained) for piece, (*_, trained) in pieces)


class _Incoming:
    """Messages that a stage is to get in a step: room is made for the next one while the last is worked on."""

    def __init__(self, pipeline: Pipeline, expected: list[tuple[str, int]]) -> None:
        self._pipeline, self._expected = pipeline, expected[::-1]
        self._posted = self._make_room()

    def next(self) -> Tensor:
        message = self._pipeline.arrived(self._posted or self._pipeline.post(*self._expected.pop()))
        self._posted = self._make_room()
        return message

    def _make_room(self) -> tuple[MPI.Request, Tensor] | None:
        # The form of a gradient is known once its activation was sent, so not always one message ahead.
        if self._expected and self._pipeline.knows(*self._expected[-1]):
            return self._pipeline.post(*self._expected.pop())
        return None


def _nbytes(form: tuple[list[int], str, bool]) -> int:
    """With what fills it up to eight, so that the next tensor begins where any dtype may."""
    nbytes = int(np.prod(form[0], dtype=np.int64)) * DTYPES[form[1]].itemsize
    return -(-nbytes // 8) * 8


def _views(message: Tensor, form: Form) -> list[Tensor]:
    """The tensors of a message, in place."""
    found, start = [], 0
    for one in form:
        count = int(np.prod(one[0], dtype=np.int64)) * DTYPES[one[1]].itemsize
        found.append(message[start : start + count].view(DTYPES[one[1]]).view(one[0]))
        start += _nbytes(one)
    return found


def _gradient(tensor: Tensor) -> Tensor:
    return tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
