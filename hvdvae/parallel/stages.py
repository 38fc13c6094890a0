"""A model as stages: which of its steps each rank computes, and how they are cut.

A model comes as a chain of steps (`Chain`), each a function of the last one's result. A stage keeps the layers of its
own steps. In training it computes them alone (pipeline.py); in evaluation the model runs on all stages at once, as if
it were whole, and what one stage computes it tells the others.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hvdvae.batch import Batch, examples_of
from hvdvae.dtypes import DTYPES
from hvdvae.errors import ConfigError
from hvdvae.parallel.fill import filled
from hvdvae.parallel.mesh import Groups
from hvdvae.parallel.micro_batches import cut_points
from hvdvae.world import World

Payload = tuple[Tensor, ...]
"""What goes from one step to the next: floating-point tensors."""
ROUNDS = 3
"""Of measuring what a step costs; the least counts."""


class Step(Protocol):
    """A piece of a model."""

    @property
    def modules(self) -> Sequence[str]:
        """Names of the submodules that it computes, which no other does; the model's forward calls each as a whole."""

    @property
    def run(self) -> Callable[[Payload, slice], Payload]:
        """Of a micro-batch: the last step's result, and which examples of the batch they are."""


class Chain(Protocol):
    """A model as a chain."""

    @property
    def steps(self) -> Sequence[Step]:
        """One after the other."""

    @property
    def default_cuts(self) -> Sequence[int]:
        """First step of each stage, for as many stages as there are numbers."""

    def begin(self, batch: Batch) -> None:
        """A new batch, all of it: whoever draws noise draws that of all its examples at once. Local."""

    def inputs(self, micro: Batch) -> Payload:
        """What the first step gets of a micro-batch. Local."""

    def loss(self, outputs: Payload, micro: Batch, epoch: float) -> Tensor | Mapping[str, Tensor]:
        """As the trainer's: of the last step's result. Local."""


class Elsewhere(nn.Module):
    """A layer of another stage: in evaluation its result is heard of, in training nobody asks for it."""

    def __init__(self, name: str, owner: int, stages: World) -> None:
        super().__init__()
        self._name, self._owner, self._stages = name, owner, stages

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        """What the owner's layer gives. Blocks; every stage must call it."""
        if self.training:
            raise RuntimeError(f"{self._name} is a layer of stage {self._owner}: train by Pipeline.run")
        return _told(None, self._owner, self._stages, x)


def keep_stage(model: nn.Module, chain: Chain, cuts: Sequence[int], groups: Groups) -> slice:
    """Keep of the model the layers of this rank's stage. Local; every rank does it. Mutates the model.

    `cuts`: first step of each stage. Returns which steps are this rank's. Raises ConfigError where stages would share
    parameters, as nobody would add up their gradients.
    """
    stage, ends = groups.stages.rank, [*cuts[1:], len(chain.steps)]
    _check_untied(model, chain, cuts)
    for owner, (start, stop) in enumerate(zip(cuts, ends, strict=True)):
        for name in (name for step in chain.steps[start:stop] for name in step.modules):
            for called, layer in _called(model, name):
                if owner == stage:
                    layer.register_forward_hook(_tell(called, owner, groups.stages))
                else:
                    parent, _, last = called.rpartition(".")
                    setattr(model.get_submodule(parent), last, Elsewhere(called, owner, groups.stages))
    return slice(cuts[stage], ends[stage])


def _check_untied(model: nn.Module, chain: Chain, cuts: Sequence[int]) -> None:
    holders: dict[Tensor, tuple[int, str]] = {}
    for number, step in enumerate(chain.steps):
        stage = sum(cut <= number for cut in cuts) - 1
        for name in step.modules:
            layer = model.get_submodule(name)
            for key, tensor in (*layer.named_parameters(name), *layer.named_buffers(name)):
                other, called = holders.setdefault(tensor, (stage, key))
                if other != stage:
                    raise ConfigError(
                        f"{called} and {key} are one tensor, and stages {other} and {stage} would hold it: cut the "
                        "model where both are on one side (--cuts), or give each a tensor of its own"
                    )


