"""YAML whose every key knows its line, so that a mistake can be shown where it stands. Pure."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import yaml


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
    lines: Mapping[Path, int]
    """Of every part of the file, from 1."""
    path: Path = ()

    def error(self, message: str) -> StudyError:
        """An error at this part."""
        where = ".".join(map(str, self.path))
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
        if not isinstance(self.value, int) or isinstance(self.value, bool) or self.value < least:
            raise self.error(f"found {shown(self.value)}, expected a whole number of at least {least}")
        return self.value

    def number(self) -> float:
        """Raises StudyError where it is none, or not finite."""
        # YAML 1.1 takes 1e-3 for text.
        try:
            value = float("nan") if isinstance(self.value, bool) else float(self.value)
        except (TypeError, ValueError):
            value = float("nan")
        if value - value != 0:
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
    return "nothing" if value is None else repr(value)


def read(text: str, name: str) -> Located:
    """Parse. Raises StudyError for what is no YAML, and for a key that stands twice."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise StudyError(f"{name}, line {mark.line + 1 if mark else 1}: no YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise StudyError(f"{name}: no YAML: {' '.join(str(error).split())}") from None
    lines: dict[Path, int] = {}
    if node is None:
        raise StudyError(f"{name}, line 1: the file is empty")
    return Located(name, _value_of(node, (), lines, name), lines)


def _value_of(node: yaml.Node, path: Path, lines: dict[Path, int], name: str) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        found = {}
        for key_node, value_node in node.value:
            key = str(_plain(key_node))
            line = key_node.start_mark.line + 1
            if key in found:
                raise StudyError(f"{name}, line {line}: {'.'.join(map(str, (*path, key)))} stands twice")
            lines[(*path, key)] = line
            found[key] = _value_of(value_node, (*path, key), lines, name)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_value_of(item, (*path, place), lines, name) for place, item in enumerate(node.value)]
    return _plain(node)


def _plain(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()
