"""YAML files of options: read with every key and value checked by name, written resolved."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from hvdvae.cli.values import checked, expected, shown
from hvdvae.config import TrainConfig, flag
from hvdvae.errors import ConfigError
from hvdvae.whole_file import write_whole

CONFIG_FILE = "config.yaml"
"""The resolved configuration, in the folder of results."""


class _Loader(yaml.SafeLoader):
    """YAML in which no key comes twice, where the first would be forgotten silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.YAMLError(f"the key {key.value} comes twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def load_yaml(text: str) -> Any:
    """YAML whose keys may be spelled as the flags are: batch-size is batch_size, and `out: 2026` is a name."""
    loaded = yaml.load(text, _Loader)
    if not isinstance(loaded, dict):
        return loaded
    hints = get_type_hints(TrainConfig)
    return {key: _as_text(value, hints.get(key)) for key, value in _keys(loaded)}


def _keys(loaded: dict[Any, Any]) -> list[tuple[str, Any]]:
    return [(str(key).replace("-", "_"), value) for key, value in loaded.items()]


def _as_text(value: Any, hint: Any) -> Any:
    """A number where text is expected, as that text; all else as it is, for the parser to judge."""
    if hint not in (str, str | None):
        return value
    try:
        return checked(value, hint)
    except ValueError:
        return value


def read_values(path: Path, name: str) -> dict[str, Any]:
    """Keys and values of a YAML file, of the types of TrainConfig. `name` is for messages; raises ConfigError."""
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{name}: found no YAML ({' '.join(str(error).split())})") from error
    if loaded is None:
        raise ConfigError(f"{name} is empty, or has comments alone: expected lines of `key: value`")
    if not isinstance(loaded, dict):
        raise ConfigError(f"{name}: found {type(loaded).__name__}, expected lines of `key: value`")
    hints = get_type_hints(TrainConfig)
    values: dict[str, Any] = {}
    for key, value in _keys(loaded):
        if key in values:
            raise ConfigError(f"{name} has {key} twice, also spelled as {flag(key)[2:]}: keep one of them")
        if key not in hints:
            near = get_close_matches(key, hints, 1)
            hint = f": did you mean {near[0]}?" if near else "; `hvdvae train --help` lists the keys"
            raise ConfigError(f"{name} has the unknown key {key!r}{hint}")
        try:
            values[key] = checked(value, hints[key])
        except ValueError:
            raise ConfigError(f"{name}: {key} is {shown(value)}, expected {expected(hints[key])}") from None
    return values


def write_config(config: TrainConfig, path: Path) -> None:
    """Save the resolved configuration, whole, as YAML that --config accepts. Raises ConfigError naming the file.

    A path of data is saved absolute, so that the run can be opened from anywhere.
    """
    from hvdvae.data.named import NAMES  # Here: it loads torch, and --help reads no data.

    values = {name: getattr(config, name) for name in TrainConfig.__dataclass_fields__}
    if config.data not in NAMES and Path(config.data).exists():
        values["data"] = os.path.abspath(config.data)  # Not resolved: a link is where data may move to.
    # How this launch was asked to treat its folder is no property of the run.
    for name in ("resume", "overwrite"):
        values.pop(name)
    write_whole(path, yaml.safe_dump(values, sort_keys=False))


def read_config(path: Path) -> TrainConfig:
    """The configuration of a run. Raises ConfigError naming the file, and the key where one is unknown or wrong."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing: is {path.parent} the --out of a training run?")
    return TrainConfig(**read_values(path, str(path)))
