"""Everything that a training run can be told.

Each field is a flag (`--batch-size`) and a key of the YAML file (`batch_size`).
The docstring under a field is its help. What a field may hold, and which go together: config_check.py.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from hvdvae.config_check import check, without_leftovers
from hvdvae.config_check import flag as flag
from hvdvae.config_named import idle_options, refuse_idle

Likelihood = Literal["bernoulli", "gaussian", "discretized-logistic"]
Binarization = Literal["dynamic", "static", "none"]
LIKELIHOODS: tuple[str, ...] = get_args(Likelihood)
"""Here, since data checks them and models have them, and neither knows the other."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data."""

    data: str = "digits"
    """digits (embedded), mnist, fashion-mnist, or a path: IDX (gz or not), .npy, .npz, .h5, a folder of images."""
    validation: int | None = None
    """Examples held out of the training set for validation, where the data brings none [10%, at most 5000]."""
    external_storage: bool = False
    """Follow an HDF5 file whose numbers lie in other files (external storage): it may name any file of this machine."""
    binarization: Binarization | None = None
    """dynamic draws pixels anew for every minibatch (the IWAE protocol), static once, none takes values as they are
    [dynamic for 8-bit images with --likelihood bernoulli; none for floats, and with the other likelihoods]."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model."""

    model: Literal["mlp", "mlp2", "conv"] = "mlp"
    """mlp and mlp2: one and two stochastic layers as in Burda et al. 2016. conv: stride-2 convolutions."""
    hidden: list[int] | None = None
    """Units of the hidden layers [mlp 200 200; mlp2 200 200 100 100; conv channels 32 64]."""
    latent: list[int] | None = None
    """Dimensions of the stochastic layers, input side first [mlp 50; mlp2 100 50; conv 20]."""
    activation: Literal["tanh", "relu"] | None = None
    """Nonlinearity [mlp, mlp2 tanh; conv relu]."""
    batch_norm: bool = False
    """BatchNorm after the convolutions of conv."""
    likelihood: Likelihood = "bernoulli"
    """p(x|z): bernoulli, gaussian with a learned width, or discretized-logistic (256 values)."""
    sigma: float | None = None
    """Fixed standard deviation of --likelihood gaussian, data in [0, 1] [learned for each dimension]."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Objective."""

    objective: Literal["elbo", "iwae"] = "elbo"
    """elbo = -(distortion + beta rate), or the importance-weighted bound of --samples samples. The best epoch is that
    with the best bound in validation for iwae; else with the best plain ELBO, whatever --beta and --free-bits."""
    samples: int = 1
    """Samples of z an example in training (the k of IWAE)."""
    beta: float = 1.0
    """Weight of the rate."""
    beta_warmup: float = 0.0
    """Epochs over which beta rises from 0."""
    free_bits: float = 0.0
    """Nats a latent dimension that the rate is not pushed below (Kingma et al. 2016)."""


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions:
    """Optimization."""

    epochs: int = 20
    """Passes over the training set."""
    batch_size: int = 128
    """Examples a rank and backward pass; a step uses batch_size x ranks x accumulate."""
    accumulate: int = 1
    """Backward passes a step; their gradients are averaged."""
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop", "adagrad"] | None = None
    """Rule of the update [adam; adamw with --strategy diloco]."""
    lr: float = 1e-3
    """Learning rate, before --lr-scaling."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Multiply the learning rate by the number of ranks, or by its square root."""
    warmup: float = 0.0
    """Epochs over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """After the warm-up: constant, cosine to 0 at the last epoch, or times --gamma every --step-epochs."""
    step_epochs: float = 10.0
    """Epochs between drops of --schedule step."""
    gamma: float = 0.1
    """Factor of a drop of --schedule step."""
    momentum: float = 0.0
    """Momentum of sgd and rmsprop."""
    eps: float = 1e-8
    """Epsilon of adam, adamw, rmsprop and adagrad (Burda et al. use 1e-4)."""
    weight_decay: float = 0.0
    """Weight decay (L2; decoupled for adamw)."""
    clip_norm: float | None = None
    """Clip the mean gradient at this global norm [no clipping]."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, with which it is evaluated [0: none]."""
    skip_limit: int = 50
    """Stop after so many steps were skipped because a loss or gradient was not finite."""


