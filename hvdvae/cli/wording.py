"""What the parser says about a bad command line, in the user's words: flags instead of keys, no Python types."""

import re
from difflib import get_close_matches
from typing import Any

from hvdvae.cli.values import expected
from hvdvae.config import flag

_VALUE = re.compile(r"^Parser key \"([\w.]+)\".*?(?:Got value|Given value): ?(.*)$", re.DOTALL)
_ARGUMENT = re.compile(r"^argument ([\w-]+): (.*)$", re.DOTALL)
_CHOICE = re.compile(r"^invalid choice: '(.*?)'", re.DOTALL)


_BEHIND_DASHES = {
    "hvdvae memory": "memory has no options of a run: put those of hvdvae train behind `--`, as "
    "hvdvae memory --ranks 4 -- --hidden 8000 8000",
    "hvdvae slurm": "slurm has nothing to start: put options of hvdvae train behind `--`, --out among them, or a "
    "command of your own, as hvdvae slurm --nodes 2 -- python train.py",
    "hvdvae supervise": "supervise has no command: put it behind `--`, as hvdvae supervise -- mpirun -np 2 hvdvae "
    "train --out DIR",
}
"""Words that must be there, by program."""


def reworded(message: str, command: str, hints: dict[str, Any], commands: list[str]) -> str:
    """One line for a message of argparse or jsonargparse.

    command: the subcommand that was called, "" if none was. hints: type hints of its options. Unknown messages stay.
    """
    program = f"hvdvae {command}".strip()
    return f"{_what(message, program, hints, commands)}; see `{program} --help`"


def _what(message: str, program: str, hints: dict[str, Any], commands: list[str]) -> str:
    if found := _VALUE.match(message):
        key = found[1].rpartition(".")[2]
        if key in hints:
            return f"{flag(key)} is {found[2].strip()!r}, expected {expected(hints[key])}"
    if (found := _ARGUMENT.match(message)) and found[1] == "COMMAND" and (choice := _CHOICE.match(found[2])):
        near = _nearest(choice[1], commands)
        return f"{choice[1]!r} is no command of {program}{near}, expected one of {', '.join(commands)}"
    if found and (key := found[1].lstrip("-").replace("-", "_")) in hints:
        if found[2].startswith("is "):  # Ours (parser.Typed).
            return f"{found[1]} {found[2]}"
        if "expected" in found[2]:
            return f"{found[1]} has no value, expected {expected(hints[key])}"
        if "explicit argument" in found[2]:
            return f"{found[1]} is a switch and takes no value"
    if message.startswith("unrecognized arguments: "):
        word = message.removeprefix("unrecognized arguments: ").split()[0]
        if not word.startswith("-"):
            return f"unexpected {word!r}: expected flags, and behind each one its value"
        if word == "--" and (missing := _BEHIND_DASHES.get(program)):
            return missing
        name = word.partition("=")[0]
        near = _nearest(name, [flag(key) for key, kind in hints.items() if kind != list[str]])
        if list[str] in hints.values():
            near += ", and flags of the job stand behind `--`"
        if program == "hvdvae slurm":
            near += "; other flags of sbatch are given to sbatch itself: sbatch --FLAG job.sbatch"
        return f"{name} is no flag of {program}{near}"
    if message.startswith("the following arguments are required") and "folder" in message:
        return "DIR is missing: expected the --out of a training run"
    if message.startswith("the following arguments are required") and program in _BEHIND_DASHES:
        return _BEHIND_DASHES[program]
    if found and "expected one argument" in found[2]:
        return f"{found[1]} has no value, expected a file of options (YAML)"
    if "subcommand" in message:
        return f"no command, expected one of {', '.join(commands)}"
    return " ".join(message.split())


def _nearest(word: str, known: list[str]) -> str:
    near = get_close_matches(word, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""
