"""Options that somebody named and that change nothing in this run: refused at their default values, too. Pure.

A TrainConfig cannot tell a default from a value that was named; a command line and a file of --config can.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hvdvae.config_check import OF_STAGES, belongs, flag, has_stages, misfit
from hvdvae.errors import ConfigError

HOLDS_ANYWHERE = ("tensor", "pipeline", "weights", "lr_scaling")
"""Whose default says what is so in every run. So do switches that are off, and numbers that are none or 0."""


def refuse_idle(values: Mapping[str, Any], named: Collection[str], of_servers: Sequence[str]) -> None:
    """Raises ConfigError for a named option that has no meaning with these values.

    `of_servers`: keys that only --strategy ps has.
    """
    for key, other, choices in belongs(of_servers):
        if key in named and values[other] not in choices and not _is_off(key, values[key]):
            raise ConfigError(misfit(key, other, choices, values[other]))
    for key in OF_STAGES:
        if key in named and not has_stages(values) and not _is_off(key, values[key]):
            raise ConfigError(f"{flag(key)} is for models in stages: give --pipeline or a --mesh with pp, or drop it")


def idle_options(values: Mapping[str, Any], of_servers: Sequence[str]) -> set[str]:
    """Options that have no meaning with these values. Pure."""
    found = {key for key, other, choices in belongs(of_servers) if values[other] not in choices}
    return found if has_stages(values) else found | {*OF_STAGES}


def _is_off(key: str, value: Any) -> bool:
    return value in (None, False, "none") or (key in HOLDS_ANYWHERE and value in (1, "fp32"))
