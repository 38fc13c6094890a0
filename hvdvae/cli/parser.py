"""Flags, YAML keys and help, made from the dataclasses that hold the options (config.py, cli/options.py)."""

import inspect
import os
from argparse import SUPPRESS, Action, ArgumentError, ArgumentTypeError
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace, set_loader  # type: ignore[attr-defined]

from hvdvae import config as training
from hvdvae.cli import options
from hvdvae.cli.values import checked, expected, shown
from hvdvae.cli.wording import reworded
from hvdvae.config import TrainConfig, flag
from hvdvae.errors import ConfigError

Command = Callable[[Any], int]

CONFIG_FILE = "config.yaml"
"""The resolved configuration, in the folder of results."""

DESCRIPTION = """Train variational autoencoders in parallel over Horovod and MPI.

One process:    hvdvae train --data mnist
Two ranks:      mpirun -np 2 hvdvae train --data mnist      (or horovodrun -np 2, or srun)
"""


def _load_yaml(text: str) -> Any:
    """YAML whose keys may be spelled as the flags are: batch-size is batch_size."""
    loaded = yaml.safe_load(text)
    if isinstance(loaded, dict):
        return {str(key).replace("-", "_"): value for key, value in loaded.items()}
    return loaded


class Help(DefaultHelpFormatter):
    """Help that shows a default where it says something, and no Python types."""

    def _expand_help(self, action: Action) -> str:
        text = action.help or ""
        plain = action.default not in (None, SUPPRESS, False) and "[" not in text and "default" not in text
        return f"{text} [{action.default}]" if plain and action.option_strings and action.nargs != 0 else text

    def _metavar_formatter(self, action: Action, default_metavar: str) -> Any:
        choices = _choices(action)
        text = action.metavar or ("{" + ",".join(choices) + "}" if choices else "X")
        return lambda size: (text,) * size


def _choices(action: Action) -> list[str]:
    """The words of a Literal type, also of an optional one."""
    hint = getattr(action, "_typehint", None)
    return [str(word) for part in (hint, *get_args(hint)) if get_origin(part) is Literal for word in get_args(part)]


set_loader("yaml_with_flags", _load_yaml, exceptions=(yaml.YAMLError,))


