"""From a configuration to the objects of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from hvdvae.cli.agreement import check_same_data
from hvdvae.compression import DEFAULT_RANK, DEFAULT_SHARE, WITH_RANK, WITH_SHARE
from hvdvae.config import Binarization, TrainConfig, flag
from hvdvae.config_check import OF_STAGES, has_stages
from hvdvae.config_kinds import FUNCTION
from hvdvae.data import Dataset, Source, chosen_binarization, open_dataset
from hvdvae.errors import ConfigError
from hvdvae.parallel.fill import fill
from hvdvae.parallel.mesh import Groups, Mesh, groups_of
from hvdvae.parallel.parts import Cut, Parts, Whole
from hvdvae.parallel.stages import choose_cuts, keep_stage
from hvdvae.parallel.tensor import split_layers
from hvdvae.ps.plan import Plan
from hvdvae.schedule import Schedule, learning_rate, world_scale
from hvdvae.seeding import seed_everything
from hvdvae.strategies import OUTER_LR, OUTER_MOMENTUM, SYNC_EVERY, DistributedOptimizer, Strategy
from hvdvae.vae import VAE, Elbo, FreeBits, Iwae, Objective, build_model, set_output_bias
from hvdvae.vae.build import resolved_sizes
from hvdvae.vae.chain import VaeChain
from hvdvae.world import World

if TYPE_CHECKING:
    from hvdvae.parallel.pipeline import Pipeline

MICRO_BATCHES = 4


def resolved(config: TrainConfig) -> TrainConfig:
    """The same, with what defaults of other options stand for: nothing that changes what is computed. Pure.

    Left open: what is off (None), and what depends on the data, ranks or the machine (binarization, elasticity, ...).
    """
    hidden, latent, activation = resolved_sizes(config.model, config.hidden, config.latent, config.activation)
    found: dict[str, Any] = {
        "optimizer": optimizer_name(config),
        "hidden": hidden,
        "latent": latent,
        "activation": activation,
        "nll_samples": nll_samples(config),
    }
    if config.compression in WITH_SHARE and config.compression_share is None:
        found["compression_share"] = DEFAULT_SHARE
    if config.compression in WITH_RANK and config.compression_rank is None:
        found["compression_rank"] = DEFAULT_RANK
    if config.strategy in SYNC_EVERY and config.sync_every is None:
        found["sync_every"] = SYNC_EVERY[config.strategy]
    if config.strategy == "diloco":
        for key, default in (("outer_lr", OUTER_LR), ("outer_momentum", OUTER_MOMENTUM)):
            found[key] = default if getattr(config, key) is None else getattr(config, key)
    if has_stages(vars(config)):
        found["micro_batches"] = micro_batches(config)
    if config.strategy == "ps" and config.rule.startswith("dcasgd"):
        found["dc_strength"] = plan(config).strength_of()
    return replace(config, **found)


def micro_batches(config: TrainConfig) -> int:
    """What --micro-batches stands for: 1 where a loss or a layer looks at a whole batch, as an unsplit model's do."""
    return config.micro_batches or (1 if config.free_bits or config.batch_norm else MICRO_BATCHES)


def binarization(config: TrainConfig, source: Source) -> Binarization:
    """What --binarization stands for with this likelihood and data (any split of it)."""
    return cast(Binarization, chosen_binarization(source, config.likelihood, config.binarization))


def nll_samples(config: TrainConfig) -> int:
    """Importance samples of the test at the end of training."""
    if config.nll_samples is not None:
        return config.nll_samples
    return 500 if config.model == "conv" else 5000


def validation_samples(config: TrainConfig) -> int:
    """Importance samples of a validation: those of the bound that is trained, one for the ELBO."""
    return config.samples if config.objective == "iwae" else 1


def data(name_or_path: str, world: World, *, validation: int | None = None, external_storage: bool = False) -> Dataset:
    """Open a data set on every rank. Blocks; every rank must call it: rank 0 first, since it may download.

    Raises DataError where ranks find different data.
    """
    if world.is_first:
        dataset = open_dataset(name_or_path, validation=validation, external_storage=external_storage)
    world.barrier("rank 0 opens the data", patient=True)
    if not world.is_first:
        dataset = open_dataset(name_or_path, validation=validation, external_storage=external_storage)
    check_same_data(dataset, world)
    return dataset


