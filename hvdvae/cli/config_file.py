"""YAML files of options: read with every key and value checked by name, written resolved."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from hvdvae.cli.values import PATHS, checked, expected, path_of, shown
from hvdvae.cli.yaml_text import Part, YamlError, in_words, parsed_yaml
from hvdvae.config import TrainConfig, flag, meaningful_values
from hvdvae.errors import ConfigError
from hvdvae.regular_file import open_to_read
from hvdvae.whole_file import write_whole

CONFIG_FILE = "config.yaml"
"""The resolved configuration, in the folder of results."""
LARGEST_FILE = 200_000
"""Bytes. One of options, and a study with all its comments, has some thousands."""


def read_text(path: Path, name: str) -> str:
    """The text of a file of YAML. `name` is for messages; raises ConfigError. Local."""
    try:
        with open_to_read(path) as file:
            data = file.read(LARGEST_FILE + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: found bytes that are no UTF-8 text, expected YAML") from error
    if len(data) > LARGEST_FILE:
        raise ConfigError(f"{name}: found more than {LARGEST_FILE:,} bytes, expected a file of options")
    return text


def read_mapping(text: str, name: str) -> dict[str, Part]:
    """Keys and parts of YAML whose top is a mapping. Raises ConfigError naming `name` and the line. Pure."""
    try:
        found = parsed_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{name}{f', line {error.line}' if error.line else ''}: {error.text}") from error
    if found is None or found.value is None:
        raise ConfigError(f"{name} is empty, or has comments alone: expected lines of `key: value`")
    if not isinstance(found.value, dict):
        raise ConfigError(f"{name}, line {found.line}: found {in_words(found)}, expected lines of `key: value`")
    return found.value


def read_values(path: Path, name: str) -> dict[str, Any]:
    """Keys and values of a YAML file, of the types of TrainConfig. `name` is for messages; raises ConfigError.

    Keys may be spelled as the flags are: batch-size is batch_size.
    """
    hints = get_type_hints(TrainConfig)
    values: dict[str, Any] = {}
    for spelled, part in read_mapping(read_text(path, name), name).items():
        key, where = spelled.replace("-", "_"), f"{name}, line {part.key_line}"
        if key in values:
            raise ConfigError(f"{where}: {key} stands twice, also spelled as {flag(key)[2:]}: keep one of them")
        if key not in hints:
            near = get_close_matches(key, hints, 1)
            hint = f": did you mean {near[0]}?" if near else "; `hvdvae train --help` lists the keys"
            raise ConfigError(f"{where}: unknown key {shown(key)}{hint}")
        value = plain(part)
        try:
            values[key] = checked(value, hints[key])
        except ValueError as error:
            raise ConfigError(f"{where}: {key} is {shown(value)}, expected {expected(hints[key], error)}") from None
        if key in PATHS and values[key] is not None:
            values[key] = expanded(values[key], f"{where}: {key}")
    return values


def plain(part: Part) -> Any:
    """Text, None, or lists and mappings of them, without lines. Pure."""
    if isinstance(part.value, list):
        return [plain(item) for item in part.value]
    if isinstance(part.value, dict):
        return {key: plain(item) for key, item in part.value.items()}
    return part.value


def expanded(path: str, name: str) -> str:
    """A path with ~ as the home that it is. Raises ConfigError naming it where nobody has that home. Local."""
    try:
        return path_of(path)
    except ValueError:
        raise ConfigError(
            f"{name} is {shown(path)}, and nobody here has that home: write ./{path} for a file of that name"
        ) from None


class _Dumper(yaml.SafeDumper):
    """Lists are written out where two keys hold the same: aliases are not read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_config(config: TrainConfig, path: Path) -> None:
    """Save a configuration, whole, as YAML that --config accepts. Raises ConfigError naming the file.

    What is not there has no meaning in this run, or is off. A path of data is saved absolute, so that the run can be
    opened from anywhere.
    """
    from hvdvae.data.named import NAMES  # Here: it loads torch, and --help reads no data.

    values = meaningful_values(config)
    if config.data not in NAMES and Path(config.data).exists():
        values["data"] = os.path.abspath(config.data)  # Not resolved: a link is where data may move to.
    # How this launch was asked to treat its folder is no property of the run.
    for name in ("resume", "overwrite"):
        values.pop(name)
    write_whole(path, yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def read_config(path: Path) -> TrainConfig:
    """The configuration of a run. Raises ConfigError naming the file, and the key where one is unknown or wrong."""
    if not os.path.lexists(path):
        raise ConfigError(f"{path} is missing: is {path.parent} the --out of a training run?")
    return TrainConfig(**read_values(path, str(path)))
