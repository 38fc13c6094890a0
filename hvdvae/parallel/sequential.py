"""Any nn.Sequential as a chain of steps: one a layer, with what follows it, or begins the chain, without parameters."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from hvdvae.batch import Batch
from hvdvae.parallel.stages import Payload


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
        groups: list[list[str]] = [[]]
        has_parameters = False
        for name, layer in model.named_children():
            holds = next(layer.parameters(), None) is not None
            if holds and has_parameters:
                groups.append([])
            has_parameters = has_parameters or holds
            groups[-1].append(name)
        self.steps = [Layer(tuple(group), _in_turn(model, group)) for group in groups]

    def begin(self, batch: Batch) -> None:
        """Nothing is drawn for a whole batch."""

    def inputs(self, micro: Batch) -> Payload:
        """The first tensor."""
        if isinstance(micro, Tensor):
            return (micro,)
        return (next(iter(micro.values() if isinstance(micro, Mapping) else micro)),)

    def loss(self, outputs: Payload, micro: Batch, epoch: float) -> Tensor | Mapping[str, Tensor]:
        """The user's."""
        return self._loss(outputs[0], micro, epoch)


def _in_turn(model: nn.Sequential, names: list[str]) -> Callable[[Payload, slice], Payload]:
    # Looked up when it runs: layers may have been split or replaced since.
    def run(payload: Payload, place: slice) -> Payload:
        x = payload[0]
        for name in names:
            x = model.get_submodule(name)(x)
        return (x,)

    return run
