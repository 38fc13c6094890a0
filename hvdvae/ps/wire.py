"""Short messages between workers and servers (`--compression`): pushes with error feedback, pulls as differences.

Shapes: L elements of a shard, D of them without the gaps between parameters (which codecs do not see), F of the float
buffers that follow the last shard's pushes.

    push  worker -> server  the codec's message of the gradient and what earlier ones left out, then the buffers (F)
    pull  server -> worker  the codec's message of the weights less what the worker holds

A pull needs no feedback: what a difference left out is still missing from what the worker holds, and is in the next.
Both ends keep account of that, by adding the same messages. Answers to all but pushes carry weights as they are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hvdvae.compression import Gathered, codec_of
from hvdvae.compression.feedback import Feedback
from hvdvae.flat_layout import Runs
from hvdvae.ps.plan import Plan
from hvdvae.seeding import stream

_ALIGNED = 4
"""Bytes: where float32 may stand."""


class PushMessage:
    """Of one shard: the worker's end writes, the server's reads."""

    def __init__(self, codec: Gathered, length: int, buffers: int, momentum: float, runs: Runs | None = None) -> None:
        """`length`: L; `buffers`: F, or 0 where none follow; `momentum`: as Feedback has it.

        `runs`: of the shard, what the codec sees (default: all of it).
        """
        runs = runs or Runs([slice(0, length)], length)
        self._codec, self._runs, self._length, self._buffers = codec, runs, length, buffers
        self._feedback = Feedback(runs.count, codec.name, momentum) if codec.needs_feedback else None
        self._start = -(-codec.nbytes // _ALIGNED) * _ALIGNED
        self.message = torch.zeros(self._start + 4 * buffers, dtype=torch.uint8)
        self._sent = torch.zeros(runs.count)
        self._calls = 0
        self._errors = 0.0

    @property
    def error(self) -> float:
        """Mean size of what messages left out, as a part of what they were to say."""
        return self._errors / max(self._calls, 1)

    def write(self, vector: Tensor, key: int) -> Tensor:
        """The message of a gradient and the buffers behind it (L + F). Leaves the vector alone.

        Call `keep` once the server has used it: what a message that it drops was to make up for is still remembered.
        `key`: of what is random; another worker and another shard shall have another.
        """
        self._calls += 1
        gradient = self._runs.dense(vector[: self._length])
        whole = gradient if self._feedback is None else self._feedback.compensate(gradient)
        body = self.message[: self._codec.nbytes]
        self._codec.encode(whole, body, stream(_PUSH, key, self._calls))
        self._codec.add(body, self._sent.zero_())
        size = float(torch.linalg.vector_norm(whole))
        left = self._sent.sub_(whole) if self._feedback is None else self._feedback.remember(self._sent)
        self._errors += float(torch.linalg.vector_norm(left)) / size if size else 0.0
        if self._buffers:
            self.message[self._start :].view(torch.float32).copy_(vector[self._length :])
        return self.message

    def keep(self) -> None:
        """The server has used the last message: what that left out is remembered from now on."""
        if self._feedback is not None:
            self._feedback.keep()

    def read(self, into: Tensor) -> None:
        """What the message says, to a vector (L + F), whose gaps stay as they are."""
        self._codec.add(self.message[: self._codec.nbytes], self._sent.zero_())
        self._runs.spread(self._sent, into[: self._length])
        if self._buffers:
            into[self._length :].copy_(self.message[self._start :].view(torch.float32))


class PullMessage:
    """Of one shard and worker: the server's end writes, the worker's reads; both know what the worker holds."""

    def __init__(self, codec: Gathered, length: int, runs: Runs | None = None) -> None:
        """`length`: L; `runs` as PushMessage has them. The worker holds nothing yet."""
        runs = runs or Runs([slice(0, length)], length)
        self._codec, self._runs = codec, runs
        self.message = torch.zeros(codec.nbytes, dtype=torch.uint8)
        self._held = torch.zeros(runs.count)
        """What the worker holds, (D,)."""
        self.is_known = False
        self._calls = 0

    def holds(self, weights: Tensor) -> None:
        """The worker has got these weights (L,) as they are."""
        self._held.copy_(self._runs.dense(weights))
        self.is_known = True

    @property
    def held(self) -> Tensor:
        """What the worker holds, (L,)."""
        whole = torch.zeros(self._runs.length)
        self._runs.spread(self._held, whole)
        return whole

    def write(self, weights: Tensor, key: int) -> Tensor:
        """The message that takes the worker nearer to these weights (L,)."""
        self._calls += 1
        self._codec.encode(self._runs.dense(weights) - self._held, self.message, stream(_PULL, key, self._calls))
        self._codec.add(self.message, self._held)
        return self.message

    def read(self, into: Tensor) -> None:
        """The weights that the worker holds with this message, to a vector (L,)."""
        self._codec.add(self.message, self._held)
        self._runs.spread(self._held, into)


def codec_for(plan: Plan) -> Callable[[int], Gathered] | None:
    """Makes a codec for a vector of some length; None where vectors travel as they are."""
    if plan.compression == "none":
        return None

    def make(length: int) -> Gathered:
        codec = codec_of(plan.compression, [(length,)], share=plan.compression_share)
        assert isinstance(codec, Gathered)
        return codec

    return make


_PUSH, _PULL = 0x9054, 0x9011
"""Name the streams of random numbers."""
