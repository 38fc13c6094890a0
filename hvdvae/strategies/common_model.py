"""What ranks that train together hold alike: the model of the first of them, and means of the statistics in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hvdvae.strategies.saved_optimizer import SavedOptimizer
from hvdvae.world import World


class CommonModel(SavedOptimizer):
    """A strategy's model, on all ranks."""

    world: World
    """Ranks that hold the same of the model."""

    @property
    def peers(self) -> list[int]:
        """Ranks of `world` that train together with this one, itself among them."""
        return list(range(self.world.size))

    def broadcast_model(self) -> None:
        """Overwrite all that the model holds with rank 0's, frozen parameters too. Blocks; every rank must call it."""
        for tensor in (self.flat.parameters, self.flat.buffers, *self.flat.rest):
            # As bytes: whatever the dtype.
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self.broadcast_bytes(data)
            tensor.detach().copy_(data.view(tensor.dtype).view(tensor.shape))
        self.flat.publish()

    def broadcast_bytes(self, data: Tensor) -> None:
        """Overwrite bytes (n,) uint8, on the host, with the first rank's. Blocks; every rank must call it."""
        self.world.broadcast_(data, what="broadcast of the model")

    def sum_(self, vector: Tensor) -> Tensor:
        """Replace a vector by its sum over the ranks that train together. Blocks; every rank must call it."""
        return self.world.sum_(vector, "sum of buffers")

    @contextmanager
    def fetched(self, *, state: bool = False) -> Iterator[Tensor]:
        """Inside, the model holds what is to be evaluated or saved; after, what this rank trains on.

        Float buffers (BatchNorm statistics) are the mean over ranks; yields each rank's own, (size, F). `state`:
        `state_dict` is wanted too. Blocks; every rank must enter it where `synchronous`, else it is one rank's affair.
        """
        self.flat.take_back()
        own = self.flat.buffers.clone()
        rows = torch.zeros(self.world.size, own.numel(), dtype=own.dtype)
        rows[self.world.rank] = own
        self.sum_(rows)
        self.sum_(self.flat.buffers).div_(len(self.peers))
        try:
            yield rows
        finally:
            self.flat.buffers.copy_(own)
