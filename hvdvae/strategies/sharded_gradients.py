"""`--strategy sharded --zero-stage 2`: as sharded.py, and no rank ever holds all gradients.

    backward, last layers first      bucket of gradients --- sum ---> the ranks whose slices it meets
                                     and let go, before the next layers compute theirs

ZeRO stage 2 (Rajbhandari et al. 2020, arXiv:1910.02054): of gradients a rank keeps its slice (P/N,) and a bucket.

Buckets are sent in one order on all ranks, whatever the order in which autograd finishes them: a parameter that a rank
does not use in a pass holds its bucket, and those after it, back until the step.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.errors import ConfigError
from hvdvae.strategies.sharded import Sharded
from hvdvae.strategies.sliced_step import overlap, within
from hvdvae.strategies.slices import HorovodSlices, MessageSlices, OneSlice, Slices
from hvdvae.world import World
from hvdvae.world.collectives import slice_of

BUCKET_BYTES = 25 * 2**20
"""As PyTorch's DistributedDataParallel has them; one parameter may be larger."""
MESSAGE = 2**20
"""Elements."""


class _Bucket:
    """Neighbours in the parameter vector whose gradients are sent together."""

    def __init__(self, place: slice) -> None:
        self.place = place
        self.members: dict[int, slice] = {}
        """Where each parameter stands in the bucket, by its number."""
        self.calls = 0
        """Gradients that came since it was last sent."""
        self.sum: Tensor | None = None


class ShardedGradients(Sharded):
    """Synchronous SGD whose optimizer and gradients are split over the ranks."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, world: World, *, engine: str, **options: Any) -> None:
        """As Sharded."""
        super().__init__(optimizer, model, world, engine=engine, **options)
        self._hvd = world.horovod() if engine == "horovod" and world.size > 1 else None
        self._mine, self.part = self.part, slice(None)
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[int, _Bucket] = {}
        self._make_buckets()
        self._turn = 0
        """Buckets that were sent since the last step, of all passes."""
        for number, parameter in enumerate(self.flat.tensors):
            parameter.register_post_accumulate_grad_hook(lambda p, number=number: self._take(number, p))  # type: ignore[no-untyped-call]

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
        """As Strategy's."""
        super().zero_grad(set_to_none)
        self.flat.gradient.zero_()
        self._turn = 0
        for bucket in self._buckets:
            bucket.calls, bucket.sum = 0, None

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
        while self._turn < len(self._buckets) * self.backward_passes_per_step:
            self._send(self._next())
        self.flat.gradient.div_(self.world.size * self.backward_passes_per_step)
        self.moved.steps += 1
        self._exchanged = True

    def _make_buckets(self) -> None:
        """From the end of the vector, since backward begins at the last layers."""
        room = 0
        for number, place in reversed(list(enumerate(self.flat.places().values()))):
            size = (place.stop - place.start) * self.flat.gradient.element_size()
            if not self._buckets or size > room:
                self._buckets.append(_Bucket(slice(place.stop, place.stop)))
                room = BUCKET_BYTES
            room -= size
            bucket = self._buckets[-1]
            bucket.place = slice(place.start, bucket.place.stop)
            bucket.members[number] = place
            self._bucket_of[number] = bucket
        for bucket in self._buckets:
            start = bucket.place.start
            bucket.members = {n: slice(p.start - start, p.stop - start) for n, p in bucket.members.items()}

    def _take(self, number: int, parameter: Tensor) -> None:
        """A gradient is there: into its bucket, and the buckets that are full on their way. Blocks."""
        bucket = self._bucket_of[number]
        assert parameter.grad is not None
        if self._turn >= len(self._buckets) * self.backward_passes_per_step:
            raise ConfigError(
                f"more than {self.backward_passes_per_step} backward passes before a step: tell "
                "backward_passes_per_step how many there are"
            )
        gradient = parameter.grad.detach()
        parameter.grad = None
        gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
        is_plain = gradient.is_contiguous() and parameter.is_contiguous()
        if bucket.sum is None and len(bucket.members) == 1 and is_plain:
            bucket.sum = gradient.view(-1).to(self.flat.gradient.dtype)  # No copy of what is alone.
        else:
            self.flat.view(self._room(bucket)[bucket.members[number]], number).add_(gradient)
        bucket.calls += 1
        while self._turn < len(self._buckets) * self.backward_passes_per_step:
            following = self._next()
            if following.calls < len(following.members):
                break
            self._send(following)

    def _next(self) -> _Bucket:
        return self._buckets[self._turn % len(self._buckets)]

    def _room(self, bucket: _Bucket) -> Tensor:
        if bucket.sum is None:
            length = bucket.place.stop - bucket.place.start
            bucket.sum = torch.zeros(length, dtype=self.flat.gradient.dtype, device=self.flat.gradient.device)
        return bucket.sum

    def _send(self, bucket: _Bucket) -> None:
        """Add its sum over ranks to the slices that it meets, and let it go. Blocks; every rank must call it."""
        vector, world, start = self._room(bucket), self.world, bucket.place.start
        bucket.calls, bucket.sum = max(0, bucket.calls - len(bucket.members)), None
        self._turn += 1
        if world.size > 1:
            vector = self._sum_to_owners(vector, start)
            self.moved.ring(vector.nbytes // (1 if self._hvd is not None else 2), world.size)
        mine = overlap(bucket.place, self._mine)
        if mine.stop > mine.start:
            to = slice(mine.start - self._mine.start, mine.stop - self._mine.start)
            self.flat.gradient[to].add_(vector[mine.start - start : mine.stop - start])

    def _sum_to_owners(self, vector: Tensor, start: int) -> Tensor:
        if self._hvd is not None:
            with self.world.waiting("horovod allreduce of a bucket"):
                found: Tensor = self._hvd.allreduce_(vector, name="hvdvae.bucket", op=self._hvd.Sum)
            return found
        from mpi4py import MPI

        host = vector.cpu()
        whole = slice(start, start + len(vector))
        with self.world.waiting("sum of a bucket of gradients"):
            for rank in range(self.world.size):
                piece = overlap(slice_of(self.flat.parameters.numel(), rank, self.world.size), whole)
                # In pieces: MPI needs room of its own for what it sums.
                for begin in range(piece.start, piece.stop, MESSAGE):
                    part = host[begin - start : min(begin + MESSAGE, piece.stop) - start].numpy()
                    is_owner = rank == self.world.rank
                    self.world.comm.Reduce(MPI.IN_PLACE if is_owner else part, part if is_owner else None, root=rank)
        return host.to(vector.device)
