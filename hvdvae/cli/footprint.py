"""What a rank of a run keeps in memory: predicted from the model without its numbers.

The model is built of torch's fake tensors, split as it would be, and run once to see what autograd keeps for backward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from hvdvae.cli import assemble
from hvdvae.config import TrainConfig
from hvdvae.errors import ConfigError
from hvdvae.parallel.mesh import Groups, Mesh
from hvdvae.parallel.micro_batches import cut_points, order_of
from hvdvae.parallel.stages import given_cuts, keep_stage
from hvdvae.parallel.tensor import split_layers
from hvdvae.stepper import mixed_precision
from hvdvae.vae import VAE
from hvdvae.vae.chain import Tensors, VaeChain

ENTRIES = {"adam": 2, "adamw": 2, "rmsprop": 1, "adagrad": 1, "sgd": 0}
"""Numbers of an optimizer's state for each parameter, without momentum of sgd and rmsprop."""
FLOAT, HALF = 4, 2
"""Bytes: gradients and state are float32 whatever --precision says, and weights but for --weights bf16."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank."""

    parameters: int
    gradients: int
    """autograd's own, which a backward pass writes, and the vector that is exchanged; where passes add up, also the
    largest of one pass."""
    optimizer: int
    average: int
    """--ema."""
    activations: int
    """Kept for backward at most, of all micro-batches that are under way."""
    mapped: int
    """Of other ranks' vectors that this rank reads and writes in shared memory."""
    start: int
    """Before the first step at most, while the vector of parameters is made of the layers."""

    @property
    def total(self) -> int:
        """What its resident memory grows by."""
        own = self.parameters + self.gradients + self.optimizer + self.average + self.activations
        return max(self.start, own + self.mapped)


class Imagined(NamedTuple):
    """In the place of a World: a rank among so many, of which there is none."""

    rank: int
    size: int

    def sum_(self, tensor: Tensor, what: str = "") -> Tensor:
        """As World's, on a tensor without numbers."""
        return tensor


def footprints(config: TrainConfig, shape: Sequence[int], mesh: Mesh) -> list[Footprint]:
    """Of the first rank of each stage, which has the most of what is not even. Raises ConfigError."""
    if config.strategy not in ("local", "allreduce", "sharded"):
        raise ConfigError(
            f"hvdvae memory knows --strategy local, allreduce and sharded, found {config.strategy}: ask for one of them"
        )
    return [_of_stage(config, shape, mesh, stage) for stage in range(mesh.pp)]


def _of_stage(config: TrainConfig, shape: Sequence[int], mesh: Mesh, stage: int) -> Footprint:
    model = assemble.model(config, tuple(shape), torch.device("meta"))
    if config.weights == "bf16":
        model.to(torch.bfloat16)
    with FakeTensorMode():
        _move_to_cpu(model)
        return _of_model(config, model, shape, mesh, stage)


def _move_to_cpu(model: nn.Module) -> None:
    """Give a model of the meta device fake tensors of a CPU's, which know autocast. Mutates it."""
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            setattr(module, name, nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake)


def _of_model(config: TrainConfig, model: VAE, shape: Sequence[int], mesh: Mesh, stage: int) -> Footprint:
    chain = VaeChain(model, assemble.objective(config), config.samples)
    if mesh.tp > 1:
        split_layers(model, model.chains, Imagined(0, mesh.tp))  # type: ignore[arg-type]
    cuts = _cuts(config, model, chain, mesh.pp)
    kept = _activations(config, chain, model, mesh, stage, cuts, shape)
    if mesh.pp > 1:
        imagined: Any = Imagined(stage, mesh.pp)
        keep_stage(model, chain, cuts, Groups(mesh, imagined, imagined, imagined, imagined, imagined))
    return _footprint(config, model, mesh, kept)


def _footprint(config: TrainConfig, model: nn.Module, mesh: Mesh, activations: int) -> Footprint:
    sizes = [parameter.numel() for parameter in model.parameters()]
    count, largest = sum(sizes), max(sizes)
    entries = ENTRIES[config.optimizer] + (config.optimizer in ("sgd", "rmsprop") and config.momentum > 0)
    owners = mesh.dp if config.strategy == "sharded" else 1
    weights, start = FLOAT * count, FLOAT * (count + largest)
    if config.weights == "bf16":
        weights = HALF * count + FLOAT * count // owners
        start = max(start, FLOAT * count + weights)
    return Footprint(
        parameters=weights,
        gradients=_gradients(config, mesh, count, largest),
        optimizer=FLOAT * entries * count // owners,
        average=FLOAT * count if config.ema else 0,
        activations=activations,
        mapped=_vectors_in_shared_memory(config) * FLOAT * count * (mesh.dp - 1) // mesh.dp,
        start=start,
    )


def _gradients(config: TrainConfig, mesh: Mesh, count: int, largest: int) -> int:
    if config.zero_stage == 1:
        adds_up = mesh.pp > 1 or config.accumulate > 1
        return FLOAT * (2 * count + adds_up * largest)
    # A slice, what is on its way, and what autograd wrote.
    return FLOAT * (count // mesh.dp + largest) + (HALF * largest if config.weights == "bf16" else 0)


def _vectors_in_shared_memory(config: TrainConfig) -> int:
    if config.engine == "horovod" or config.zero_stage == 2:
        return 0
    return {"local": 0, "allreduce": 1, "sharded": 2}[config.strategy]


def _cuts(config: TrainConfig, model: nn.Module, chain: VaeChain, stages: int) -> list[int]:
    if stages == 1:
        return [0]
    given = given_cuts(config.cuts, chain, stages)
    if given is not None:
        return given
    # Time cannot be told from here; that of a layer follows its weights.
    sizes = [
        sum(p.numel() for name in step.modules for p in model.get_submodule(name).parameters()) for step in chain.steps
    ]
    return cut_points([float(size) for size in sizes], stages)


def _activations(
    config: TrainConfig,
    chain: VaeChain,
    model: nn.Module,
    mesh: Mesh,
    stage: int,
    cuts: list[int],
    shape: Sequence[int],
) -> int:
    micros = (config.micro_batches or assemble.MICRO_BATCHES) if mesh.pp > 1 else 1
    batch = torch.empty(max(1, config.batch_size // micros), *shape)
    chain.begin(batch)
    payload: Tensors = chain.inputs(batch)
    ends = [*cuts[1:], len(chain.steps)]
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    total = received = 0
    for number, step in enumerate(chain.steps):
        inputs = payload
        if number == cuts[stage]:
            received = sum(tensor.nbytes for tensor in inputs) if stage else 0

        def run(step: Any = step, inputs: Tensors = inputs, is_last: bool = number + 1 == len(chain.steps)) -> Any:
            with mixed_precision(config.precision, batch.device):
                outputs = step.run(inputs, slice(0, len(batch)))
                # The loss belongs to the last step.
                return outputs, chain.loss(outputs, batch, 0.0) if is_last else None

        saved, (payload, _) = _saved(run, parameters)
        total += saved if cuts[stage] <= number < ends[stage] else 0
    order = order_of(config.pipeline_schedule, stage, mesh.pp, micros * config.accumulate)
    under_way = max(sum(1 if kind == "forward" else -1 for kind, _ in order[: turn + 1]) for turn in range(len(order)))
    if config.recompute and mesh.pp > 1:
        return received * under_way + total
    return (received + total) * under_way


def _saved(run: Callable[[], Any], parameters: set[int]) -> tuple[int, Any]:
    """Bytes that autograd keeps for backward, each storage once, and what `run` returns."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            seen[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(seen.values()), result
