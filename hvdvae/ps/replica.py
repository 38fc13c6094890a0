"""A server and its backup: two of the same machine, which hear the same in the same order.

The primary tells its backup all that it hears, before it answers; the backup does the same with it, and answers nobody.
Where the primary dies, its workers send what was not answered again, to the backup, which knows by their numbers what
it has done already.

On the channel's communicator, besides what ps/protocol.py says:

    tag                     direction          payload                                    dtype
    TOLD                    primary -> backup  worker, then the header that it sent;      float64
                                               or worker, then BURY: it has died,
                            or LOST: what should follow, does not
    TEXT, OPTIONS, VECTOR,  primary -> backup  what came with that header, as it came     as there
    STATE
    CONFIRM                 backup -> primary  one for each of these, once it is held:    float64 (1)
                                               the signal that the backup got, or 0

LOST: the worker died before the primary had all of its request.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdvae.ps.channel import Channel, PeersDied
from hvdvae.ps.link import Link
from hvdvae.ps.protocol import CONFIRM, STATE, TOLD, VECTOR, Header, Kind
from hvdvae.signals import Caught


class Primary(Link):
    """The link of a server that has a backup."""

    def __init__(
        self, channel: Channel, shard: slice, *, is_last: bool, buffers: int, backup: int, flag: Caught
    ) -> None:
        """`backup`: its rank; `flag`: what signal this process got, and from now on what its backup did. Mutated."""
        super().__init__(channel, shard, is_last=is_last, buffers=buffers)
        self._backup: int | None = backup
        self._flag = flag
        self._unconfirmed = 0
        self._own = [torch.empty_like(push) for push in self._received]

    def hear(self) -> tuple[int, Header]:
        """As Link's, and told."""
        worker, request = super().hear()
        self._tell(worker, request)
        return worker, request

    def text(self, worker: int, tag: int) -> Any:
        """As Link's, and told."""
        with self._telling_of_loss(worker):
            record = super().text(worker, tag)
        if self._backup is not None:
            self.channel.send_text(self._backup, record, tag)
            self._unconfirmed += 1
        return record

    def vector(self, worker: int, into: Tensor) -> None:
        """As Link's, and told."""
        with self._telling_of_loss(worker):
            super().vector(worker, into)
        self._tell_vector(into, STATE)

    def pushed(self, worker: int) -> Tensor:
        """As Link's, and told. A copy: should the server die, the worker sends again what it has, unchanged."""
        with self._telling_of_loss(worker):
            push = self._own[worker].copy_(super().pushed(worker))
        self._tell_vector(push, VECTOR)
        return push

    def answer(
        self, worker: int, header: Header, vector: Tensor | None, *, is_push: bool = False, takes: bool = True
    ) -> int:
        """As Link's, once the backup holds all that led to it. Blocks for that."""
        while self._backup is not None and self._unconfirmed:
            try:
                _, (signal,) = self.channel.receive(self._backup, CONFIRM)
                self._flag.number = max(self._flag.number, int(signal))
                self._unconfirmed -= 1
            except PeersDied:
                self._go_on_alone()
        return super().answer(worker, header, vector, is_push=is_push, takes=takes)

    def lost_server(self, rank: int) -> bool:
        """Its backup: go on without. Any other is that server's backup's affair."""
        if rank == self._backup:
            self._go_on_alone()
        return False

    def lost_worker(self, worker: int) -> None:
        """The backup has to forget it at the same point."""
        self._tell(worker, np.array([Kind.BURY], dtype=np.float64))

    @contextmanager
    def _telling_of_loss(self, worker: int) -> Iterator[None]:
        try:
            yield
        except PeersDied:
            self._tell(worker, np.array([Kind.LOST], dtype=np.float64))
            raise

    def _tell(self, worker: int, request: Header) -> None:
        if self._backup is not None:
            self.channel.send(self._backup, np.concatenate([[worker], request]), TOLD)
            self._unconfirmed += 1

    def _tell_vector(self, vector: Tensor, tag: int) -> None:
        if self._backup is not None:
            self.channel.send_vector(self._backup, vector, tag)
            self._unconfirmed += 1
            self.channel.flush(self._backup)

    def _go_on_alone(self) -> None:
        sys.stderr.write(f"hvdvae: the backup of a parameter server has died (rank {self._backup}); it goes on alone\n")
        self._backup = None


class Backup(Link):
    """The link of a server that follows a primary, until that dies; a Link to the workers from then on."""

    def __init__(
        self, channel: Channel, shard: slice, *, is_last: bool, buffers: int, primary: int, flag: Caught
    ) -> None:
        """`primary`: its rank; `flag`: what signal this process got. Pushes are kept here, not in workers' memory."""
        super().__init__(channel, shard, is_last=is_last, buffers=buffers)
        self._primary, self._flag = primary, flag
        self._leads = False
        self._turned_to_me: set[int] = set()
        """Workers that have sent their requests again since it took over: before that, nobody listens."""
        self._held = [torch.empty_like(push) for push in self._received]

    @property
    def speaks(self) -> bool:
        """Whether it has taken over."""
        return self._leads

    def hear(self) -> tuple[int, Header]:
        """What the primary heard."""
        if self._leads:
            worker, request = super().hear()
            self._turned_to_me.add(worker)
            return worker, request
        _, told = self.channel.receive(self._primary, TOLD)
        self._confirm()
        return int(told[0]), told[1:]

    def text(self, worker: int, tag: int) -> Any:
        """What the primary got."""
        if self._leads:
            return super().text(worker, tag)
        self._await(tag)
        record = self.channel.receive_text(self._primary, tag)
        self._confirm()
        return record

    def vector(self, worker: int, into: Tensor) -> None:
        """What the primary got."""
        if self._leads:
            super().vector(worker, into)
        else:
            self._take(into, STATE)

    def pushed(self, worker: int) -> Tensor:
        """What the primary got."""
        if self._leads:
            return super().pushed(worker)
        self._take(self._held[worker], VECTOR)
        return self._held[worker]

    def answer(
        self, worker: int, header: Header, vector: Tensor | None, *, is_push: bool = False, takes: bool = True
    ) -> int:
        """The primary does, while it lives; a worker that has not come yet will ask again."""
        if worker in self._turned_to_me:
            return super().answer(worker, header, vector, is_push=is_push, takes=takes)
        return 0 if vector is None else vector.nbytes

    def send_text(self, worker: int, record: Any) -> None:
        """After an answer, if there was one."""
        if worker in self._turned_to_me:
            super().send_text(worker, record)

    def send_state(self, worker: int, vector: Tensor) -> None:
        """After an answer, if there was one."""
        if worker in self._turned_to_me:
            super().send_state(worker, vector)

    def deaths(self) -> set[int]:
        """While it follows, the primary tells when a worker is to be forgotten."""
        return self.channel.dead if self._leads else self.channel.dead & {self._primary}

    def lost_server(self, rank: int) -> bool:
        """Its primary: take over. Any other is that server's backup's affair."""
        if rank == self._primary:
            self._leads = True
            sys.stderr.write(
                f"hvdvae: a parameter server has died (rank {rank}); its backup (rank {self.channel.rank}) goes on\n"
            )

        return rank == self._primary

    def _take(self, into: Tensor, tag: int) -> None:
        self._await(tag)
        self.channel.receive_vector(self._primary, into, tag)
        self._confirm()

    def _await(self, tag: int) -> None:
        if self.channel.next_tag(self._primary) != tag:
            worker, _ = self.hear()
            raise PeersDied({worker})

    def _confirm(self) -> None:
        self.channel.send(self._primary, np.array([self._flag.number], np.float64), CONFIRM)
