"""What a flag or a key may hold, from the types of the options' fields: one reader for both, and the words for errors.

A value is the text of a flag or of a YAML file, or a list of texts; what it means follows from its field alone.
"""

import os
import re
from collections.abc import Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_WHOLE = re.compile(r"[-+]?(0x[0-9a-f]+|0o[0-7]+|0b[01]+|[0-9]+(_[0-9]+)*)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(\.?[0-9][0-9_]*\.?[0-9_]*(e[-+]?[0-9]+)?|\.?inf(inity)?|\.?nan)", re.IGNORECASE)
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_LARGEST = 2**63
"""That a whole number stays below, in either direction."""
_BELOW = "a whole number below 2**63"
_LONGEST = 60
"""Characters of a value that a message shows."""
PATHS = ("config", "data", "out", "folder", "checkpoint", "output")
"""Options that are paths, in which ~ is a home."""


def expected(hint: Any, error: ValueError | None = None) -> str:
    """The type of a field in words: `a number`, `one of mlp, mlp2, conv`, `whole numbers`.

    `error`: what `checked` has raised, which may know more.
    """
    if error is not None and error.args == (_BELOW,):
        return _BELOW
    hint = _without_none(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is list:
        return "whole numbers" if get_args(hint) == (int,) else "words"
    return _NAMES[hint]


def checked(value: str | Sequence[Any] | None, hint: Any) -> Any:
    """A text, texts, or nothing, as the field's type. Raises ValueError for what is none of it. Pure."""
    is_optional = NoneType in get_args(hint)
    hint = _without_none(hint)
    if value is None:
        if is_optional:
            return None
        raise ValueError
    if get_origin(hint) is list:
        if isinstance(value, str):
            raise ValueError
        (kind,) = get_args(hint)
        return [checked(item, kind) for item in value]
    if not isinstance(value, str):
        raise ValueError
    if get_origin(hint) is Literal:
        for choice in get_args(hint):
            if value == str(choice):
                return choice
    if hint is str:
        return value
    if is_optional and value in ("null", "none"):
        return None
    if hint is bool:
        return _bool(value)
    if hint is int:
        return whole(value)
    if hint is float:
        return number(value)
    raise ValueError


def whole(text: str) -> int:
    """12, 1_000, 0x1f; 010 is ten. Raises ValueError, also beyond 64 bits. Pure."""
    if not _WHOLE.fullmatch(text):
        raise ValueError
    if len(text) > 4 * _LONGEST:  # Python itself refuses thousands of digits.
        raise ValueError(_BELOW)
    found = int(text, 0) if re.match(r"[-+]?0[xob]", text, re.IGNORECASE) else int(text)
    if abs(found) >= _LARGEST:
        raise ValueError(_BELOW)
    return found


def number(text: str) -> float:
    """1, 1e-3, .5, inf. Raises ValueError, also for hours and minutes. Pure."""
    if _NUMBER.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return float(whole(text))


def _bool(text: str) -> bool:
    if text.lower() not in _BOOLS:
        raise ValueError
    return _BOOLS[text.lower()]


def path_of(text: str) -> str:
    """A path whose ~ or ~user is that home. Raises ValueError where there is none. Local."""
    found = os.path.expanduser(text)
    if text.startswith("~") and found == text:
        raise ValueError
    return found


def shown(value: object) -> str:
    """A value in a message: text in quotes, but for numbers and true and false; and not more than fits a line."""
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return _short("[" + ", ".join(map(shown, value)) + "]")
    text = str(value)
    if not isinstance(value, str):
        return _short(text.lower() if isinstance(value, bool) else text)
    is_plain = text.lower() in _BOOLS or _WHOLE.fullmatch(text) or _NUMBER.fullmatch(text)
    return _short(text if is_plain else repr(text))


def _short(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 20]}... ({len(text)} characters)"


def _without_none(hint: Any) -> Any:
    """`float` of `float | None`."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(hint) else hint
