"""`--strategy sharded --zero-stage 2 --weights bf16`: as sharded_gradients.py, and no rank holds all float32 weights.

    float32 slice, stepped (P/N,)  --- rounded, allgather --->  bfloat16 weights (P,) on all ranks, as the model's

What autocast makes of float32 weights in every forward pass is all that a rank has of the others' slices: half of an
allgather's bytes, and the float32 ones (master weights; Micikevicius et al. 2018, arXiv:1710.03740) once in the world.
Gradients are summed in float32. Checkpoints hold the master weights, and load with any strategy.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.checkpoint import Piece
from hvdvae.errors import ConfigError
from hvdvae.strategies.overlap import overlap, within
from hvdvae.strategies.sharded_gradients import ShardedGradients
from hvdvae.world import World


class MasterWeights(ShardedGradients):
    """Synchronous SGD whose optimizer, gradients and float32 weights are split over the ranks."""

    precision = "bf16"

    def __init__(self, optimizer: Optimizer, model: nn.Module, world: World, *, engine: str, **options: Any) -> None:
        """As Sharded; the model's parameters are bfloat16 after it, so that it wants autocast.

        Raises ConfigError for parameters that are not float32, and for layers that keep statistics next to theirs.
        """
        _check_layers(model)
        super().__init__(optimizer, model, world, engine=engine, **options)
        flat, mine = self.flat, self._mine
        if flat.parameters.dtype != torch.float32:
            raise ConfigError(f"weights='bf16' (--weights) is for float32 models, found {flat.parameters.dtype}")
        self._master = flat.parameters[mine].clone()
        """(P/N,): what this rank steps."""
        for parameter in flat.tensors:
            parameter.grad = None
        flat.move_parameters(torch.empty_like(flat.parameters, dtype=torch.bfloat16))
        for group, part in zip(self._whole.param_groups, flat.group_slices, strict=True):
            group["params"][0].data = flat.parameters[part]
        for group, place in zip(self.inner.param_groups, self._places, strict=True):
            group["params"][0].data = self._master[within(place, mine)]

    def arithmetic(self) -> AbstractContextManager[None]:
        """As Strategy's: the precision of the weights."""
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    def master_weights(self) -> dict[str, Piece]:
        """As Strategy's; every rank must ask for them, in the order of names."""
        return {
            self.flat.names[number]: Piece(
                self.flat.shapes[number],
                torch.float32,
                partial(self._put_together, "the master weights", number, place, inner["params"][0].detach(), group),
            )
            for number, place, inner, group in self._parameters()
        }

    def load_master_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """As Strategy's: keeps what belongs to this rank's slice."""
        numbers, places = {name: n for n, name in enumerate(self.flat.names)}, self.flat.places()
        for name, tensor in weights:
            # Frozen ones are nobody's to step.
            shared = overlap(places[name], self._mine) if name in places else slice(0, 0)
            if shared.stop > shared.start:
                # In the order of the vector, which channels_last has otherwise.
                ordered = torch.empty(tensor.numel(), device=self._master.device)
                self.flat.view(ordered, numbers[name]).copy_(tensor)
                self._master[within(shared, self._mine)] = ordered[within(shared, places[name])]

    def update(self) -> None:
        """As Sharded's; what somebody has written into the model since the last step counts."""
        held, known = self.flat.parameters[self._mine], self._master.to(torch.bfloat16)
        if not torch.equal(held, known):
            written = held != known
            self._master[written] = held[written].float()
        super().update()

    def results(self) -> dict[str, Any]:
        """As ShardedGradients', and the bytes of the weights that this rank keeps."""
        return {**super().results(), "weight_bytes": self.flat.parameters.nbytes + self._master.nbytes}

    def _spread(self) -> None:
        self.flat.parameters[self._mine] = self._master.to(torch.bfloat16)
        # As bits: no carrier knows bfloat16, and nothing is summed.
        self._slices.gather_(self.flat.parameters.view(torch.int16))
        self._count(self.flat.parameters.nbytes)


def _check_layers(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        trained = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        if trained and any(buffer.is_floating_point() for buffer in layer.buffers(recurse=False)):
            raise ConfigError(
                f"weights='bf16' (--weights): layer {name!r} ({type(layer).__name__}) has statistics next to its "
                "weights, and both want to be float32: drop it (--batch-norm), or --weights bf16"
            )
