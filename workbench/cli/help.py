"""Help of a command: usage, and every argument with its meaning and default."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from workbench.cli.options import Option
from workbench.cli.terminal import line_width

_COLUMN = 26


def help_text(program: str, options: Sequence[Option], description: str) -> str:
    """Returns the help of a command, wrapped to the width of the terminal."""
    width = line_width()
    positional = [option for option in options if option.positional]
    required = [option for option in options if option.required and not option.positional]
    words = [*(_placed(option) for option in positional), *(option.usage for option in required)]
    if len(options) > len(positional) + len(required):
        words.append("[OPTIONS]")
    usage = textwrap.wrap(f"usage: {program} {' '.join(words)}", width, subsequent_indent="  ", break_on_hyphens=False)
    parts = [
        "\n".join(usage),
        *(_paragraph(part, width) for part in re.split(r"\n\s*\n", inspect.cleandoc(description))),
    ]
    groups: dict[str, list[Option]] = {"arguments": positional, "options": []}
    for option in options:
        if not option.positional:
            groups.setdefault(option.group or "options", []).append(option)
    for heading, members in groups.items():
        if members:
            parts.append("\n".join([f"{heading}:", *(line for option in members for line in _lines(option, width))]))
    return "\n\n".join(parts) + "\n"


def _placed(option: Option) -> str:
    """A positional argument in the usage line: STORE, [TEXT ...], TEXT [TEXT ...]."""
    if option.reader.several:
        return f"{option.flag} [{option.flag} ...]" if option.required else f"[{option.flag} ...]"
    return option.flag if option.required else f"[{option.flag}]"


def _paragraph(text: str, width: int) -> str:
    """A paragraph of a docstring, wrapped; indented lines stay as they are."""
    return text if text.startswith(" ") else textwrap.fill(" ".join(text.split()), width, break_on_hyphens=False)


def _lines(option: Option, width: int) -> list[str]:
    name = f"  {option.usage}"
    choices = f"One of {', '.join(option.reader.choices)}. " if option.positional and option.reader.choices else ""
    meaning = option.meaning if option.default is not None else option.meaning.replace("None:", "Default:")
    text = (choices + meaning.replace("():", "without a word:") + _default_words(option)).strip()
    below = textwrap.wrap(
        text, width, initial_indent=" " * _COLUMN, subsequent_indent=" " * _COLUMN, break_on_hyphens=False
    )
    if below and len(name) + 2 <= _COLUMN:
        below[0] = name + below[0][len(name) :]
        return below
    return [name, *below]


def _default_words(option: Option) -> str:
    if option.required:
        return " (required)"
    value: Any = option.default
    if option.reader.flag:
        return f" (default: on; --no-{option.flag[2:]} turns it off)" if value else ""
    if value is None or value == () or "Default:" in option.meaning:
        return ""
    return f" (default: {' '.join(map(str, value)) if isinstance(value, tuple) else value})"
