"""`--strategy sharded --zero-stage 2`: as sharded.py, and no rank ever holds all gradients.

    backward, last layers first      bucket of gradients --- sum ---> the ranks whose slices it meets
                                     and let go, while the next layers compute theirs

ZeRO stage 2 (Rajbhandari et al. 2020, arXiv:1910.02054): of gradients a rank keeps its slice (P/N,) and some buckets.

In which order buckets are sent, and what makes ranks send the same: buckets.py. Nothing blocks in backward
(bucket_sums.py), but for a moment where too much is under way. What stands in `.grad` then: sent_gradient.py.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.errors import ConfigError, WorldError
from hvdvae.strategies.bucket_sums import HorovodSums, MessageSums, OwnSums, Sum, Sums, patiently
from hvdvae.strategies.buckets import Bucket, Buckets
from hvdvae.strategies.gradient_hooks import call_after, call_before
from hvdvae.strategies.overlap import overlap, within
from hvdvae.strategies.sent_gradient import SentGradient
from hvdvae.strategies.sharded import Sharded
from hvdvae.strategies.slices import HorovodSlices, MessageSlices, OneSlice, Slices
from hvdvae.world import World

BUCKET_BYTES = 25 * 2**20
"""As PyTorch's DistributedDataParallel has them; one parameter may be larger."""
PATIENCE, IMPATIENCE = 1.0, 0.005
"""Seconds that a rank waits during backward, with more than a bucket under way: at first, and after many waits in vain.

Half as many after each: the others may wait for this rank elsewhere, in a sum of SyncBatchNorm's.
"""
_STEPS, _DROPS = 1, 2
"""What a rank agrees on with others: to use gradients, or to drop them."""


