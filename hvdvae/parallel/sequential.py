"""Any nn.Sequential as a chain of steps: one a layer, with what follows it, or begins the chain, without parameters.

What layers draw (dropout) is a step's own for each micro-batch, the same wherever the chain is cut, and not what the
unsplit model draws for the whole batch.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvdvae.batch import Batch
from hvdvae.errors import ConfigError
from hvdvae.parallel.stages import Payload
from hvdvae.seeding import seed_everything


class Layer(NamedTuple):
    """As stages.Step."""

    modules: tuple[str, ...]
    run: Callable[[Payload, slice], Payload]


class SequentialChain:
    """As stages.Chain."""

    default_cuts = (0,)

    def __init__(
        self, model: nn.Sequential, loss: Callable[[Tensor, Batch, float], Tensor | Mapping[str, Tensor]]
    ) -> None:
        """`loss`: of the model's output, the micro-batch and the epoch; its input is the batch's first tensor."""
        self._loss = loss
        self._seed = 0
        groups: list[list[str]] = [[]]
        has_parameters = False
        # Not named_children, which leaves out a layer that comes again.
        for name, layer in model._modules.items():
            assert layer is not None
            holds = next(layer.parameters(), None) is not None
            if holds and has_parameters:
                groups.append([])
            has_parameters = has_parameters or holds
            groups[-1].append(name)
        self.steps = [Layer(tuple(group), self._in_turn(model, number, group)) for number, group in enumerate(groups)]

    def begin(self, batch: Batch) -> None:
        """A new key for what steps draw, from torch's default generator."""
        self._seed = int(torch.randint(2**62, ()))

    def inputs(self, micro: Batch) -> Payload:
        """The first tensor, a copy: a first layer may work in place, and micro-batches are views of one batch."""
        if isinstance(micro, Tensor):
            return (micro.clone(),)
        return (next(iter(micro.values() if isinstance(micro, Mapping) else micro)).clone(),)

    def loss(self, outputs: Payload, micro: Batch, epoch: float) -> Tensor | Mapping[str, Tensor]:
        """The user's."""
        return self._loss(outputs[0], micro, epoch)

    def _in_turn(self, model: nn.Sequential, number: int, names: list[str]) -> Callable[[Payload, slice], Payload]:
        # Looked up when it runs: layers may have been split or replaced since.
        def run(payload: Payload, place: slice) -> Payload:
            x = payload[0]
            # Forked, so that all stages draw the next batch's key from where the last one's was drawn.
            with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
                seed_everything(x.device, self._seed, number, place.start)
                for name in names:
                    x = model.get_submodule(name)(x)
                    if not isinstance(x, Tensor):
                        raise ConfigError(
                            f"layer {name} of the model returns a {type(x).__name__}, and layers of stages return one "
                            "tensor: put it and those that take it in one module that does"
                        )
            return (x,)

        return run
