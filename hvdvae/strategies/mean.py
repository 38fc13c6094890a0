"""The mean of a vector over ranks, as it is or in short messages.

    compensated = vector + what earlier messages left out
    messages of all ranks -> the mean of what they say, the same bits everywhere

Gathered codecs (compression/codec.py) send messages (messages.py); averaged ones let the World take means. Either way
all ranks decode the same mean, or the same bytes in the same order. A vector that is not finite is said to all, and
leaves what is remembered as it was.
"""

from typing import Protocol

import torch
from torch import Tensor

from hvdvae.compression import Averaged, Gathered, codec_of
from hvdvae.compression.feedback import Feedback, check_momentum
from hvdvae.errors import ConfigError
from hvdvae.seeding import stream
from hvdvae.strategies.messages import messages_of
from hvdvae.strategies.traffic import Traffic
from hvdvae.world import World


class Mean(Protocol):
    """One way of taking it."""

    traffic: Traffic
    """What this rank moved so far."""
    error: float
    """Size of what the last message left out, as a part of the vector's."""

    def mean_(self, vector: Tensor) -> None:
        """Replace a vector (P,) by the mean over ranks. Blocks; every rank must call it."""

    def keep(self) -> None:
        """The mean was used: what messages left out is remembered from now on. Local."""

    def memory(self) -> dict[str, Tensor]:
        """What a run needs to continue, by name; the same on all ranks after `settle`. Writable: no copies."""

    def settle(self) -> None:
        """Share what ranks remember equally, without compression. Blocks; every rank must call it."""


class PlainMean:
    """Uncompressed."""

    error = 0.0

    def __init__(self, world: World) -> None:
        """Nothing sent yet."""
        self._world, self.traffic = world, Traffic()

    def mean_(self, vector: Tensor) -> None:
        """As Mean's."""
        self._world.sum_(vector, "average").div_(self._world.size)
        self.traffic.ring(vector.nbytes, self._world.size)

    def keep(self) -> None:
        """Nothing is left out."""

    def memory(self) -> dict[str, Tensor]:
        """Nothing is remembered."""
        return {}

    def settle(self) -> None:
        """Nothing to share."""


class CompressedMean:
    """In messages of a codec."""

    def __init__(
        self,
        world: World,
        like: Tensor,
        shapes: list[tuple[int, ...]],
        compression: str,
        *,
        share: float | None,
        rank: int | None,
        momentum: float,
    ) -> None:
        """`like`: a vector (P,) as `mean_` will get, of tensors of these shapes; `momentum`: as Feedback has it.

        The rest as codec_of has it. Raises ConfigError.
        """
        if like.dtype != torch.float32:
            raise ConfigError(
                f"--compression {compression} works on float32 vectors, found {like.dtype}: use --compression none"
            )
        check_momentum(compression, momentum)
        self._world, self.traffic, self.error = world, Traffic(), 0.0
        self._codec = codec_of(compression, shapes, share=share, rank=rank)
        self._feedback = Feedback(like.numel(), compression, momentum) if self._codec.needs_feedback else None
        self._sent = torch.zeros(like.numel())
        self._calls = torch.zeros(1, dtype=torch.int64)
        """That were used; decides what is random."""
        self._said: Tensor | None = None
        """The vector of a mean that is not used yet, (P,)."""
        self._has_left_out = False
        self.recover()

    @property
    def remembers(self) -> bool:
        """Whether a message says what earlier ones left out."""
        return self._feedback is not None

    def recover(self) -> None:
        """Go on with the ranks that the World has now. Local."""
        if isinstance(self._codec, Gathered):
            self._messages = messages_of(self._codec, self._sent.numel(), self._world)

    def mean_(self, vector: Tensor) -> None:
        """As Mean's: of what all ranks' messages say. Those of a GPU are written on the host."""
        if vector.device.type != "cpu":
            host = vector.cpu()
            self.mean_(host)
            vector.copy_(host)
            return
        key = stream(_COMPRESSION, int(self._calls))
        # By the number that a step decides by.
        is_finite = bool(torch.isfinite(torch.dot(vector, vector)))
        whole = vector if self._feedback is None else self._feedback.compensate(vector)
        self._said, self._has_left_out = whole, False
        if isinstance(self._codec, Gathered):
            self._messages.say(whole, self._sent, stream(key, self._world.rank), is_finite=is_finite)
            self._leave_out(whole)
            self._messages.mean(vector, self.traffic)
        else:
            self._average(self._codec, whole, vector, key, is_finite=is_finite)

    def keep(self) -> None:
        """As Mean's."""
        # Here, so that ranks that have taken as many steps draw alike, also where one died between two of them.
        self._calls += 1
        self._said = None
        if self._feedback is not None:
            self._feedback.keep()

    def forget(self) -> None:
        """The mean was not used. Local."""
        self._said = None

    def catch_up(self) -> None:
        """Where others have used a mean that this rank did not come to: its message was in it. Local."""
        if self._said is not None:
            if not self._has_left_out:
                self._leave_out(self._said)
            self.keep()

    def memory(self) -> dict[str, Tensor]:
        """As Mean's."""
        remembered = self._feedback.memory() if self._feedback is not None else {}
        return {"calls": self._calls, **remembered, **self._codec.memory()}

    def settle(self) -> None:
        """As Mean's: the sum over ranks stays what it was."""
        if self._feedback is not None:
            for vector in self._feedback.memory().values():
                self._world.sum_(vector, "average of what is remembered").div_(self._world.size)
                self.traffic.ring(vector.nbytes, self._world.size)

    def _average(self, codec: Averaged, whole: Tensor, vector: Tensor, key: int, *, is_finite: bool) -> None:
        vector.copy_(whole)
        for part in codec.average(vector, self._sent, key):
            if not is_finite:
                part.fill_(torch.nan)
            self._world.sum_(part, "average of compressed vectors").div_(self._world.size)
            self.traffic.ring(part.nbytes, self._world.size)
        self._leave_out(whole)

    def _leave_out(self, whole: Tensor) -> None:
        size = float(torch.linalg.vector_norm(whole))
        left = self._feedback.remember(self._sent) if self._feedback is not None else whole - self._sent
        self.error = float(torch.linalg.vector_norm(left)) / size if size else 0.0
        self._has_left_out = True


def mean_over_ranks(
    world: World,
    like: Tensor,
    shapes: list[tuple[int, ...]],
    compression: str,
    *,
    share: float | None,
    rank: int | None,
    momentum: float,
) -> Mean:
    """The way that `compression` (none, or a codec) asks for. Raises ConfigError."""
    if compression == "none":
        return PlainMean(world)
    return CompressedMean(world, like, shapes, compression, share=share, rank=rank, momentum=momentum)


_COMPRESSION = 0xC0DE
"""Names the stream of random numbers."""
