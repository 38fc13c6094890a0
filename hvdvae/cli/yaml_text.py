"""YAML in which every value is the text that stands in the file, and knows its line. Pure.

YAML 1.1 makes 8 of 010, 750 of 12:30, 20261130 of 2026_11_30, a date of 2026-11-30 and false of `no`; what a value
means is its key's affair (values.py). Anchors, aliases and tags, by which 300 bytes can become gigabytes, are refused,
as is what nobody writes by hand: 20 levels, or several documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from hvdvae.cli.values import shown

DEEPEST = 20
"""Levels, one in the other."""


class YamlError(Exception):
    """What is no YAML, or more of it than is read here; the text says the line."""

    def __init__(self, line: int, text: str) -> None:
        """`line`: from 1; 0 where nobody knows it."""
        super().__init__(f"line {line}: {text}" if line else text)
        self.line, self.text = line, text


@dataclass(frozen=True)
class Part:
    """A value and its line, from 1: text, None for an empty one or null, a list, or a mapping."""

    line: int
    value: str | list["Part"] | dict[str, "Part"] | None
    key_line: int = 0
    """Of the key that it has, where it has one."""


_Events = Iterator[yaml.Event]
_NOTHING = ("", "null", "Null", "NULL")


def parsed_yaml(text: str) -> Part | None:
    """The document of a text; None where there is none. Raises YamlError."""
    try:
        events = yaml.parse(text, yaml.SafeLoader)
        found = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if found is not None:
                    raise YamlError(_line(event), "a second document begins, expected one")
                found = _part(next(events), events, 1)
        return found
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(mark.line + 1 if mark else 0, f"found no YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise YamlError(0, f"found no YAML ({' '.join(str(error).split())})") from None


def _part(event: yaml.Event, events: _Events, depth: int, key_line: int = 0) -> Part:
    line = _line(event)
    if isinstance(event, yaml.AliasEvent):
        raise YamlError(line, f"found the alias *{event.anchor}: write the value out, aliases are not taken")
    if anchor := getattr(event, "anchor", None):
        raise YamlError(line, f"found the anchor &{anchor}: write the value alone, anchors are not taken")
    if tag := getattr(event, "tag", None):
        named = tag.replace("tag:yaml.org,2002:", "!!")
        raise YamlError(line, f"found the tag {named}: write the value alone, tags are not taken")
    if depth > DEEPEST:
        raise YamlError(line, f"found more than {DEEPEST} levels, one in the other")
    if isinstance(event, yaml.ScalarEvent):
        is_nothing = event.style is None and event.value in _NOTHING
        return Part(line, None if is_nothing else event.value, key_line)
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            items.append(_part(item, events, depth + 1))
        return Part(line, items, key_line)
    found: dict[str, Part] = {}
    while not isinstance(item := next(events), yaml.MappingEndEvent):
        key = _part(item, events, depth + 1)
        if not isinstance(key.value, str):
            raise YamlError(key.line, "found a key that is no word")
        if key.value in found:
            raise YamlError(key.line, f"the key {shown(key.value)} stands twice")
        found[key.value] = _part(next(events), events, depth + 1, key.line)
    return Part(line, found, key_line)


def _line(event: yaml.Event) -> int:
    return int(event.start_mark.line) + 1 if event.start_mark is not None else 0


def in_words(part: Part) -> str:
    """The kind of a value, for messages. Pure."""
    kinds = {list: "a list", dict: "a mapping", str: "text"}
    return "nothing" if part.value is None else kinds[type(part.value)]
