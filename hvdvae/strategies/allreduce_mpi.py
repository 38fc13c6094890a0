"""`--strategy allreduce --engine mpi`: one allreduce of the flat gradient and one fused optimizer step.

No background thread: the rank that computes keeps its core. On CPU ranks this is the faster engine. Ranks of several
hosts average by one MPI_Allreduce, those of one host in shared memory (world/shared_memory.py), where they also split
the step (allreduce_shared.py) unless they may have to go on without one that has died. Vectors on a GPU are staged
through host memory, since not every MPI is CUDA-aware; there NCCL (`--engine horovod`) is faster.
"""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.strategies.strategy import Strategy
from hvdvae.world import World


class MpiAllreduce(Strategy):
    """Synchronous SGD: every rank steps on the mean of all gradients."""

    name = "allreduce"
    engine = "mpi"
    recovers = True

    def __init__(self, optimizer: Optimizer, model: nn.Module, world: World, **options: Any) -> None:
        """As Strategy; moves the gradient vector into shared memory where all ranks are on one host."""
        super().__init__(optimizer, model, world, **options)
        self._share_memory()

    def _share_memory(self) -> None:
        self._shared = self.world.shared_vectors(self.flat.parameters)
        if self._shared is not None:
            self.flat.move_gradient(self._shared.mine)
            self.follow_gradient()

    def recover(self) -> None:
        """As Strategy's: memory is shared anew, without the dead."""
        super().recover()
        self._share_memory()

    def exchange(self, gradient: Tensor) -> None:
        """The mean over ranks, in place; the same bits on all."""
        if self._shared is not None:
            with self.world.waiting("allreduce of the gradient in shared memory"):
                self._shared.mean_()
        else:
            self.world.sum_(gradient, "allreduce of the gradient").div_(self.world.size)
        self.moved.ring(gradient.nbytes, self.world.size)
        self.moved.steps += 1

    def traffic(self) -> dict[str, float]:
        """As Strategy's."""
        return self.moved.metrics()
