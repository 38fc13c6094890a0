"""What a flag or a key may hold, from the types of the options' fields: checks, and the words for errors."""

from types import NoneType
from typing import Any, Literal, get_args, get_origin

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def expected(hint: Any) -> str:
    """The type of a field in words: `a number`, `one of mlp, mlp2, conv`, `whole numbers`."""
    hint = _without_none(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is list:
        return "whole numbers"
    return _NAMES[hint]


def checked(value: Any, hint: Any) -> Any:
    """A value of a YAML file as the field's type; YAML takes 1e-3 for text. Raises ValueError for what is none."""
    if value is None and NoneType in get_args(hint):
        return None
    hint = _without_none(hint)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError
        return value
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError
        return [checked(item, int) for item in value]
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    # True is an int to Python, not to a user.
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError


def shown(value: Any) -> str:
    """A value as YAML writes it, in quotes where it is text."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _without_none(hint: Any) -> Any:
    """`float` of `float | None`."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(hint) else hint