def model(config: TrainConfig, shape: tuple[int, ...], device: torch.device) -> VAE:
    """The model, with initial weights that follow from the seed alone; on torch's meta device, none and no memory."""
    seed_everything(torch.device("cpu"), config.seed, _INITIAL_WEIGHTS)
    try:
        with device if device.type == "meta" else torch.device("cpu"):
            built = _built(config, shape).to(device)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        raise ConfigError(
            f"the model does not fit into the memory of {device}: lower --hidden {config.hidden} or --latent "
            f"{config.latent} ({str(error).splitlines()[0]})"
        ) from error
    if config.channels_last:
        built = built.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return built


def function_of(config: TrainConfig, shape: Sequence[int]) -> dict[str, Any]:
    """What the model of a configuration computes (config_kinds.FUNCTION), nothing left to defaults; JSON-able. Pure.

    Without `binarization` where the configuration leaves it to the data: `hvdvae train` has the data say it.
    """
    hidden, latent, activation = resolved_sizes(config.model, config.hidden, config.latent, config.activation)
    found = {key: getattr(config, key) for key in FUNCTION}
    found |= {"hidden": hidden, "latent": latent, "activation": activation}
    if config.binarization is None:
        del found["binarization"]
    return {**found, "shape": list(shape)}


def _built(config: TrainConfig, shape: tuple[int, ...]) -> VAE:
    sizes: dict[str, Any] = {"hidden": config.hidden}
    if config.model == "conv":
        channels, _, _ = resolved_sizes(config.model, config.hidden, config.latent, config.activation)
        sizes = {"channels": channels}
    return build_model(
        config.model,
        shape,
        likelihood=config.likelihood,
        sigma=config.sigma,
        latent=config.latent,
        activation=config.activation,
        batch_norm=config.batch_norm,
        **sizes,
    )


_INITIAL_WEIGHTS = 2**32  # No rank has this number, so no step draws the same noise.


def objective(config: TrainConfig) -> Objective:
    """What training minimizes."""
    if config.objective == "iwae":
        return Iwae(samples=config.samples)
    if config.free_bits:
        return FreeBits(nats=config.free_bits, samples=config.samples)
    return Elbo(beta=config.beta, warmup_epochs=config.beta_warmup, samples=config.samples)


def optimizer_name(config: TrainConfig) -> str:
    """What --optimizer stands for: DiLoCo is AdamW inside (Douillard et al. 2023)."""
    return config.optimizer or ("adamw" if config.strategy == "diloco" else "adam")


def optimizer(config: TrainConfig, trained: nn.Module, world: World) -> Optimizer:
    """The plain torch optimizer, its learning rate scaled for the ranks as asked."""
    lr = config.lr * world_scale(config.lr_scaling, world.size)
    parameters, decay = trained.parameters(), config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=config.momentum, weight_decay=decay)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr, momentum=config.momentum, eps=config.eps, weight_decay=decay)
    if config.optimizer == "adagrad":
        return torch.optim.Adagrad(parameters, lr, eps=config.eps, weight_decay=decay)
    kind = torch.optim.AdamW if optimizer_name(config) == "adamw" else torch.optim.Adam
    return kind(parameters, lr, eps=config.eps, weight_decay=decay)


def mesh(config: TrainConfig, world: World) -> Groups | None:
    """The Worlds of a rank where several hold a model together; None where each holds one. Blocks; all must call it.

    Raises ConfigError as `mesh_of`.
    """
    found = mesh_of(config, world.size)
    return groups_of(found, world) if found.pp * found.tp > 1 else None


def mesh_of(config: TrainConfig, ranks: int) -> Mesh:
    """Of so many ranks. Pure. Raises ConfigError where it is of another number, or something does not go with it."""
    found = Mesh.of(ranks, mesh=config.mesh, pipeline=config.pipeline, tensor=config.tensor)
    defaults = TrainConfig.__dataclass_fields__
    for key in OF_STAGES:
        if found.pp == 1 and getattr(config, key) != defaults[key].default:
            raise ConfigError(f"{flag(key)} is for models in stages: give --pipeline or a --mesh with pp, or drop it")
    refused = {
        "--compile": config.compile,
        "--precision fp16": config.precision == "fp16",
        "--compression": config.compression != "none",
        "--reduce-op adasum": config.reduce_op == "adasum",
        "--replace-workers": config.replace_workers,
    }
    in_stages = {"--zero-stage 2": config.zero_stage == 2, "--sync-batch-norm": config.sync_batch_norm}
    for what, options, is_so in (
        ("that is split (--tensor, --pipeline, --mesh)", refused, found.pp * found.tp > 1),
        ("in stages (--pipeline, --mesh)", in_stages, found.pp > 1),
    ):
        for name, is_set in options.items():
            if is_so and is_set:
                raise ConfigError(f"{name} does not go with a model {what}: drop one of them")
    if config.recompute and config.batch_norm:
        raise ConfigError("--recompute with --batch-norm would count each batch twice in its statistics: drop one")
    return found


