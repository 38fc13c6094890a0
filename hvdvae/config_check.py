"""What options may hold, and which go together: refused before any work, by the flag to change. Pure."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hvdvae.errors import ConfigError

if TYPE_CHECKING:
    from hvdvae.config import TrainConfig

AT_LEAST: dict[str, float] = {
    "epochs": 1,
    "batch_size": 1,
    "accumulate": 1,
    "samples": 1,
    "threads": 1,
    "validate_every": 1,
    "checkpoint_every": 1,
    "keep": 1,
    "tensor": 1,
    "pipeline": 1,
    "micro_batches": 1,
    "servers": 1,
    "push_every": 1,
    "fetch_every": 1,
    "staleness": 0,
    "backup_workers": 0,
    "replicas": 0,
    "dc_strength": 0,
    "compression_rank": 1,
    "sync_every": 1,
    "group_size": 0,
    "validation": 1,
    "skip_limit": 1,
    "nll_samples": 0,
    "pictures_every": 0,
    "beta": 0,
    "beta_warmup": 0,
    "free_bits": 0,
    "warmup": 0,
    "weight_decay": 0,
    "seed": 0,
}
MOST = 1e38
MOST_THREADS = 1024
"""torch starts as many as it is asked for, and crashes where it cannot."""
ABOVE_ZERO = ("sigma", "outer_lr", "lr", "eps", "clip_norm", "deadline", "step_epochs", "gamma")
BELOW_ONE = ("momentum", "ema", "compression_momentum", "outer_momentum")
AVERAGING = ("local-sgd", "diloco")
PARALLEL = ("allreduce", "sharded", *AVERAGING, "ps")
REMEMBERING = ("sign", "topk", "randomk", "powersgd")
"""Codecs with error feedback."""
BELONGS: tuple[tuple[str, str, tuple[str | None, ...]], ...] = (
    ("sigma", "likelihood", ("gaussian",)),
    ("batch_norm", "model", ("conv",)),
    ("channels_last", "model", ("conv",)),
    ("momentum", "optimizer", ("sgd", "rmsprop")),
    ("eps", "optimizer", ("adam", "adamw", "rmsprop", "adagrad", None)),
    ("step_epochs", "schedule", ("step",)),
    ("gamma", "schedule", ("step",)),
    ("lr_scaling", "strategy", PARALLEL),
    ("deadline", "strategy", PARALLEL),
    ("engine", "strategy", ("allreduce", "sharded")),
    ("compression_share", "compression", ("topk", "randomk")),
    ("compression_rank", "compression", ("powersgd",)),
    ("compression_momentum", "compression", ("topk", "randomk")),
    ("compression_momentum", "strategy", ("allreduce", "ps")),
    ("compression", "strategy", ("allreduce", *AVERAGING, "ps")),
    ("reduce_op", "strategy", ("allreduce",)),
    ("sync_batch_norm", "strategy", ("allreduce", "sharded")),
    ("replace_workers", "strategy", ("allreduce", "ps")),
    ("zero_stage", "strategy", ("sharded",)),
    ("weights", "strategy", ("sharded",)),
    ("weights", "precision", ("bf16",)),
    ("tensor", "strategy", ("allreduce", "sharded")),
    ("pipeline", "strategy", ("allreduce", "sharded")),
    ("mesh", "strategy", ("allreduce", "sharded")),
    ("sync_every", "strategy", AVERAGING),
    ("adaptive_sync", "strategy", AVERAGING),
    ("group_size", "strategy", AVERAGING),
    ("staleness", "consistency", ("ssp",)),
    ("backup_workers", "consistency", ("bsp",)),
    ("elasticity", "rule", ("easgd",)),
    ("dc_strength", "rule", ("dcasgd", "dcasgd-a")),
    ("outer_lr", "strategy", ("diloco",)),
    ("outer_momentum", "strategy", ("diloco",)),
)
"""Option, the other option whose it is, and with which values of that it may be set; None: where that is not given."""


def flag(key: str) -> str:
    """The flag of a key: batch_size -> --batch-size."""
    return "--" + key.replace("_", "-")


def belongs(of_servers: Sequence[str]) -> tuple[tuple[str, str, tuple[str | None, ...]], ...]:
    """BELONGS, and the options of parameter servers. Pure."""
    return (*BELONGS, *((key, "strategy", ("ps",)) for key in of_servers))


def misfit(key: str, other: str, choices: Sequence[str | None], value: Any) -> str:
    """What to say where an option has no meaning, as `other` has this value. Pure."""
    fitting = f"{flag(other)} {' or '.join(choice for choice in choices if choice is not None)}"
    found = f"no {flag(other)}" if value is None else f"{flag(other)} {value}: drop one"
    return f"{flag(key)} is for {fitting}, found {found}"


DERIVED = (("dc_strength", "rule"), ("sync_every", "strategy"), ("optimizer", "strategy"))
"""An option, and another one that its default follows from: a resume that names that takes the default anew."""
SPLITTING = ("mesh", "pipeline", "tensor")
"""Options that say, each in its way, how ranks hold a model together."""
OF_STAGES = ("micro_batches", "pipeline_schedule", "recompute", "cuts")
"""Options of models in stages."""


def without_leftovers(
    values: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any], of_servers: Sequence[str]
) -> dict[str, Any]:
    """The values of a run that is resumed, less those saved ones that do not go with what is `given` now. Pure."""
    kept = dict(values)

    def forget(key: str) -> bool:
        """Whether there was something to forget that was not asked for now."""
        is_leftover = bool(kept[key] != defaults[key] == given[key])
        kept[key] = defaults[key] if is_leftover else kept[key]
        return is_leftover

    if any(given[key] != defaults[key] for key in SPLITTING):
        for key in SPLITTING:
            forget(key)
        if not has_stages(kept):
            for key in OF_STAGES:
                forget(key)
    for key, other in DERIVED:
        if given[other] != defaults[other]:
            forget(key)
    rows = belongs(of_servers)
    while any(kept[other] not in choices and forget(key) for key, other, choices in rows):
        pass  # What belonged to a value that is gone now goes, too.
    return kept


def has_stages(values: Mapping[str, Any]) -> bool:
    """Whether --pipeline or --mesh asks for a model in stages. Pure."""
    return values["pipeline"] > 1 or bool(re.search(r"pp *= *([2-9]|1\d)", values["mesh"] or ""))


def check(config: "TrainConfig", defaults: Mapping[str, Any], of_servers: Sequence[str]) -> None:
    """Refuse values outside their range and options that do not go together. Raises ConfigError.

    `of_servers`: keys that only --strategy ps has.
    """
    values = {key: getattr(config, key) for key in defaults}
    _check_ranges(values)
    for key, other, choices in belongs(of_servers):
        if values[key] != defaults[key] and values[other] not in choices:
            raise ConfigError(misfit(key, other, choices, values[other]))
    _check_vae(config)
    _check_parallelism(config)
    if config.data == "":
        raise ConfigError("--data is empty, expected a name or a path: a variable that is not set?")
    if config.out == "":
        raise ConfigError("--out is empty, expected a folder: a variable that is not set?")
    if config.resume and config.overwrite:
        raise ConfigError("--resume continues a run and --overwrite deletes it: give one of them")
    if config.resume and config.out is None:
        raise ConfigError("--resume needs --out DIR, the folder of the run to continue")


def _check_ranges(values: Mapping[str, Any]) -> None:
    for key, least in AT_LEAST.items():
        if values[key] is not None and not values[key] >= least:
            raise ConfigError(f"{flag(key)} is {values[key]}, expected at least {least:g}")
        if values[key] == float("inf"):
            raise ConfigError(f"{flag(key)} is inf, expected a finite number")
    if values["threads"] is not None and values["threads"] > MOST_THREADS:
        raise ConfigError(f"--threads is {values['threads']}, expected at most {MOST_THREADS}")
    for key in ABOVE_ZERO:
        if values[key] is not None and not 0 < values[key] < float("inf"):
            raise ConfigError(f"{flag(key)} is {values[key]}, expected a finite number above 0")
    for key in BELOW_ONE:
        if values[key] is not None and not 0 <= values[key] < 1:
            raise ConfigError(f"{flag(key)} is {values[key]}, expected 0 to below 1")
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag(key)} is {value}, expected a finite number")
        if isinstance(value, float) and abs(value) > MOST:
            raise ConfigError(f"{flag(key)} is {value}, expected at most {MOST:g}, which float32 holds")
    if values["seed"] >= 2**63:
        raise ConfigError(f"--seed is {values['seed']}, expected less than 2**63")
    if values["compression_share"] is not None and not 0 < values["compression_share"] <= 1:
        raise ConfigError(f"--compression-share is {values['compression_share']}, expected a part of 1 above 0")
    for key in ("hidden", "latent"):
        sizes = values[key]
        if sizes is not None and (not sizes or min(sizes) < 1 or max(sizes) >= 2**31):
            raise ConfigError(f"{flag(key)} is {sizes}, expected sizes of at least 1 and below 2**31")


def _check_vae(config: "TrainConfig") -> None:
    if config.objective == "iwae" and config.free_bits:
        raise ConfigError("--free-bits goes with --objective elbo only: IWAE has no rate of its own to hold up")
    if config.objective == "iwae" and (config.beta != 1 or config.beta_warmup):
        raise ConfigError("--beta and --beta-warmup go with --objective elbo only: the bound of IWAE has no weights")
    if config.free_bits and (config.beta != 1 or config.beta_warmup):
        raise ConfigError("--free-bits does not go with --beta and --beta-warmup: it weighs the rate by itself")
    if config.beta_warmup and not config.beta:
        raise ConfigError("--beta-warmup raises beta from 0 to --beta, found --beta 0: drop one of them")
    if config.sync_batch_norm and not config.batch_norm:
        raise ConfigError("--sync-batch-norm needs --batch-norm: there are no statistics to share without it")


def _check_parallelism(config: "TrainConfig") -> None:
    if config.engine == "horovod" and config.strategy == "allreduce" and config.compression not in ("none", "fp16"):
        raise ConfigError(
            f"--engine horovod carries --compression fp16 alone, found {config.compression}, which MPI carries: drop "
            "one of them"
        )
    if config.adaptive_sync and config.sync_every == 1:
        raise ConfigError("--adaptive-sync averages more often as the loss falls, and --sync-every 1 is at every step")
    if config.compression_momentum and (config.optimizer != "sgd" or config.momentum):
        raise ConfigError(
            "--compression-momentum takes the place of the optimizer's: use --optimizer sgd without --momentum"
        )
    if config.precision == "fp16" and config.strategy == "allreduce" and config.compression in REMEMBERING:
        raise ConfigError(
            f"--compression {config.compression} remembers gradients, and --precision fp16 scales each step's "
            "differently: use --precision bf16, or one of --compression fp16, bf16, int8"
        )
    if config.zero_stage == 2 and config.precision == "fp16":
        raise ConfigError("--precision fp16 needs whole gradients, which --zero-stage 2 does not keep: use bf16")
    if config.weights == "bf16":
        if config.zero_stage != 2:
            raise ConfigError("--weights bf16 goes with gradients that are sharded: give --zero-stage 2, too")
        for key in ("ema", "batch_norm"):
            if getattr(config, key):
                raise ConfigError(f"{flag(key)} wants float32 weights on every rank, found --weights bf16: drop one")
    if config.strategy in AVERAGING and config.ema:
        raise ConfigError(f"--ema does not go with --strategy {config.strategy}: ranks have weights of their own")
    periodic = config.push_every > 1 or (config.fetch_every or 1) > 1
    if config.strategy == "ps" and config.ema and (config.rule == "easgd" or periodic):
        raise ConfigError(
            "--ema does not go with --rule easgd, --push-every and --fetch-every: workers have weights of their own"
        )
