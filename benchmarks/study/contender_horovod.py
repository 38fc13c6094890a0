"""Raw Horovod, as its guide for PyTorch has it: a hook a tensor, weights broadcast from rank 0."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class RawHorovod:
    """`compression`: none or fp16."""

    steps_together = True

    def __init__(self, model: nn.Module, optimizer: Optimizer, compression: str) -> None:
        """Blocks; every rank must build it."""
        import horovod.torch as hvd

        hvd.init()
        self._hvd = hvd
        self.model, self.rank, self.size = model, hvd.rank(), hvd.size()
        self._optimizer = hvd.DistributedOptimizer(
            optimizer,
            named_parameters=model.named_parameters(),
            compression=hvd.Compression.fp16 if compression == "fp16" else hvd.Compression.none,
        )
        self._mine = 0

    def prepare(self) -> None:
        """As Contender's."""
        self._hvd.broadcast_parameters(self.model.state_dict(), root_rank=0)
        self.any(False)

    def zero_grad(self) -> None:
        """As Contender's."""
        self._optimizer.zero_grad()

    def exchange(self) -> None:
        """What is left of it after the backward pass."""
        self._optimizer.synchronize()

    def update(self) -> None:
        """As Contender's."""
        with self._optimizer.skip_synchronize():
            self._optimizer.step()
        self._mine += 1

    def steps_done(self) -> int:
        """As Contender's."""
        return int(self._mine * self.size)

    def any(self, flag: bool) -> bool:
        """As Contender's."""
        return bool(self._hvd.allreduce(torch.tensor([float(flag)]), name="any", op=self._hvd.Sum) > 0)

    def look(self) -> AbstractContextManager[None]:
        """As Contender's: all ranks hold the same."""
        return nullcontext()

    def end(self) -> dict[str, Any]:
        """As Contender's."""
        self._hvd.shutdown()
        return {}
