"""The record of a run's checkpoint: which keys it has, and of what kind.

A digest shows what was damaged, not what a program other than ours has written. What is of another kind is named
before anything of a run is changed.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hvdvae.checkpoint import Source
from hvdvae.errors import CheckpointError, ConfigError

_LARGEST = 2**63
Kind = tuple[str, Callable[[Any], bool]]
"""In words, and whether a value is of it."""


def check_run(checkpoint: Source) -> None:
    """Raises CheckpointError naming the file and the key, or the tensor, that a run cannot go on with. Local."""
    check_record(checkpoint.record, checkpoint.name, _RUN, optional=("owed", "moved", "optimizer_counts"))
    for name, shape in checkpoint.shapes.items():
        kind, _, rest = name.partition("/")
        if kind == "buffers" and len(shape) != 2:
            raise CheckpointError(f"{checkpoint.name}: buffers has shape {shape}, expected a row for each rank")
        if kind == "optimizer" and not (rest.partition("/")[0].isdecimal() and rest.partition("/")[2]):
            raise CheckpointError(f"{checkpoint.name}: found the tensor {name!r}, expected optimizer/NUMBER/ENTRY")


def check_model(checkpoint: Source) -> None:
    """Raises CheckpointError naming the file and the key that a model of ours cannot be built from. Local."""
    name = checkpoint.name
    check_record(checkpoint.record, name, {"config": ("a mapping", _is_mapping)}, optional=("config",))
    config = checkpoint.record.get("config", {})
    if "shape" not in config:
        raise CheckpointError(f"{name} does not say the shape of an example: expected a checkpoint of hvdvae train")
    check_record(config, name, _MODEL, optional=("function", "data_digest", "limits"))


def check_record(
    record: Mapping[str, Any], file: str, kinds: Mapping[str, Kind], optional: tuple[str, ...] = ()
) -> None:
    """Raises CheckpointError naming `file` for a key that is missing or of another kind. Pure."""
    for key, (expected, is_so) in kinds.items():
        if key not in record:
            if key not in optional:
                raise CheckpointError(f"{file}: its record has no {key}, expected {expected}: it is none of a run's")
        elif not is_so(record[key]):
            raise CheckpointError(f"{file}: {key} in its record is {_shown(record[key])}, expected {expected}")


@contextmanager
def fitting(file: str, what: str) -> Iterator[None]:
    """Inside, what does not fit together becomes a CheckpointError that names `file`."""
    try:
        yield
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{file}: its {what} does not fit this run: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file}: its {what} does not fit this run ({type(error).__name__}: {reason})") from error


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _is_size(value: Any) -> bool:
    return _is_count(value) and 0 < value < 2**31


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < _LARGEST


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_position(value: Any) -> bool:
    keys = {"epoch", "examples", "step"}
    return isinstance(value, dict) and value.keys() == keys and all(map(_is_count, value.values()))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_groups(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) and all(map(_is_count, group["params"]))
        for group in value
    )


def _is_scalar(value: Any) -> bool:
    """A value as strategies/group_options.py writes it."""
    return value is None or isinstance(value, str | bool | list | dict) or _is_number(value)


def _are_scalars(value: Any) -> bool:
    return isinstance(value, dict) and all(
        # -1: entries that belong to no parameter.
        number.removeprefix("-").isdecimal() and isinstance(entries, dict) and all(map(_is_scalar, entries.values()))
        for number, entries in value.items()
    )


def _are_metrics(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(found is None or _is_number(found) for found in value.values())


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_scaler(value: Any) -> bool:
    return value is None or _are_numbers(value)


def _is_shape(value: Any) -> bool:
    sizes = isinstance(value, list) and len(value) > 0 and all(map(_is_size, value))
    return sizes and math.prod(value) < 2**31


def _are_limits(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


_RUN: dict[str, Kind] = {
    "position": ("epoch, examples and step", _is_position),
    "step": ("a count", _is_count),
    "world_size": ("a count above 0", _is_size),
    "best": ("a number or null", lambda value: value is None or _is_number(value)),
    "owed": ("numbers by name, or null", _are_metrics),
    "names": ("names of parameters", _are_names),
    "optimizer": ("the name of a class", _is_text),
    "examples": ("a count", _is_count),
    "optimizer_groups": ("groups with numbers of parameters", _are_groups),
    "optimizer_counts": ("names of options", _are_names),
    "optimizer_scalars": ("values by number of a parameter", _are_scalars),
    "skipped_steps": ("a count", _is_count),
    "moved": ("numbers by name", _are_numbers),
    "overflows": ("a count", _is_count),
    "scaler": ("numbers by name, or null", _is_scaler),
    "config": ("a mapping", _is_mapping),
}
_MODEL: dict[str, Kind] = {
    "shape": ("sizes of an example", _is_shape),
    "function": ("a mapping", _is_mapping),
    "data_digest": ("text", _is_text),
    "limits": ("two numbers", _are_limits),
}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"