def split(config: TrainConfig, model: VAE, groups: Groups) -> tuple[Parts, "Pipeline | None"]:
    """Keep this rank's part of a model. Blocks; every rank must call it. Mutates the model. Raises ConfigError.

    The model may be without numbers: `fill_part` gives its part what it needs.
    """
    whole, stages = Whole.of(model), groups.mesh.pp
    chain = VaeChain(model, objective(config), config.samples)
    micros = micro_batches(config)
    cuts = [0]
    if stages > 1:
        like = torch.zeros(max(1, config.batch_size // micros), *model.shape, device=groups.whole.device)
        cuts = choose_cuts(config.cuts, model, chain, stages, like, groups.whole)
    cut = split_layers(model, model.chains, groups.layers) if groups.mesh.tp > 1 else {}
    parts = Parts(groups, whole, cut)
    if stages == 1:
        return parts, None
    # Imported here: it needs MPI.
    from hvdvae.parallel.pipeline import Pipeline

    mine = keep_stage(model, chain, cuts, groups)
    return parts, Pipeline(
        chain, mine, groups, micros=micros, schedule=config.pipeline_schedule, recompute=config.recompute
    )


def fill_part(
    config: TrainConfig, part: VAE, cuts: Mapping[str, Cut], mean: torch.Tensor | None, device: torch.device
) -> None:
    """Give a part of a model without numbers the initial weights that the whole model has. Local. Mutates the part.

    `cuts`: as Parts'. `mean`: that of the training images, (*shape), where the output's bias is to show it.
    """
    whole = model(config, part.shape, torch.device("meta"))
    seed_everything(torch.device("cpu"), config.seed, _INITIAL_WEIGHTS)

    def drawn(name: str) -> None:
        if name == "decoder.output" and mean is not None:
            set_output_bias(whole, mean)

    fill(part, whole, cuts, device, drawn)


def distributed(config: TrainConfig, trained: nn.Module, world: World, parts: Parts | None = None) -> Strategy:
    """The optimizer over the ranks that hold the same. Blocks; every rank must call it. Mutates the model's storage."""
    return DistributedOptimizer(
        optimizer(config, trained, world),
        trained,
        world=world,
        strategy=config.strategy,
        engine=config.engine,
        backward_passes_per_step=config.accumulate,
        clip_norm=config.clip_norm,
        compression=config.compression,
        compression_share=config.compression_share,
        compression_rank=config.compression_rank,
        compression_momentum=config.compression_momentum,
        sync_every=config.sync_every,
        adaptive_sync=config.adaptive_sync,
        outer_lr=config.outer_lr,
        outer_momentum=config.outer_momentum,
        group_size=config.group_size,
        reduce_op=config.reduce_op,
        zero_stage=config.zero_stage,
        weights=config.weights,
        plan=plan(config) if config.strategy == "ps" else None,
        parts=parts,
    )


def plan(config: TrainConfig) -> Plan:
    """What the parameter servers do."""
    return Plan(
        consistency=config.consistency,
        staleness=config.staleness,
        backup_workers=config.backup_workers,
        replicas=config.replicas,
        replace_workers=config.replace_workers,
        rule=config.rule,
        strength=config.dc_strength,
        elasticity=config.elasticity,
        push_every=config.push_every,
        fetch_every=config.fetch_every,
        prefetch=config.prefetch,
        compression=config.compression if config.strategy == "ps" else "none",
        compression_share=config.compression_share if config.strategy == "ps" else None,
        compression_momentum=config.compression_momentum if config.strategy == "ps" else 0.0,
    )


def schedule(config: TrainConfig) -> Schedule:
    """The learning rate over epochs."""
    return learning_rate(
        config.schedule,
        epochs=config.epochs,
        warmup=config.warmup,
        step_epochs=config.step_epochs,
        gamma=config.gamma,
    )


def checkpoint_file(folder: Path, choice: str) -> Path:
    """`best`, `last` or a file's path as a path. Raises ConfigError where a run has none."""
    if choice not in ("best", "last"):
        return Path(choice)
    checkpoints = folder / "checkpoints"
    steps = sorted(checkpoints.glob("step-*.safetensors"))
    found = checkpoints / "best.safetensors" if choice == "best" else (steps[-1] if steps else checkpoints / "none")
    if not found.exists():
        if choice == "best" and steps:
            return steps[-1]
        raise ConfigError(
            f"{folder} has no checkpoint {choice!r} in checkpoints/: is it the --out of a run that finished an epoch?"
        )
    return found
