"""Flags, YAML keys and help, made from the dataclasses that hold the options (config.py, cli/options.py)."""

import glob
import inspect
from argparse import ArgumentError, ArgumentTypeError
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_loader  # type: ignore[attr-defined]

from hvdvae import config as training
from hvdvae.cli import options
from hvdvae.cli.asked import Asked
from hvdvae.cli.config_file import CONFIG_FILE, load_yaml, read_values
from hvdvae.cli.help import Help
from hvdvae.cli.wording import reworded
from hvdvae.config import TrainConfig, flag, resumed_values
from hvdvae.errors import ConfigError

Command = Callable[[Any], int]

DESCRIPTION = """Train variational autoencoders in parallel over Horovod and MPI.

One process:    hvdvae train --data mnist
Two ranks:      mpirun -np 2 hvdvae train --data mnist      (or horovodrun -np 2, or srun)
"""


set_loader("yaml_with_flags", load_yaml, exceptions=(yaml.YAMLError,))


def parse(argv: list[str]) -> tuple[Command, Any]:
    """The subcommand's function and what it takes: its options object, or `Asked` of train.

    Raises ConfigError on a bad command line.
    """
    try:
        trains = argv[:1] == ["train"]
        if trains:  # Behind `--` of another subcommand --config may stand, too, and is not ours.
            _check_files(argv)
        parsed = _parser(argv).parse_args(_files_first(argv) if trains else argv)
        name, given = parsed.subcommand, _plain(parsed[parsed.subcommand])
        if name != "train":
            module = __import__(f"hvdvae.cli.{name}", fromlist=[name])
            return getattr(module, name), options.SUBCOMMANDS[name][0](**given)
        # Only now it is known what --out and --resume are: a file of --config may say so, too.
        values, saved = given, _saved_config(given)
        if saved is not None:
            read_values(saved, str(saved))
            values = resumed_values(_plain(_parser(argv, saved).parse_args(_files_first(argv))["train"]), given)
    except (ArgumentError, ArgumentTypeError) as error:
        known = {"train": TrainConfig, **{name: kind for name, (kind, _) in options.SUBCOMMANDS.items()}}
        name = argv[0] if argv and argv[0] in known else ""
        hints = get_type_hints(known[name]) if name else {}
        raise ConfigError(reworded(str(error), name, hints, list(known))) from error
    from hvdvae.cli.train import train

    return train, Asked(given, values)


def _parser(argv: list[str], saved: Path | None = None) -> ArgumentParser:
    """Of the subcommand that is asked for, or of all. `saved`: a YAML file whose values are the defaults of train."""
    parser = ArgumentParser(
        prog="hvdvae",
        # An abbreviated --config would not be seen below; the subcommands inherit this.
        allow_abbrev=False,
        description=DESCRIPTION,
        version=_version(),
        parser_mode="yaml_with_flags",
        formatter_class=Help,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(required=True, metavar="COMMAND")
    names = ["train", *options.SUBCOMMANDS]
    for name in argv[:1] if argv and argv[0] in names else names:
        if name == "train":
            commands.add_subcommand("train", _train_parser(saved), help="train a model")
        else:
            kind, summary = options.SUBCOMMANDS[name]
            commands.add_subcommand(name, _options_parser(kind, name), help=summary)
    return parser


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
        read_values(Path(file), f"--config {file}")


def _plain(values: Namespace) -> dict[str, Any]:
    """Keys and values of the options, without what the parser keeps beside them."""
    return {key: value for key, value in values.as_dict().items() if key not in ("config", "__default_config__")}


def _version() -> str:
    from hvdvae import __version__

    return __version__


def _train_parser(saved: Path | None) -> ArgumentParser:
    parser = ArgumentParser(
        description="Train a model. Every flag is also a key of --config FILE.yaml; flags win.",
        # The parser expands patterns: a folder called "a[1]" is none.
        default_config_files=[glob.escape(str(saved))] if saved else [],
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
    """One argument a field of a dataclass: `folder` and words are positional, False switches are plain flags."""
    helps = {item.arg_name: item.description for item in docstring_parser.parse_from_object(kind).params}
    hints = get_type_hints(kind)
    for field in fields(kind):
        name = field.name
        text = " ".join((helps.get(name) or "").split())
        if name == "folder":
            target.add_argument(name, type=str, help=text, metavar="DIR")
        elif hints[name] == list[str]:
            target.add_argument(name, type=str, nargs="+", help=text, metavar="WORD")
        elif hints[name] is bool:
            target.add_argument(flag(name), action="store_true", help=text)
        elif hints[name] == list[int] | None:
            target.add_argument(flag(name), type=int, nargs="+", default=None, help=text, metavar="N")
        else:
            target.add_argument(flag(name), type=hints[name], default=field.default, help=text)


def _saved_config(given: dict[str, Any]) -> Path | None:
    """With --resume, the configuration saved in --out is the default, so that a resumed run is the same run."""
    if not given["resume"] or given["out"] is None:
        return None
    path = Path(given["out"]) / CONFIG_FILE
    return path if path.is_file() else None