def parse(argv: list[str]) -> tuple[Command, Any]:
    """The subcommand's function and its options object. Exits with status 2 and a message on a bad command line."""
    parser = ArgumentParser(
        prog="hvdvae",
        # An abbreviated --config or --resume would not be seen below; the subcommands inherit this.
        allow_abbrev=False,
        description=DESCRIPTION,
        version=_version(),
        parser_mode="yaml_with_flags",
        formatter_class=Help,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(required=True, metavar="COMMAND")
    commands.add_subcommand("train", _train_parser(argv), help="train a model")
    for name, (kind, summary) in options.SUBCOMMANDS.items():
        commands.add_subcommand(name, _options_parser(kind, name), help=summary)
    try:
        _check_files(argv)
        parsed = parser.parse_args(_files_first(argv))
    except (ArgumentError, ArgumentTypeError) as error:
        known = {"train": TrainConfig, **{name: kind for name, (kind, _) in options.SUBCOMMANDS.items()}}
        name = argv[0] if argv and argv[0] in known else ""
        hints = get_type_hints(known[name]) if name else {}
        raise ConfigError(reworded(str(error), name, hints, list(known))) from error
    name = parsed.subcommand
    values = parsed[name]
    if name == "train":
        from hvdvae.cli.train import train

        return train, _deferred(TrainConfig, values)
    module = __import__(f"hvdvae.cli.{name}", fromlist=[name])
    return getattr(module, name), _deferred(options.SUBCOMMANDS[name][0], values)


def _files_first(argv: list[str]) -> list[str]:
    """Put --config before the flags: what is parsed last rules, and flags win wherever they stand."""
    files: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--config":
            files += [word, *([value] if (value := next(words, None)) is not None else [])]
        else:
            (files if word.startswith("--config=") else rest).append(word)
    return [*rest[:1], *files, *rest[1:]]


def _check_files(argv: list[str]) -> None:
    """Refuse unknown keys and wrong values of configuration files by name."""
    files = [argv[n + 1] for n, word in enumerate(argv[:-1]) if word == "--config"]
    files += [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    for file in files:
        _read_values(Path(file), f"--config {file}")
    for saved in _saved_config(argv):
        _read_values(Path(saved), str(saved))


def _read_values(path: Path, name: str) -> dict[str, Any]:
    """Keys and values of a YAML file, of the types of TrainConfig. `name` is for messages; raises ConfigError."""
    try:
        loaded = _load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{name}: found no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{name}: found {type(loaded).__name__}, expected lines of `key: value`")
    hints = get_type_hints(TrainConfig)
    values = {}
    for key, value in loaded.items():
        if key not in hints:
            near = get_close_matches(key, hints, 1)
            hint = f": did you mean {near[0]}?" if near else "; `hvdvae train --help` lists the keys"
            raise ConfigError(f"{name} has the unknown key {key!r}{hint}")
        try:
            values[key] = checked(value, hints[key])
        except ValueError:
            raise ConfigError(f"{name}: {key} is {shown(value)}, expected {expected(hints[key])}") from None
    return values


def _deferred(kind: type, values: Namespace) -> Any:
    return kind(
        **{key: value for key, value in values.as_dict().items() if key not in ("config", "__default_config__")}
    )


def _version() -> str:
    from hvdvae import __version__

    return __version__


def _train_parser(argv: list[str]) -> ArgumentParser:
    parser = ArgumentParser(
        description="Train a model. Every flag is also a key of --config FILE.yaml; flags win.",
        default_config_files=_saved_config(argv),
        parser_mode="yaml_with_flags",
        formatter_class=Help,
        exit_on_error=False,
        usage="[mpirun -np N | horovodrun -np N | srun] hvdvae train [--config FILE.yaml] [--FLAG VALUE ...]",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the keys below")
    for group in training.GROUPS:
        _add_options(parser.add_argument_group(group.__doc__.rstrip(".") if group.__doc__ else ""), group)
    return parser


def _options_parser(kind: type, name: str) -> ArgumentParser:
    parser = ArgumentParser(
        description=inspect.getdoc(kind),
        parser_mode="yaml_with_flags",
        formatter_class=Help,
        exit_on_error=False,
        usage=f"hvdvae {name} ...",
    )
    parser.usage = None
    _add_options(parser, kind)
    return parser


def _add_options(target: Any, kind: type) -> None:
    """One argument a field of a dataclass: `folder` fields are positional, False switches are plain flags."""
    helps = {item.arg_name: item.description for item in docstring_parser.parse_from_object(kind).params}
    hints = get_type_hints(kind)
    for field in fields(kind):
        name = field.name
        text = " ".join((helps.get(name) or "").split())
        if name == "folder":
            target.add_argument(name, type=str, help=text, metavar="DIR")
        elif hints[name] is bool:
            target.add_argument(flag(name), action="store_true", help=text)
        elif hints[name] == list[int] | None:
            target.add_argument(flag(name), type=int, nargs="+", default=None, help=text, metavar="N")
        else:
            target.add_argument(flag(name), type=hints[name], default=field.default, help=text)


def _saved_config(argv: list[str]) -> list[str | os.PathLike[Any]]:
    """With --resume, the configuration saved in --out is the default, so that a resumed run is the same run."""
    if "--resume" not in argv:
        return []
    for number, argument in enumerate(argv):
        folder = argument.removeprefix("--out=") if argument.startswith("--out=") else None
        if argument == "--out" and number + 1 < len(argv):
            folder = argv[number + 1]
        if folder is not None and (Path(folder) / CONFIG_FILE).is_file():
            return [os.fspath(Path(folder) / CONFIG_FILE)]
    return []


def write_config(config: TrainConfig, path: Path) -> None:
    """Save the resolved configuration as YAML that --config accepts. Raises ConfigError naming the file."""
    values = {name: getattr(config, name) for name in TrainConfig.__dataclass_fields__}
    # How this launch was asked to treat its folder is no property of the run.
    for name in ("resume", "overwrite"):
        values.pop(name)
    try:
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def read_config(path: Path) -> TrainConfig:
    """The configuration of a run. Raises ConfigError naming the file, and the key where one is unknown or wrong."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing: is {path.parent} the --out of a training run?")
    return TrainConfig(**_read_values(path, str(path)))