def choose_cuts(text: str, model: nn.Module, chain: Chain, stages: int, batch: Batch, world: World) -> list[int]:
    """First step of each stage, the same on all ranks. Blocks; every rank must call it.

    `text`: auto (the chain's own, where it has so many stages, else measured), measured (the dearest stage as cheap as
    can be, by the time that rank 0's steps take on a micro-batch like `batch`), or steps at which to cut, as 3,5.
    Raises ConfigError.
    """
    given = given_cuts(text, chain, stages)
    if given is not None:
        return given
    # What rank 0 alone draws meanwhile must not part its generator from the others'.
    with torch.random.fork_rng([]):
        costs = costs_of(model, chain, batch) if world.is_first else []
    world.barrier("rank 0 measures the steps of the model", patient=True)
    found: list[int] = world.gather_objects(cut_points(costs, stages) if costs else [], "cuts of the model")[0]
    return found


def given_cuts(text: str, chain: Chain, stages: int) -> list[int] | None:
    """The same where nothing is to be measured; else None. Pure. Raises ConfigError."""
    count = len(chain.steps)
    if stages > count:
        raise ConfigError(
            f"--pipeline {stages}: this model has {count} steps to cut between; use at most {count} stages"
        )
    if text == "auto" and len(chain.default_cuts) == stages:
        return list(chain.default_cuts)
    if text in ("auto", "measured"):
        return None
    try:
        cuts = [0, *map(int, text.split(","))]
    except ValueError:
        cuts = []
    if len(cuts) != stages or sorted(set(cuts)) != cuts or cuts[-1] >= count:
        raise ConfigError(
            f"--cuts is {text!r}, expected auto, measured, or {stages - 1} rising numbers from 1 to {count - 1}: the "
            f"first steps of stages 1 to {stages - 1} of {count} steps"
        )
    return cuts


def costs_of(model: nn.Module, chain: Chain, batch: Batch) -> list[float]:
    """Seconds of each step of a whole model, forward and backward, on a batch. Local.

    A model without numbers (on torch's meta device) has them for one step at a time.
    """
    costs = [float("inf")] * len(chain.steps)
    everything = slice(0, examples_of(batch))
    model.eval()  # BatchNorm's statistics are not to see this.
    chain.begin(batch)
    payload = chain.inputs(batch)
    for place, step in enumerate(chain.steps):
        received = payload
        layers = [layer for name in step.modules for layer in model.get_submodule(name).modules()]
        with filled(layers, payload[0].device):
            for _ in range(ROUNDS):
                finish(payload[0].device)
                # A copy for each round: a step may work in place.
                inputs = tuple(tensor.detach().clone().requires_grad_(place > 0) for tensor in received)
                begin = time.perf_counter()
                payload = step.run(inputs, everything)
                trained = [tensor for tensor in payload if tensor.requires_grad]
                torch.autograd.backward(trained, [torch.ones_like(tensor) for tensor in trained])
                finish(payload[0].device)
                costs[place] = min(costs[place], time.perf_counter() - begin)
    model.train()
    model.zero_grad()
    return costs


def finish(device: torch.device) -> None:
    """Return once a GPU has done what it was asked for, so that clocks tell of work. Local."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _called(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """`name`, or what is below it where it is a mere container, if it holds parameters or buffers."""
    module = model.get_submodule(name)
    if type(module).forward is nn.Module.forward:
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            raise ConfigError(
                f"{name} holds parameters, and is never called: put them into a module that is, for stages"
            )
        for child, _ in module.named_children():
            yield from _called(model, f"{name}.{child}")
    elif [*module.parameters(), *module.buffers()]:
        yield name, module


def _tell(name: str, owner: int, stages: World) -> Callable[[nn.Module, Any, Any], Tensor | None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
        if module.training:
            return None
        if not isinstance(output, Tensor):
            raise ConfigError(
                f"{name} returns a {type(output).__name__}, and layers of stages return one tensor: put it in a module "
                "that does"
            )
        return _told(output, owner, stages, output)

    return hook


def _told(mine: Tensor | None, owner: int, stages: World, like: Tensor) -> Tensor:
    """The owner's tensor, on all stages. Blocks; every stage must call it."""
    form = stages.gather_objects(None if mine is None else [list(mine.shape), str(mine.dtype)], "form of a result")
    shape, dtype = form[owner]
    data = torch.empty(shape, dtype=DTYPES[dtype]) if mine is None else mine.detach().cpu()
    data = data.contiguous()
    stages.broadcast_(data.reshape(-1).view(torch.uint8), owner, "result of another stage")
    return data.to(like.device) if mine is None else mine