class ShardedGradients(Sharded):
    """Synchronous SGD whose optimizer and gradients are split over the ranks."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, world: World, *, engine: str, **options: Any) -> None:
        """As Sharded."""
        super().__init__(optimizer, model, world, engine=engine, **options)
        self._mine, self.part = self.part, slice(None)
        self._sums: Sums = OwnSums()
        if world.size > 1:
            self._sums = HorovodSums(world) if engine == "horovod" else MessageSums(world, self.flat.parameters.numel())
        limit = BUCKET_BYTES // self.flat.gradient.element_size()
        self._buckets = Buckets([*self.flat.places().values()], limit)
        self._filling: dict[Bucket, Tensor] = {}
        """Sums of what has arrived for buckets that are not sent yet."""
        self._under_way: deque[tuple[Bucket, Sum, int]] = deque()
        """Sums, and the bytes that this rank holds for them."""
        self._patience = PATIENCE
        self._is_new = False
        """Whether the gradient that this rank keeps has something of the coming step."""
        self._markers: dict[int, SentGradient] = {}
        """What stands in `.grad` of the parameters whose gradients have arrived since the last step."""
        self._computing: set[int] = set()
        """Those of them that have none there, since autograd is about to add to it."""
        call_before(self.flat.tensors, self, ShardedGradients._make_way)
        call_after(self.flat.tensors, self, ShardedGradients._take)

    def synchronize(self) -> None:
        """Refused: no rank has a whole gradient to show. Raises ConfigError."""
        raise ConfigError(
            "synchronize() and GradScaler need whole gradients, which --zero-stage 2 does not keep: use "
            "--zero-stage 1, or --precision bf16"
        )

    def squared_norm(self, gradient: Tensor) -> float:
        """As Sharded's, of the slice."""
        pieces = [overlap(place, self._mine) for place in self.own]
        start = self._mine.start
        mine = [gradient[piece.start - start : piece.stop - start] for piece in pieces]
        squares = sum(float(torch.dot(piece, piece)) for piece in mine)
        if self._poison is not None:
            squares += float(self._poison)
            self._poison = None
        return self._slices.sum(squares)

    def results(self) -> dict[str, Any]:
        """As Sharded's, and the bytes of the gradients that this rank keeps."""
        return {**super().results(), "gradient_bytes": self.flat.gradient.nbytes}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As Strategy's. Where gradients have arrived since the last step, it blocks, and every rank must call it."""
        if self._markers or self._buckets.holds:
            self._drop()
            self._end_dropped()
        super().zero_grad(set_to_none)

    def _carrier(self, engine: str) -> Slices:
        # Not in shared memory: whole vectors of gradients would stand there.
        if self.world.size == 1:
            return OneSlice()
        return HorovodSlices(self.world) if engine == "horovod" else MessageSlices(self.world)

    def _take_gradient(self) -> None:
        start, stop = self.part.start, self.part.stop
        own = torch.zeros(stop - start, dtype=self.flat.parameters.dtype, device=self.world.device)
        self.flat.keep_gradient(own)
        for group, place in zip(self.inner.param_groups, self._places, strict=True):
            group["params"][0].grad = own[within(place, self.part)]

    def _exchange_once(self) -> None:
        if self._exchanged:
            return
        self._take_what_was_set()
        frozen = (number for number, tensor in enumerate(self.flat.tensors) if not tensor.requires_grad)
        self.flat.frozen = [number for number in frozen if not self._has_come(number)]
        if self._buckets.holds:
            self._end_dropped()
        for bucket in self._buckets.missing(self._agree(_STEPS, self._buckets.wanted())):
            self._start(bucket)
        self._receive_all()
        if not self._is_new:
            self.flat.gradient.zero_()
        self.flat.gradient.div_(self.world.size * self.mean_passes())
        self._begin_anew()
        self.moved.steps += 1
        self._exchanged = True

    def _begin_anew(self) -> None:
        self._buckets.begin_round()
        self._is_new = False
        for number in self._markers:
            self.flat.tensors[number].grad = None
        self._markers.clear()
        self._computing.clear()

    def _make_way(self, number: int) -> None:
        """Autograd is about to add to a `.grad`: not to what stands there for one that was sent."""
        marker = self._markers.get(number)
        if marker is None:
            return
        if self._is_gone(number):
            self._follow_user()
            return
        self._check(number)
        self.flat.tensors[number].grad = None
        self._computing.add(number)

    def _take(self, number: int, parameter: Tensor) -> None:
        """A gradient is there: into its bucket, and the buckets that are due on their way."""
        self._computing.discard(number)
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad, None
        self._add(number, gradient, is_ours=gradient.grad_fn is None)
        if number not in self._markers:
            self._markers[number] = SentGradient.in_place_of(self.flat.tensors[number], self.flat.names[number])
        parameter.grad = self._markers[number]
        for bucket in self._buckets.due():
            self._start(bucket)
        self._receive()
        self._limit()

    def _limit(self) -> None:
        """Wait a moment where much is under way."""
        while sum(nbytes for _, _, nbytes in self._under_way) > BUCKET_BYTES:
            if not patiently(self._under_way[0][1].is_done, self._patience):
                self._patience = max(IMPATIENCE, self._patience / 2)
                return
            self._receive()

    def _add(self, number: int, gradient: Tensor, *, is_ours: bool) -> None:
        bucket = self._buckets.of(number)
        gradient = gradient.detach()
        gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
        is_plain = gradient.is_contiguous() and self.flat.tensors[number].is_contiguous()
        if is_ours and is_plain and bucket not in self._filling and len(bucket.members) == 1:
            self._filling[bucket] = gradient.view(-1).to(self.flat.gradient.dtype)  # No copy of what is alone.
        else:
            self.flat.view(self._room(bucket)[bucket.members[number]], number).add_(gradient)
        bucket.arrived.add(number)

    def _room(self, bucket: Bucket) -> Tensor:
        if bucket not in self._filling:
            self._filling[bucket] = self._nothing(bucket)
        return self._filling[bucket]

    def _nothing(self, bucket: Bucket) -> Tensor:
        like = self.flat.gradient
        return torch.zeros(bucket.place.stop - bucket.place.start, dtype=like.dtype, device=like.device)

    def _start(self, bucket: Bucket, *, is_empty: bool = False) -> None:
        """Send what it has, and let it go."""
        filled = None if is_empty else self._filling.pop(bucket, None)
        vector = self._nothing(bucket) if filled is None else filled
        self.moved.ring(vector.nbytes * self._sums.halves // 2, self.world.size)
        found = self._sums.start(vector, bucket.place.start, bucket.sent)
        self._under_way.append((bucket, found, vector.nbytes))

    def _receive(self) -> None:
        """Take in what has come. Local."""
        while self._under_way and self._under_way[0][1].is_done():
            bucket, found, _ = self._under_way.popleft()
            self._keep(bucket, found.result())

    def _receive_all(self) -> None:
        """Take in all that is under way. Blocks; every rank must call it, and have started the same."""
        with self.world.waiting("sum of a bucket of gradients"):
            while self._under_way:
                bucket, found, _ = self._under_way.popleft()
                self._keep(bucket, found.result())

    def _keep(self, bucket: Bucket, vector: Tensor) -> None:
        """Add this rank's slice of a sum to its gradient."""
        if not self._is_new:
            self.flat.gradient.zero_()
            self._is_new = True
        mine, start = overlap(bucket.place, self._mine), bucket.place.start
        if mine.stop > mine.start:
            self.flat.gradient[within(mine, self._mine)].add_(vector[mine.start - start : mine.stop - start])

    def _agree(self, what: int, wanted: list[int]) -> list[int]:
        """How often each bucket is sent: the most of all ranks. Blocks; every rank must call it."""
        if self.world.size == 1:
            return wanted
        found = torch.tensor([what, -what, *wanted])
        first, last, *agreed = self.world.max_(found, "agreement on gradients").tolist()
        if first != -last:
            raise WorldError(
                "some ranks call step() and others zero_grad() on gradients that --zero-stage 2 has sent during "
                "backward: drop them on all ranks, or on none"
            )
        return agreed

    def _drop(self) -> None:
        """Forget what has arrived on this rank since the last step; sums that are under way go on. Local."""
        self._buckets.drop()
        self._buckets.holds = True
        self._filling.clear()
        for number, marker in self._markers.items():
            if self.flat.tensors[number].grad is marker:
                self.flat.tensors[number].grad = None
        self._markers.clear()
        self._computing.clear()

    def _end_dropped(self) -> None:
        """Let all ranks have sent the same, and forget it. Blocks; every rank must call it."""
        agreed = self._agree(_DROPS, [bucket.sent for bucket in self._buckets])
        for bucket in self._buckets.missing(agreed, is_empty=True):
            self._start(bucket, is_empty=True)
        self._receive_all()
        self._is_new = False
        self._buckets.begin_round()

    def _has_come(self, number: int) -> bool:
        """Whether this parameter has had a gradient since the last step."""
        return number in self._markers or number in self._buckets.of(number).arrived

    def _is_gone(self, number: int) -> bool:
        """Whether the user has taken a gradient away that was sent."""
        found, marker = self.flat.tensors[number].grad, self._markers[number]
        return (found is None and number not in self._computing) or (found is marker and marker.is_dropped)

    def _check(self, number: int) -> None:
        """Raises ConfigError where something stands in the place of a gradient that was sent."""
        found = self.flat.tensors[number].grad
        if found is not self._markers[number] and found is not None:
            raise ConfigError(
                f".grad of {self.flat.names[number]!r} was replaced after backward: under --zero-stage 2 its gradient "
                "has been sent by then. Set it before backward or without one, or use --zero-stage 1"
            )

    def _follow_user(self) -> None:
        """Gradients were cleared by somebody else (model.zero_grad(), p.grad = None): all, or none, are dropped."""
        left = next((number for number in self._markers if not self._is_gone(number)), None)
        if left is not None:
            gone = next(number for number in self._markers if self._is_gone(number))
            raise ConfigError(
                f".grad of {self.flat.names[gone]!r} was cleared after backward, and that of {self.flat.names[left]!r} "
                "was not: under --zero-stage 2 both have been sent by then, so clear all of them "
                "(optimizer.zero_grad()), or use --zero-stage 1"
            )
        self._drop()

    def _take_what_was_set(self) -> None:
        """Take gradients that somebody has set by hand, and follow what somebody has cleared."""
        if any(self._is_gone(number) for number in self._markers):
            self._follow_user()
        for number, parameter in enumerate(self.flat.tensors):
            found = parameter.grad
            if number in self._markers:
                self._check(number)
            elif found is not None:
                parameter.grad = None
                self._add(number, found, is_ours=False)
