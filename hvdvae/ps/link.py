"""Between a server and its workers: where pushes land, and how answers go out.

Shapes: P elements of this server's shard, F of the workers' float buffers (on the last server).
"""

from typing import Any

import torch
from torch import Tensor

from hvdvae.errors import RankLost
from hvdvae.flat_layout import Runs
from hvdvae.ps.channel import Channel
from hvdvae.ps.plan import Plan
from hvdvae.ps.protocol import STATE, TEXT, Answer, Header
from hvdvae.ps.wire import PullMessage, PushMessage, codec_for
from hvdvae.seeding import stream


class Link:
    """A server's, while it has no backup. `hear` and the three that take what follows a header block."""

    def __init__(
        self,
        channel: Channel,
        shard: slice,
        *,
        is_last: bool,
        buffers: int,
        plan: Plan | None = None,
        runs: Runs | None = None,
    ) -> None:
        """Lay out memory. `buffers`: F; `plan`: says which codec, if any, messages have.

        `runs`: what such messages say of the whole vector (default: all of it).
        """
        self.channel = channel
        self._start, self.length = shard.start, shard.stop - shard.start
        self._received: list[Tensor] = []
        """(P + F) of each worker: its own memory, or the buffer that pushes are received into."""
        self._pulled: list[Tensor | None] = []
        """Where each worker finds the weights, if it shares memory."""
        for worker in range(channel.workers):
            views = _vectors_of(channel, worker, shard, is_last=is_last)
            self._received.append(views[0] if views else torch.zeros(self.length + buffers, dtype=channel.dtype))
            self._pulled.append(views[1] if views else None)
        make = codec_for(plan) if plan is not None else None
        self._pushes: PushMessage | None = None
        self._pulls: list[PullMessage] = []
        """Of each worker, with a codec."""
        self.push_bytes: int = self._received[0].nbytes if self._received else 0
        """Of one push."""
        if make is not None:
            said = (runs or Runs([shard], shard.stop)).within(shard)
            self._pushes = PushMessage(make(said.count), self.length, buffers, 0.0, said)
            self._pulls = [PullMessage(make(said.count), self.length, said) for _ in range(channel.workers)]
            self.push_bytes = self._pushes.message.nbytes

    @property
    def speaks(self) -> bool:
        """Whether it is this server's to say what happens: the first one's, of several that all hear of it."""
        return self.channel.rank == self.channel.workers

    def hear(self) -> tuple[int, Header]:
        """The next request, and whose it is. Raises PeersDied."""
        worker, request = self.channel.receive()
        self.channel.seat.join(worker)
        return worker, request

    def text(self, worker: int, tag: int) -> Any:
        """The JSON record that came with a request."""
        return self.channel.receive_text(worker, tag)

    def vector(self, worker: int, into: Tensor) -> None:
        """A vector of the state that came with a request."""
        self.channel.receive_vector(worker, into, STATE)

    def pushed(self, worker: int) -> Tensor:
        """What a worker has pushed (P + F); stays so until the worker is answered, and may be overwritten."""
        if not self.channel.shares_memory(worker):
            self.channel.flush(worker)  # The buffer may still be on its way out, as an answer.
            if self._pushes is not None:
                self.channel.receive_vector(worker, self._pushes.message)
                self._pushes.read(self._received[worker])
            else:
                self.channel.receive_vector(worker, self._received[worker])
        return self._received[worker]

    def admit(self, worker: int) -> None:
        """A new worker takes this one's place, which shares no memory."""
        self._received[worker] = torch.zeros_like(self._received[worker])
        self._pulled[worker] = None
        if self._pulls:
            self._pulls[worker].is_known = False

    def answer(
        self, worker: int, header: Header, vector: Tensor | None, *, is_push: bool = False, takes: bool = True
    ) -> int:
        """Answer with a header, and weights (P,) if the worker wants them. Returns bytes of weights that travel.

        `is_push`: the answer to a push, which a codec may make short; `takes`: the worker computes with these weights.
        """
        if vector is not None and self._pulls:
            return self._answer_short(worker, header, vector, is_push=is_push, takes=takes)
        pulled = self._pulled[worker]
        if vector is not None and pulled is not None:
            pulled.copy_(vector)
        self.channel.seat.rise()
        self.channel.send(worker, header)
        if vector is not None and pulled is None:
            # From the buffer of this worker, whose push is done with: the weights may change while they travel.
            self.channel.flush(worker)
            self.channel.send_vector(worker, self._received[worker][: self.length].copy_(vector))
        return 0 if vector is None else vector.nbytes

    def held(self, worker: int) -> Tensor | None:
        """The weights (P,) that a worker has since its last answer, where a codec made them others than here."""
        return self._pulls[worker].held if self._pulls else None

    def _answer_short(self, worker: int, header: Header, vector: Tensor, *, is_push: bool, takes: bool) -> int:
        pull = self._pulls[worker]
        self.channel.flush(worker)
        if is_push and pull.is_known:
            header[Answer.SHORT] = 1
            # Not by worker: those that step together hold the same, bit for bit.
            sent = pull.write(vector, stream(self._start))
        else:
            sent = self._received[worker][: self.length].copy_(vector)
            if takes:
                pull.holds(vector)
        self.channel.send(worker, header)
        self.channel.send_vector(worker, sent)
        return sent.nbytes

    def send_text(self, worker: int, record: Any) -> None:
        """A JSON-able record after an answer."""
        self.channel.send_text(worker, record, TEXT)

    def send_state(self, worker: int, vector: Tensor) -> None:
        """A vector after an answer, which may be changed once this returns."""
        self.channel.send_vector(worker, vector, STATE)
        self.channel.flush(worker)

    def deaths(self) -> set[int]:
        """Ranks that are known to have died, as far as this server may act on it."""
        return self.channel.dead

    def lost_server(self, rank: int) -> bool:
        """Another server has died. Whether this one takes its place, and workers send again what was not answered.

        Raises RankLost where the job cannot go on without it.
        """
        raise RankLost(
            f"a parameter server has died (rank {rank}): continue from the last checkpoint with --resume; with "
            "--replicas 1 its backup would have gone on"
        )

    def lost_worker(self, worker: int) -> None:
        """A worker has died, and will not be waited for."""


def _vectors_of(channel: Channel, worker: int, shard: slice, *, is_last: bool) -> tuple[Tensor, Tensor] | None:
    """A worker's vectors as a server sees them: its slice of outgoing (the last's with buffers) and of incoming.

    None where they do not share memory.
    """
    if not channel.shares_memory(worker):
        return None
    outgoing, incoming = channel.vectors[worker]
    return outgoing[shard.start :] if is_last else outgoing[shard], incoming[shard]
