"""What a rank of a run keeps in memory: predicted from the model without its numbers.

The model is built of torch's fake tensors, split as it would be, and taken through a step (activations.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hvdvae.cli import assemble
from hvdvae.cli.activations import needs
from hvdvae.config import TrainConfig
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
    strategy: int
    """What a strategy keeps besides: averages between ranks, error feedback, buffers for messages."""
    activations: int
    """Kept for backward at most, of all micro-batches that are under way."""
    passing: int
    """What forward and backward of a micro-batch need beside it, for a moment."""
    batches: int
    """The examples that are trained on, and the next."""
    mapped: int
    """Of other ranks' vectors that this rank reads and writes in shared memory."""
    start: int
    """Before the first step at most, while the vector of parameters is made of the layers."""

    @property
    def total(self) -> int:
        """What its resident memory grows by."""
        state = self.parameters + self.gradients + self.optimizer + self.average + self.strategy + self.mapped
        return max(self.start, state + self.activations + self.passing + self.batches)


class Imagined(NamedTuple):
    """In the place of a World: a rank among so many, of which there is none."""

    rank: int
    size: int

    def sum_(self, tensor: Tensor, what: str = "") -> Tensor:
        """As World's, on a tensor without numbers."""
        return tensor


def footprints(config: TrainConfig, shape: Sequence[int], mesh: Mesh) -> list[Footprint]:
    """Of the first rank of each stage, which has the most of what is not even. Raises ConfigError.

    With --strategy ps of one process that trains, as workers do (server_footprint.py).
    """
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
    kept, passing = _activations(config, chain, model, mesh, stage, cuts, shape)
    if mesh.pp > 1:
        imagined: Any = Imagined(stage, mesh.pp)
        keep_stage(model, chain, cuts, Groups(mesh, imagined, imagined, imagined, imagined, imagined))
    batches = 2 * FLOAT * config.batch_size * config.accumulate * math.prod(shape)
    return _footprint(config, model, mesh, activations=kept, passing=passing, batches=batches)


def _footprint(config: TrainConfig, model: nn.Module, mesh: Mesh, **passes: int) -> Footprint:
    sizes = [parameter.numel() for parameter in model.parameters()]
    count, largest = sum(sizes), max(sizes)
    entries = ENTRIES[assemble.optimizer_name(config)] + (
        config.optimizer in ("sgd", "rmsprop") and config.momentum > 0
    )
    owners = mesh.dp if _splits_the_step(config) else 1
    weights, start = FLOAT * count, FLOAT * (count + largest)
    if config.weights == "bf16":
        weights = HALF * count + FLOAT * count // owners
        start = max(start, FLOAT * count + weights)
    return Footprint(
        parameters=weights,
        gradients=_gradients(config, mesh, count, largest),
        optimizer=FLOAT * entries * count // owners,
        average=FLOAT * count if config.ema else 0,
        strategy=FLOAT * _vectors_of_strategy(config) * count,
        mapped=_vectors_in_shared_memory(config) * FLOAT * count * (mesh.dp - 1) // mesh.dp,
        start=start,
        **passes,
    )


def _gradients(config: TrainConfig, mesh: Mesh, count: int, largest: int) -> int:
    if config.zero_stage == 1:
        adds_up = mesh.pp > 1 or config.accumulate > 1
        return FLOAT * (2 * count + adds_up * largest)
    # A slice, a bucket on its way, the one that fills meanwhile, and what autograd wrote.
    return FLOAT * (count // mesh.dp + 2 * largest) + (HALF * largest if config.weights == "bf16" else 0)


def _vectors_of_strategy(config: TrainConfig) -> int:
    """Of all parameters, in float32."""
    averages = {"local-sgd": 2, "diloco": 2 if config.outer_momentum == 0 else 3}.get(config.strategy, 0)
    # What was not sent, and what it becomes if the step is taken; in float64 where messages are rough.
    feedback = {"sign": 5, "powersgd": 5, "topk": 2, "randomk": 2}.get(config.compression, 0)
    return averages + feedback + (config.compression_momentum > 0) * 2


def _vectors_in_shared_memory(config: TrainConfig) -> int:
    return 2 if _splits_the_step(config) and config.engine in ("mpi", "auto") and config.zero_stage == 1 else 0


def _splits_the_step(config: TrainConfig) -> bool:
    """Whether a rank steps its slice alone, as ranks of one host do; who saves an allreduce's state sees all of it."""
    shares = config.strategy == "allreduce" and config.engine in ("mpi", "auto") and config.compression == "none"
    return shares or config.strategy == "sharded"


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
) -> tuple[int, int]:
    """Kept for backward at most, and for a moment beside it."""
    micros = assemble.micro_batches(config) if mesh.pp > 1 else 1
    batch = torch.empty(max(1, config.batch_size // micros), *shape)
    chain.begin(batch)
    ends = [*cuts[1:], len(chain.steps)]

    def forward(payload: Tensors, steps: slice) -> Tensors:
        with mixed_precision(config.precision, batch.device):
            for step in chain.steps[steps]:
                payload = step.run(payload, slice(0, len(batch)))
            # The loss belongs to the last step.
            return (chain.loss(payload, batch, 0.0)["loss"],) if steps.stop == len(chain.steps) else payload

    inputs = chain.inputs(batch)
    if stage:
        inputs = forward(inputs, slice(0, cuts[stage]))
    own = slice(cuts[stage], ends[stage])
    found = needs(model, inputs, batch, stage == 0, lambda payload: forward(payload, own))
    order = order_of(config.pipeline_schedule, stage, mesh.pp, micros * config.accumulate)
    under_way = max(sum(1 if kind == "forward" else -1 for kind, _ in order[: turn + 1]) for turn in range(len(order)))
    if config.recompute and mesh.pp > 1:
        return found.received * under_way + found.kept, found.passing
    return (found.received + found.kept) * under_way, found.passing
