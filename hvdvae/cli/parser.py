"""Flags, YAML keys and help, made from the dataclasses that hold the options (config.py, cli/options.py)."""

import inspect
import os
from argparse import ArgumentError, ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser, Namespace

from hvdvae import config as training
from hvdvae.cli import options
from hvdvae.cli.asked import Asked
from hvdvae.cli.config_file import CONFIG_FILE, expanded, read_values
from hvdvae.cli.help import Help
from hvdvae.cli.values import PATHS, checked, expected, shown
from hvdvae.cli.wording import reworded
from hvdvae.config import TrainConfig, flag, resumed_values
from hvdvae.errors import ConfigError

Command = Callable[[Any], int]

DESCRIPTION = """Train variational autoencoders in parallel over Horovod and MPI.

One process:    hvdvae train --data mnist
Two ranks:      mpirun -np 2 hvdvae train --data mnist      (or horovodrun -np 2, or srun)
"""


class Typed:
    """The type of an argument: reads the text of a flag as the same key's in a file is read."""

    def __init__(self, key: str, hint: Any, *, in_list: bool = False) -> None:
        """`key`: of the option. `hint`: the type of its field, or of an item of its list."""
        self.key, self.hint, self.in_list = key, hint, in_list

    def __call__(self, value: Any) -> Any:
        """A value of the hint; of what is one already, itself."""
        if not isinstance(value, str):
            return value
        # Of a name that may be left out, too, a flag gives the text that it has.
        hint = str if self.hint == str | None else self.hint
        try:
            found = checked(value, hint)
        except ValueError as error:
            kind = list[int] if self.in_list else self.hint
            raise ArgumentTypeError(f"is {shown(value)}, expected {expected(kind, error)}") from None
        return expanded(found, flag(self.key)) if self.key in PATHS and found is not None else found


def parse(argv: list[str]) -> tuple[Command, Any]:
    """The subcommand's function and what it takes: its options object, or `Asked` of train.

    Raises ConfigError on a bad command line.
    """
    try:
        asked: dict[str, Any] = {}
        if argv[:1] == ["train"]:  # Behind `--` of another subcommand --config may stand, too, and is not ours.
            files, argv = _files_of(argv)
            for file in files:
                asked |= read_values(Path(expanded(file, "--config")), f"--config {file}")
        parsed = _parser(argv, asked).parse_args(argv)
        name, given = parsed.subcommand, _plain(parsed[parsed.subcommand])
        if name != "train":
            module = __import__(f"hvdvae.cli.{name}", fromlist=[name])
            return getattr(module, name), options.SUBCOMMANDS[name][0](**given)
        # Only now it is known what --out and --resume are: a file of --config may say so, too.
        values, saved = given, _saved_config(given)
        if saved is not None:
            before = {**read_values(saved, str(saved)), **asked}
            values = resumed_values(_plain(_parser(argv, before).parse_args(argv)["train"]), given)
    except (ArgumentError, ArgumentTypeError) as error:
        known = {"train": TrainConfig, **{name: kind for name, (kind, _) in options.SUBCOMMANDS.items()}}
        name = argv[0] if argv and argv[0] in known else ""
        hints = get_type_hints(known[name]) if name else {}
        raise ConfigError(reworded(str(error), name, hints, list(known))) from error
    from hvdvae.cli.train import train

    return train, Asked(given, values, frozenset({*asked, *_flags_of(argv)}))


def _parser(argv: list[str], values: Mapping[str, Any]) -> ArgumentParser:
    """Of the subcommand that is asked for, or of all. `values`: of files, in the place of the defaults of train."""
    parser = ArgumentParser(
        prog="hvdvae",
        # An abbreviated --config would not be seen below; the subcommands inherit this.
        allow_abbrev=False,
        description=DESCRIPTION,
        version=_version(),
        formatter_class=Help,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(required=True, metavar="COMMAND")
    names = ["train", *options.SUBCOMMANDS]
    for name in argv[:1] if argv and argv[0] in names else names:
        if name == "train":
            commands.add_subcommand("train", _train_parser(values), help="train a model")
        else:
            kind, summary = options.SUBCOMMANDS[name]
            commands.add_subcommand(name, _options_parser(kind, name), help=summary)
    return parser


def _files_of(argv: list[str]) -> tuple[list[str], list[str]]:
    """The files of --config, and the words besides them: flags win over files wherever they stand."""
    files: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--config" and (value := next(words, None)) is not None:
            files.append(value)
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    return files, rest


def _flags_of(argv: list[str]) -> set[str]:
    """Keys of train whose flags stand in words that parse, be it with their default values."""
    flags = {flag(name): name for name in TrainConfig.__dataclass_fields__}
    return {flags[word] for word in (word.partition("=")[0] for word in argv) if word in flags}


def _plain(values: Namespace) -> dict[str, Any]:
    """Keys and values of the options, without what the parser keeps beside them."""
    return {key: value for key, value in values.as_dict().items() if key != "config"}


def _version() -> str:
    from hvdvae import __version__

    return __version__


def _train_parser(values: Mapping[str, Any]) -> ArgumentParser:
    parser = ArgumentParser(
        description="Train a model. Every flag is also a key of --config FILE.yaml; flags win.",
        formatter_class=Help,
        exit_on_error=False,
        usage="[mpirun -np N | horovodrun -np N | srun] hvdvae train [--config FILE.yaml] [--FLAG VALUE ...]",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys below")
    for group in training.GROUPS:
        _add_options(parser.add_argument_group(group.__doc__.rstrip(".") if group.__doc__ else ""), group)
    parser.set_defaults(dict(values))
    return parser


def _options_parser(kind: type, name: str) -> ArgumentParser:
    parser = ArgumentParser(
        description=inspect.getdoc(kind),
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
            target.add_argument(name, type=Typed(name, str), help=text, metavar="DIR")
        elif hints[name] == list[str]:
            target.add_argument(name, type=str, nargs="+", help=text, metavar="WORD")
        elif hints[name] is bool:
            target.add_argument(flag(name), action="store_true", help=text)
        elif hints[name] == list[int] | None:
            target.add_argument(
                flag(name), type=Typed(name, int, in_list=True), nargs="+", default=None, help=text, metavar="N"
            )
        else:
            target.add_argument(flag(name), type=Typed(name, hints[name]), default=field.default, help=text)


def _saved_config(given: dict[str, Any]) -> Path | None:
    """With --resume, the configuration saved in --out is the default, so that a resumed run is the same run."""
    if not given["resume"] or given["out"] is None:
        return None
    path = Path(given["out"]) / CONFIG_FILE
    return path if os.path.lexists(path) else None
