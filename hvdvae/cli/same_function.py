"""A configuration held against the checkpoint whose weights it is to give a meaning.

Weights of a network with relu fit one with tanh, and are worth other numbers in it: shapes alone tell nothing.
"""

from collections.abc import Mapping
from typing import Any

from hvdvae.cli.assemble import function_of
from hvdvae.config import TrainConfig, flag
from hvdvae.config_kinds import CHANGEABLE, FUNCTION
from hvdvae.errors import CheckpointError
from hvdvae.run_record import fitting


def check_folder(config: TrainConfig, record: Mapping[str, Any], checkpoint: str, file: str) -> None:
    """Raises CheckpointError where `file`, the configuration of a run, describes another function than was trained."""
    saved = saved_function(record, checkpoint)
    differing = _differing(function_of(config, saved.get("shape", ())), saved)
    if differing:
        there = ", ".join(f"{key} {_shown(theirs)} (not {_shown(mine)})" for key, mine, theirs in differing)
        raise CheckpointError(
            f"{checkpoint} holds another model: it was trained with {there}, {file} says otherwise; they are not of "
            "one run, or the file was edited: put the run's own configuration back, or name a checkpoint of this one"
        )


def check_resumed(function: Mapping[str, Any], record: Mapping[str, Any], checkpoint: str) -> None:
    """Raises CheckpointError where a run that goes on would train another function."""
    differing = _differing(function, saved_function(record, checkpoint))
    if differing:
        there = ", ".join(f"{key} {_shown(theirs)} (here {_shown(mine)})" for key, mine, theirs in differing)
        flags = " ".join(f"{flag(key)} {_shown(theirs)}" for key, _, theirs in differing if key in FUNCTION)
        raise CheckpointError(
            f"{checkpoint} was trained with {there}: resume with {flags or 'the same --data'}, or start anew in "
            "another --out (where no flag said otherwise, the config.yaml there is another run's)"
        )


def changes(config: TrainConfig, record: Mapping[str, Any]) -> list[str]:
    """What a run that goes on does otherwise than before, as `lr 0.01 (was 0.001)`. Pure."""
    before = record["config"]
    return [
        f"{key} {_shown(now)} (was {_shown(then)})"
        for key in CHANGEABLE
        if key in before and _named(key, now := getattr(config, key)) != _named(key, then := before[key])
        if not (key == "engine" and then == "auto")
    ]


def _named(key: str, value: Any) -> Any:
    """With the engine's default by its name: config.yaml has what it was."""
    return "horovod" if key == "engine" and value is None else value


def saved_function(record: Mapping[str, Any], checkpoint: str) -> dict[str, Any]:
    """What a checkpoint's weights compute, as far as it says so: those of before this was asked hold options alone."""
    saved = record.get("config", {})
    if not isinstance(saved, dict) or not isinstance(saved.get("function", {}), dict):
        raise CheckpointError(f"{checkpoint}: config in its record is none of hvdvae train")
    if "function" in saved:
        return dict(saved["function"])
    if not set(FUNCTION) <= saved.keys():
        return {}
    with fitting(checkpoint, "configuration"):
        return function_of(TrainConfig(**{key: saved[key] for key in FUNCTION}), saved.get("shape", ()))


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, mine[key], theirs[key]) for key in mine if key in theirs and mine[key] != theirs[key]]


def _shown(value: Any) -> str:
    """As a flag has it."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "none" if value is None else _short(str(value).lower() if isinstance(value, bool) else str(value))


def _short(text: str) -> str:
    line = text if text.isprintable() else repr(text)
    return line if len(line) <= 60 else f"{line[:40]}... ({len(line)} characters)"
