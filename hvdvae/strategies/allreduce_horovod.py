"""`--strategy allreduce --engine horovod`: Horovod's DistributedOptimizer over the flat gradient.

Horovod sees one tensor instead of one a layer: one negotiation and one ring a step, begun when the whole gradient is
there. Its per-tensor hooks would begin earlier, but on CPU ranks its thread then takes the core from backward().
Horovod's optimizer serves the exchange; the step is the user's own optimizer's, fused over the same vector.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.errors import ConfigError
from hvdvae.strategies.shared_state import share_state
from hvdvae.strategies.strategy import Strategy
from hvdvae.world import World


class HorovodAllreduce(Strategy):
    """Synchronous SGD: every rank steps on the mean of all gradients, carried by Horovod (NCCL, MPI or Gloo)."""

    name = "allreduce"
    engine = "horovod"
    recovers = True

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        world: World,
        *,
        compression: str = "none",
        process_set: Any = None,
        **options: Any,
    ) -> None:
        """Start Horovod and give it the flat vector. Blocks; every rank must call it.

        `compression`: none, or fp16 on the wire. `process_set`: the horovod ProcessSet that holds this rank and whose
        ranks train together (default: all ranks). Sets that partition the ranks train several replicas at once.
        """
        self._hvd = world.horovod()
        self._process_set = process_set if process_set is not None else self._hvd.global_process_set
        if world.rank not in self.peers:
            raise ConfigError(
                f"process_set holds ranks {self.peers}, and this is rank {world.rank}: give each rank a set with it in"
            )
        # Sets of ranks would have to be made anew without the dead.
        self.recovers = process_set is None
        super().__init__(optimizer, model, world, **options)
        self._half = compression == "fp16"
        self._bytes = self.flat.gradient.numel() * (2 if self._half else self.flat.gradient.element_size())
        """Of the gradient on the wire."""
        self._compression = getattr(self._hvd.Compression, compression)
        self._wrap()

    def _wrap(self) -> None:
        self._vector = nn.Parameter(self.flat.parameters)
        self._horovod = self._hvd.DistributedOptimizer(
            torch.optim.SGD([self._vector], 0.0),
            named_parameters=[("hvdvae.gradient", self._vector)],
            compression=self._compression,
            op=self._hvd.Average,
            process_set=self._process_set,
        )

    def exchange(self, gradient: Tensor) -> None:
        """Horovod's allreduce (average), in place."""
        # A tensor of its own over the same storage: Horovod moves it elsewhere where it has decompressed a gradient.
        self._vector.grad = gradient.view(-1)
        if self._half:
            size = float(torch.linalg.vector_norm(gradient))
            left = float(torch.linalg.vector_norm(gradient - gradient.half()))
            self.moved.errors += left / size if size and math.isfinite(left) else 0.0
        with self.world.waiting("horovod allreduce of the gradient", among=self.peers):
            self._horovod.synchronize()
        if self._vector.grad.data_ptr() != gradient.data_ptr():
            gradient.copy_(self._vector.grad)
        self.moved.ring(self._bytes, self._process_set.size() or 1)
        self.moved.steps += 1

    def traffic(self) -> dict[str, float]:
        """As Strategy's; with fp16 also the mean size of what messages left out, as a part of the gradient's."""
        error = {"compression_error": self.moved.errors / max(self.moved.steps, 1)} if self._half else {}
        return {**self.moved.metrics(), **error}

    def recover(self) -> None:
        """As Strategy's: Horovod starts anew on those that are left."""
        super().recover()
        self._hvd = self.world.horovod()
        self._wrap()  # The old one still waits for what the dead never sent.

    def broadcast_bytes(self, data: Tensor) -> None:
        """Overwrite with the bytes of the process set's first rank."""
        if data.numel() and not self.world.joins:
            with self.world.waiting("horovod broadcast of the model", among=self.peers):
                self._hvd.broadcast_(data, self.peers[0], name="hvdvae.broadcast", process_set=self._process_set)

    def sum_(self, vector: Tensor) -> Tensor:
        """The sum over the process set."""
        if vector.numel():
            with self.world.waiting("horovod sum of buffers", among=self.peers):
                self._hvd.allreduce_(vector, name="hvdvae.sum", op=self._hvd.Sum, process_set=self._process_set)
        return vector

    @property
    def peers(self) -> list[int]:
        """Those of the process set."""
        return list(self._process_set.ranks or super().peers)


class HorovodAdasum(Strategy):
    """Adasum (Maleki et al. 2021, arXiv:2006.02924): ranks' updates are combined layer by layer by their angle.

    Its coefficients are one a layer, so Horovod gets the flat vector layer by layer. What is combined is the
    optimizer's update, not the gradient: clipping sees this rank's gradient, and only the verdict on a gradient that
    is not finite is made common first.
    """

    name = "allreduce"
    engine = "horovod"
    averages_gradients = False
    saves_average = True

    def __init__(self, optimizer: Optimizer, model: nn.Module, world: World, **options: Any) -> None:
        """Start Horovod. Blocks; every rank must call it. `world.size` must be a power of two."""
        self._hvd = world.horovod()
        super().__init__(optimizer, model, world, **options)

    def exchange(self, gradient: Tensor) -> None:
        """Gradients stay this rank's own; only a non-finite one is made known to all."""
        # By the number that `step` decides by: ranks that disagree would hang.
        bad = torch.tensor([0 if bool(torch.isfinite(torch.dot(gradient, gradient))) else 1])
        if int(self.world.max_(bad, "agreement on a finite gradient")):
            gradient.fill_(float("nan"))

    def update(self) -> None:
        """Take this rank's step from the common weights, then replace it by the Adasum of all ranks' steps."""
        start = self.flat.parameters.clone()
        self.step_inner()
        self.flat.parameters.sub_(start)
        with self.world.waiting("horovod adasum of the update"):
            # In one dimension: Horovod takes no tensor whose channels come last.
            handles = [
                self._hvd.allreduce_async_(
                    self.flat.parameters[place], name=f"hvdvae.adasum.{name}", op=self._hvd.Adasum
                )
                for name, place in self.flat.places().items()
            ]
            for handle in handles:
                self._hvd.synchronize(handle)
        self.flat.parameters.add_(start)

    @contextmanager
    def fetched(self, *, state: bool = False) -> Iterator[Tensor]:
        """As Strategy's; with `state`, every rank's optimizer goes on with the mean of all their states, for good."""
        if state:
            share_state(self.world, self.inner)
        with super().fetched(state=state) as rows:
            yield rows
