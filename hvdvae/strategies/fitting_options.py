"""Which options of DistributedOptimizer belong to which strategies, as the command's do."""

from typing import Any

from hvdvae.config_check import BELONGS
from hvdvae.errors import ConfigError

_OF_THE_COMMAND = {
    option: tuple(choice for choice in choices if choice is not None)
    for option, other, choices in BELONGS
    if other == "strategy"
}
_STRATEGIES: dict[str, tuple[str, ...]] = {
    **_OF_THE_COMMAND,
    "compression_share": _OF_THE_COMMAND["compression"],
    "compression_rank": ("allreduce", "local-sgd", "diloco"),
    "process_set": ("allreduce",),
    "servers": ("ps",),
    "plan": ("ps",),
}
_CODECS = {
    option: tuple(choice for choice in choices if choice is not None)
    for option, other, choices in BELONGS
    if other == "compression"
}
_DEFAULTS = {
    "compression": "none",
    "compression_momentum": 0.0,
    "reduce_op": "average",
    "zero_stage": 1,
    "weights": "fp32",
    "adaptive_sync": False,
    "group_size": 1,
}
"""None for the others."""


def check_options(strategy: str, **options: Any) -> None:
    """Raises ConfigError for options that this strategy does not have, and values that none has. Pure."""
    for name, value in options.items():
        if value != _DEFAULTS.get(name) and strategy not in _STRATEGIES[name]:
            raise ConfigError(
                f"{name} (--{name.replace('_', '-')}) is for strategy {' or '.join(_STRATEGIES[name])} (--strategy), "
                f"found {strategy!r}: drop one"
            )
    for name in ("compression_share", "compression_rank", "compression_momentum"):
        if options[name] != _DEFAULTS.get(name) and options["compression"] not in _CODECS[name]:
            raise ConfigError(
                f"{name} (--{name.replace('_', '-')}) is for compression {' or '.join(_CODECS[name])} (--compression), "
                f"found {options['compression']!r}: drop one"
            )
    if options["adaptive_sync"] and options["sync_every"] == 1:
        raise ConfigError("adaptive_sync averages more often as the loss falls, and sync_every=1 is at every step")
    stage, weights = options["zero_stage"], options["weights"]
    if (stage, weights) not in ((1, "fp32"), (2, "fp32"), (2, "bf16")):
        raise ConfigError(
            f"zero_stage (--zero-stage) is {stage} and weights (--weights) {weights!r}, expected 1 or 2 and 'fp32', or "
            "2 and 'bf16'"
        )
