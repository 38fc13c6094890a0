"""Validation by the loss of training: its mean over all examples of a DataLoader, the same number on all ranks."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from hvdvae.batch import examples_of
from hvdvae.dataloader import check_loader, order_of, to_device, with_cuts
from hvdvae.errors import ConfigError
from hvdvae.seeding import seed_everything, stream
from hvdvae.stepper import TERMS, Loss, values_of

if TYPE_CHECKING:
    from hvdvae.world import World

_VALIDATION = 105
"""Tells this stream of the seed from others."""


class MeanLoss:
    """Each example counts once, whatever the number of ranks: batch i is evaluated by rank i modulo ranks."""

    def __init__(
        self, model: nn.Module, loss: Loss | None, loader: DataLoader[Any], world: "World", *, seed: int
    ) -> None:
        """`world`: the ranks that share the work. Raises ConfigError for a loader whose examples have no numbers."""
        check_loader(loader)
        if loss is None or loader.batch_size is None:
            missing = "a loss" if loss is None else "a batch_size (it has a batch_sampler)"
            raise ConfigError(f"validate is a DataLoader without {missing}: give a function that validates instead")
        self._model, self._loss, self._world, self._seed = model, loss, world, seed
        # A sampler that cuts over ranks leaves examples to others, or has them twice.
        if hasattr(loader.sampler, "num_replicas"):
            order: list[Any] = list(range(len(loader.dataset)))  # type: ignore[arg-type]
        else:
            order = order_of(loader, stream(_VALIDATION, seed), 0)
        batches = [order[first : first + loader.batch_size] for first in range(0, len(order), loader.batch_size)]
        self._mine = list(range(world.rank, len(batches), world.size))
        self._loader = with_cuts(loader, [batches[number] for number in self._mine])

    def __call__(self, epoch: float) -> dict[str, float]:
        """Means of `loss`, and of `rate` and `distortion` where the loss tells them. Blocks; every rank must call it.

        Noise is that of the batch's number, so that it is the same in every epoch and at every number of ranks.
        """
        device = self._world.device
        sums = torch.zeros(1 + len(TERMS), dtype=torch.float64)
        for number, batch in zip(self._mine, self._loader, strict=True):
            seed_everything(device, _VALIDATION, self._seed, number)
            values = values_of(self._loss(self._model, to_device(batch, device), epoch))
            count = examples_of(batch)
            means = [float(values[name]) if name in values else 0.0 for name in TERMS]
            sums += count * torch.tensor([1.0, *means], dtype=torch.float64)
        self._world.sum_(sums, "sum of the validation's losses")
        loss, rate, distortion = (sums[1:] / sums[0]).tolist()
        return {"loss": loss, **({"rate": rate, "distortion": distortion} if rate or distortion else {})}
