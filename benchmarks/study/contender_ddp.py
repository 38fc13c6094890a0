"""PyTorch's DistributedDataParallel over Gloo on CPUs and NCCL on GPUs, with its own communication hooks.

As its documentation advises: gradients are views of the buckets, and the graph is said to be static.
"""

import gc
import warnings
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


class Ddp:
    """`hook`: none, fp16 or powersgd (rank 4, from step 10 on; Vogels et al. 2019)."""

    steps_together = True

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, hook: str, *, meeting: Path, rank: int, size: int
    ) -> None:
        """Blocks; every rank must build it. `meeting`: a file that does not exist yet, where all ranks see it."""
        self._device = next(model.parameters()).device
        distributed.init_process_group(
            "nccl" if self._device.type == "cuda" else "gloo",
            init_method=meeting.absolute().as_uri(),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=120),
        )
        self.rank, self.size = rank, size
        self._optimizer, self._mine = optimizer, 0
        # PowerSGD's hook changes its work between steps, which a static graph must not. Over Gloo it needs all
        # gradients in one bucket: several ask for their sums in an order that differs from rank to rank, and Gloo
        # aborts.
        powersgd = hook == "powersgd"
        self.model: Any = DistributedDataParallel(
            model,
            gradient_as_bucket_view=True,
            static_graph=not powersgd,
            bucket_cap_mb=10_000 if powersgd else None,
        )
        if hook == "fp16":
            self.model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif hook == "powersgd":
            state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=10)
            self.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        # A convolution of one channel has strides of which one says nothing; DDP warns of it on every rank.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")

    def prepare(self) -> None:
        """As Contender's: DDP has sent rank 0's weights when it was built."""
        distributed.barrier()

    def zero_grad(self) -> None:
        """As Contender's."""
        self._optimizer.zero_grad()

    def exchange(self) -> None:
        """It is part of the backward pass."""

    def update(self) -> None:
        """As Contender's."""
        self._optimizer.step()
        self._mine += 1

    def steps_done(self) -> int:
        """As Contender's."""
        return self._mine * self.size

    def any(self, flag: bool) -> bool:
        """As Contender's."""
        votes = torch.tensor([float(flag)], device=self._device)
        distributed.all_reduce(votes)
        return bool(votes > 0)

    def look(self) -> AbstractContextManager[None]:
        """As Contender's: all ranks hold the same."""
        return nullcontext()

    def end(self) -> dict[str, Any]:
        """As Contender's."""
        # DDP must be gone before its process group: the other way round its destructor holds the interpreter's
        # lock while it waits for a thread of Gloo's that wants it, now and then for ever.
        del self.model
        gc.collect()
        distributed.destroy_process_group()
        return {}