@dataclass(frozen=True, kw_only=True)
class StrategyOptions:
    """Parallelism."""

    strategy: Literal["local", "allreduce", "sharded", "local-sgd", "diloco", "ps"] = "allreduce"
    """local: one process. allreduce: synchronous SGD, every rank steps on the mean gradient. sharded: the same, and
    every rank keeps the optimizer's state of its share of the weights (ZeRO stage 1). local-sgd: ranks step by
    themselves and average their weights now and then. diloco: with an outer optimizer. ps: parameter servers."""
    engine: Literal["horovod", "mpi", "auto"] | None = None
    """What carries the mean of allreduce and sharded; auto picks and says why [horovod; mpi with --compression other
    than fp16]."""
    compression: Literal["none", "fp16", "bf16", "int8", "sign", "topk", "randomk", "powersgd"] = "none"
    """What travels, gradients or (local-sgd, diloco) differences of weights. fp16 with allreduce and engine horovod is
    Horovod's own; all others are carried by MPI."""
    compression_share: float | None = None
    """Of the elements, that topk and randomk send [0.01]."""
    compression_rank: int | None = None
    """Of powersgd's matrices [2]."""
    compression_momentum: float = 0.0
    """Momentum correction of topk and randomk (Lin et al. 2018); with --optimizer sgd without momentum of its own."""
    sync_every: int | None = None
    """Steps between two averages [local-sgd 16; diloco 64]."""
    adaptive_sync: bool = False
    """Average more often as the loss falls, beginning with --sync-every (local-sgd, diloco; Wang and Joshi 2019)."""
    group_size: int = 1
    """Ranks that average gradients at every step, and with others every --sync-every (local-sgd, diloco); 0: those of
    a host."""
    outer_lr: float | None = None
    """Learning rate of diloco's outer optimizer [0.7]."""
    outer_momentum: float | None = None
    """Nesterov momentum of diloco's outer optimizer [0.9]."""
    zero_stage: Literal[1, 2] = 1
    """What ranks share with sharded: 1, the optimizer's state; 2, gradients too, which are sent during backward."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """What a rank has of all weights; bf16 (sharded, --zero-stage 2, --precision bf16): float32 of its share alone."""
    tensor: int = 1
    """Ranks that share each layer, by its neurons or channels; the others train copies (allreduce, sharded)."""
    pipeline: int = 1
    """Ranks that share the model layer by layer, as stages of a pipeline; the others train copies (allreduce,
    sharded)."""
    micro_batches: int | None = None
    """Parts of a rank's batch that flow through the stages of --pipeline one after the other [4; 1 with --free-bits and
    --batch-norm, which look at all of a batch]."""
    pipeline_schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """Order of a stage's work: backward as soon as it can be, or after all forward."""
    recompute: bool = False
    """Compute activations of a stage once more in backward instead of keeping them."""
    cuts: str = "auto"
    """Where stages begin: auto (encoder and decoder; more stages: measured), measured (balanced by the time that layers
    take), or steps to cut at, as 3,5."""
    mesh: str | None = None
    """dp=D,pp=S,tp=T: D copies of the model, each over S stages of T ranks, as --pipeline S --tensor T [one rank a
    copy]."""
    reduce_op: Literal["average", "adasum"] = "average"
    """How gradients are combined; adasum needs engine horovod and a power of two of ranks."""
    sync_batch_norm: bool = False
    """BatchNorm statistics over the batches of all ranks."""
    replace_workers: bool = False
    """Start a new rank where one died (ps, allreduce; mpirun --with-ft ulfm)."""
    deadline: float = 300.0
    """Seconds that a rank waits for others before it says for whom, and ends the job."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Parameter servers (--strategy ps)."""

    servers: int = 1
    """Ranks that serve, the last ones; the others train."""
    consistency: Literal["asp", "ssp", "bsp"] = "asp"
    """Who waits: nobody; who is more than --staleness steps ahead; everybody, for one mean update a step."""
    staleness: int | None = None
    """Steps that a worker may be ahead of the slowest (ssp); periods, with --push-every."""
    backup_workers: int = 0
    """Slowest workers of a step that it does not wait for (bsp)."""
    replicas: int = 0
    """Backups of each server, 0 or 1: ranks that take over where it dies (mpirun --with-ft ulfm)."""
    rule: Literal["plain", "staleness-lr", "dcasgd", "dcasgd-a", "easgd"] = "plain"
    """How a push changes the weights: the optimizer's step; at lr / staleness; delay compensated; elastic averaging."""
    dc_strength: float | None = None
    """Lambda of dcasgd [0.04] and dcasgd-a [2]."""
    elasticity: float | None = None
    """Alpha of easgd [0.9 / workers]."""
    push_every: int = 1
    """Steps of a worker between two pushes; it steps by itself meanwhile. The end of a run cuts a period short."""
    fetch_every: int | None = None
    """Steps of a worker between two pulls, a multiple of --push-every [the same]."""
    prefetch: bool = False
    """Compute the next step while push and pull of the last are under way: one more step of staleness."""


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Machine."""

    device: str = "auto"
    """auto (a GPU by local rank where there is one), cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """CPU threads a rank [the cores this rank has]."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward (autocast; fp16 with loss scaling). Sums stay fp32, weights as --weights."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = False
    """Memory format of convolutions."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Run."""

    seed: int = 0
    """Seed of weights, data order and noise."""
    out: str | None = None
    """Folder of results [runs/DATA-MODEL-STRATEGY-DATE]."""
    resume: bool = False
    """Continue from the newest good checkpoint in --out, with its configuration; start anew where there is none."""
    overwrite: bool = False
    """Delete the results of an earlier run in --out."""
    validate_every: int = 1
    """Epochs between validations."""
    checkpoint_every: int = 1
    """Epochs between checkpoints; the last epoch always writes one."""
    keep: int = 3
    """Checkpoints kept, besides the best."""
    nll_samples: int | None = None
    """Importance samples an example of the test NLL at the end [mlp, mlp2 5000; conv 500]; 0: no test."""
    pictures_every: int = 10
    """Epochs between sample and reconstruction grids in TensorBoard; 0: only at the end."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    RunOptions,
    MachineOptions,
    ServerOptions,
    StrategyOptions,
    OptimizationOptions,
    ObjectiveOptions,
    ModelOptions,
    DataOptions,
):
    """One training run, resolved. Make it by the command line, or in Python with keywords."""

    def __post_init__(self) -> None:
        """Refuse what cannot work. Raises ConfigError naming the flag."""
        check(self, {name: field.default for name, field in self.__dataclass_fields__.items()}, _names(ServerOptions))


def resumed_values(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Saved values with those `given` now on top, less what was saved and does not go with these. Pure."""
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    return without_leftovers(values, given, defaults, _names(ServerOptions))


def refuse_idle_options(values: Mapping[str, Any], named: Collection[str]) -> None:
    """Raises ConfigError for an option that was `named` and changes nothing with these values. Pure."""
    refuse_idle(values, named, _names(ServerOptions))


def meaningful_values(config: TrainConfig) -> dict[str, Any]:
    """Its keys and values, less what has no meaning in this run, and what is left to its default or is off. Pure."""
    values = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    idle = idle_options(values, _names(ServerOptions))
    return {key: value for key, value in values.items() if key not in idle and value is not None}


def _names(options: type) -> list[str]:
    return [field.name for field in fields(options)]


GROUPS: tuple[type, ...] = (
    DataOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizationOptions,
    StrategyOptions,
    ServerOptions,
    MachineOptions,
    RunOptions,
)
"""In the order of --help."""
