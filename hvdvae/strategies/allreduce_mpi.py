"""`--strategy allreduce --engine mpi`: one MPI_Allreduce of the flat gradient and one fused optimizer step.

No background thread: the rank that computes keeps its core. On CPU ranks this is the faster engine. Vectors on a GPU
are staged through host memory, since not every MPI is CUDA-aware; there NCCL (`--engine horovod`) is faster.
"""

from torch import Tensor

from hvdvae.strategies.strategy import Strategy


class MpiAllreduce(Strategy):
    """Synchronous SGD: every rank steps on the mean of all gradients."""

    name = "allreduce"
    engine = "mpi"

    def exchange(self, gradient: Tensor) -> None:
        """Sum by MPI, then divide. 4 P bytes in and out of each rank, twice (Rabenseifner or ring, MPI's choice)."""
        self.world.sum_(gradient, "allreduce of the gradient").div_(self.world.size)
