"""How --help reads."""

from argparse import SUPPRESS, Action
from typing import Any, Literal, get_args, get_origin

from jsonargparse import DefaultHelpFormatter


class Help(DefaultHelpFormatter):
    """Help that shows a default where it says something, and no Python types."""

    def _expand_help(self, action: Action) -> str:
        text = action.help or ""
        plain = action.default not in (None, SUPPRESS, False) and "[" not in text and "default" not in text
        return f"{text} [{action.default}]" if plain and action.option_strings and action.nargs != 0 else text

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # What stands in columns stays in them; all else is filled.
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            paragraph if "   " in paragraph else super(Help, self)._fill_text(paragraph, width, indent)
            for paragraph in paragraphs
        )

    def _metavar_formatter(self, action: Action, default_metavar: str) -> Any:
        choices = _choices(action)
        text = action.metavar or ("{" + ",".join(choices) + "}" if choices else "X")
        return lambda size: (text,) * size


def _choices(action: Action) -> list[str]:
    """The words of a Literal type, also of an optional one."""
    hint = getattr(action.type, "hint", None)
    return [str(word) for part in (hint, *get_args(hint)) if get_origin(part) is Literal for word in get_args(part)]
