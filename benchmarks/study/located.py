"""YAML whose every key knows its line, so that a mistake can be shown where it stands. Pure."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from hvdvae.cli.config_file import plain
from hvdvae.cli.values import number, whole
from hvdvae.cli.values import shown as _shown
from hvdvae.cli.yaml_text import Part, YamlError, parsed_yaml


class StudyError(Exception):
    """A study that cannot be run; the text names file and line."""


Path = tuple[str | int, ...]
"""Keys, and places in lists, from the top."""


@dataclass(frozen=True)
class Located:
    """A part of a YAML file."""

    name: str
    """Of the file, for messages."""
    value: Any
    """Text, None, or lists and mappings of them."""
    lines: Mapping[Path, int]
    """Of every part of the file, from 1."""
    path: Path = ()

    def error(self, message: str) -> StudyError:
        """An error at this part."""
        where = ".".join(key if len(key) < 60 else f"{key[:40]}..." for key in map(str, self.path))
        return StudyError(f"{self.name}, line {self.lines.get(self.path, 1)}: {where + ': ' if where else ''}{message}")

    def child(self, key: str | int) -> "Located":
        """A part of this part, which must be there."""
        return Located(self.name, self.value[key], self.lines, (*self.path, key))

    def mapping(self, known: Collection[str], required: Collection[str] = ()) -> dict[str, "Located"]:
        """The parts of a mapping. Raises StudyError for another kind of value, unknown keys, and missing ones."""
        parts = self.any_mapping()
        for key, part in parts.items():
            if key not in known:
                near = get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(known)}"
                raise part.error(f"unknown key; {hint}")
        for key in required:
            if key not in parts:
                raise self.error(f"has no {key!r}, which every study needs" if not self.path else f"has no {key!r}")
        return parts

    def any_mapping(self) -> dict[str, "Located"]:
        """The parts of a mapping whose keys are the user's. Raises StudyError for another kind of value."""
        if not isinstance(self.value, dict):
            raise self.error(f"found {shown(self.value)}, expected lines of `key: value`")
        return {key: self.child(key) for key in self.value}

    def items(self) -> list["Located"]:
        """The parts of a list that is not empty. Raises StudyError."""
        if not isinstance(self.value, list) or not self.value:
            raise self.error(f"found {shown(self.value)}, expected a list, as [1, 2]")
        return [self.child(place) for place in range(len(self.value))]

    def text(self) -> str:
        """Raises StudyError where it is none."""
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.error(f"found {shown(self.value)}, expected text")
        return self.value.strip()

    def whole(self, least: int) -> int:
        """A whole number of at least `least`. Raises StudyError."""
        try:
            value = whole(self.value) if isinstance(self.value, str) else least - 1
        except ValueError:
            value = least - 1
        if value < least:
            raise self.error(f"found {shown(self.value)}, expected a whole number of at least {least}")
        return value

    def number(self) -> float:
        """Raises StudyError where it is none, or not finite."""
        try:
            value = number(self.value) if isinstance(self.value, str) else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.error(f"found {shown(self.value)}, expected a number")
        return value

    def positive(self) -> float:
        """A number above 0. Raises StudyError."""
        value = self.number()
        if value <= 0:
            raise self.error(f"found {shown(self.value)}, expected a number above 0")
        return value


def shown(value: object) -> str:
    """A value in a message."""
    return "nothing" if value is None else _shown(value)


def read(text: str, name: str) -> Located:
    """Parse. Raises StudyError for what is no YAML, and for a key that stands twice."""
    try:
        found = parsed_yaml(text)
    except YamlError as error:
        raise StudyError(f"{name}{f', line {error.line}' if error.line else ''}: {error.text}") from None
    if found is None:
        raise StudyError(f"{name}, line 1: the file is empty")
    return Located(name, plain(found), dict(_lines(found, ())))


def _lines(part: Part, path: Path) -> Iterator[tuple[Path, int]]:
    yield path, part.key_line or part.line
    children: Iterable[tuple[str | int, Part]] = ()
    if isinstance(part.value, dict):
        children = part.value.items()
    elif isinstance(part.value, list):
        children = enumerate(part.value)
    for key, child in children:
        yield from _lines(child, (*path, key))
