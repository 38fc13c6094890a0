"""How messages of a gathered codec become the mean of what they say, on all ranks from the same bytes.

    whole     every rank gets every message, and decodes all of them: N - 1 messages in and out
    sliced    rank j gets slice j of every message, and tells all the mean of them: 2 (N - 1) / N messages in and out

Sliced is an allreduce at the bytes of a ring, for codecs that know each element by itself (fp16, bf16): a slice of such
a message is the message of a slice. It rounds the mean once more. Sums are of float32: MPI has no sum of half
precision, and bfloat16 it would sum to NaN.

Behind what is gathered stands a flag, float32: 0, or NaN where a rank's vector was not finite.

Shapes: P elements, N ranks, B bytes of a message, L elements of a slice.
"""

import torch
from torch import Tensor

from hvdvae.compression import Gathered
from hvdvae.strategies.traffic import Traffic
from hvdvae.world import World

FLAG_BYTES = 4


class WholeMessages:
    """Every rank decodes all."""

    def __init__(self, codec: Gathered, world: World) -> None:
        """Make room. Local."""
        self._codec, self._world = codec, world
        # The flag is a float32, and stands where one may.
        self._flag_at = -(-codec.nbytes // FLAG_BYTES) * FLAG_BYTES
        self._message = torch.zeros(self._flag_at + FLAG_BYTES, dtype=torch.uint8)
        self._messages = torch.zeros(world.size, self._message.numel(), dtype=torch.uint8)

    def say(self, vector: Tensor, sent: Tensor, key: int, *, is_finite: bool) -> None:
        """Write this rank's message of a vector (P,), and what it says to `sent` (P,). Local.

        One that is not finite is not said, and will make the mean so. `key`: of what is random.
        """
        body = self._message[: self._codec.nbytes]
        if is_finite:
            self._codec.encode(vector, body, key)
        self._message[self._flag_at :].view(torch.float32).fill_(0.0 if is_finite else torch.nan)
        self._codec.add(body, sent.zero_())

    def mean(self, mean: Tensor, traffic: Traffic) -> None:
        """Overwrite a vector (P,) with the mean of what all ranks say. Blocks; every rank must call it."""
        rows = self._world.gather_rows(self._message, self._messages, "gather of compressed vectors")
        traffic.gathered(self._message.numel(), self._world.size)
        mean.zero_()
        for row in rows:
            self._codec.add(row[: self._codec.nbytes], mean)
        mean.div_(self._world.size)
        mean[:1].add_(rows[:, self._flag_at :].view(torch.float32).sum())


class SlicedMessages:
    """Every rank decodes one slice of all."""

    def __init__(self, codec: Gathered, length: int, world: World) -> None:
        """Make room. Local. `length`: P."""
        self._codec, self._world = codec, world
        self._each = codec.nbytes // length
        # Of equal slices, the last ones padded; even, so that the flag stands where a float32 may.
        self._slice = 2 * -(-length // (2 * world.size))
        self._outgoing = torch.zeros(world.size, self._slice * self._each, dtype=torch.uint8)
        self._incoming = torch.zeros_like(self._outgoing)
        self._sum = torch.zeros(self._slice)
        self._mean = torch.zeros(self._outgoing.shape[1] + FLAG_BYTES, dtype=torch.uint8)
        self._means = torch.zeros(world.size, self._mean.numel(), dtype=torch.uint8)

    def say(self, vector: Tensor, sent: Tensor, key: int, *, is_finite: bool) -> None:
        """As WholeMessages'."""
        body = self._outgoing.view(-1)[: self._codec.nbytes]
        if is_finite:
            self._codec.encode(vector, body, key)
        self._mean[-FLAG_BYTES:].view(torch.float32).fill_(0.0 if is_finite else torch.nan)
        self._codec.add(body, sent.zero_())

    def mean(self, mean: Tensor, traffic: Traffic) -> None:
        """As WholeMessages'."""
        codec, world = self._codec, self._world
        self._sum.zero_()
        for row in world.exchange_rows(self._outgoing, self._incoming, "exchange of compressed slices"):
            codec.add(row, self._sum)
        codec.encode(self._sum.div_(world.size), self._mean[:-FLAG_BYTES], key=0)
        means = world.gather_rows(self._mean, self._means, "gather of compressed means")
        traffic.gathered(self._outgoing.shape[1], world.size)
        traffic.gathered(self._mean.numel(), world.size)
        mean.zero_()
        for rank, row in enumerate(means):
            part = mean[rank * self._slice : (rank + 1) * self._slice]  # Of a short vector some are empty.
            codec.add(row[: len(part) * self._each], part)
        mean[:1].add_(means[:, -FLAG_BYTES:].contiguous().view(torch.float32).sum())


def messages_of(codec: Gathered, length: int, world: World) -> WholeMessages | SlicedMessages:
    """The way that takes fewer bytes. Local."""
    if codec.is_elementwise and world.size > 2:
        return SlicedMessages(codec, length, world)
    return WholeMessages(codec, world)
