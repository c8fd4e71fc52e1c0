"""Text of models and files as plotly markup: visible and inert.

Plotly parses labels as HTML and `$...$` as LaTeX, and a token can be any string.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Mapping, Set
from typing import Any

_SHOWN = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(token: str, limit: int = 24) -> str:
    """Returns a token as one line with visible white space and control characters, cut to `limit` with "…".

    A space becomes "·", a newline "⏎"; other spaces, control characters, direction marks and unassigned code points
    become escapes such as `\\u202e`.
    """
    text = token.translate(_VISIBLE)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def label(token: str, limit: int = 24) -> str:
    """Returns `visible(token)` as plotly text in which nothing can become markup, a link or LaTeX."""
    return _escaped(visible(token, limit))


def sentence(text: str) -> str:
    """Returns a line of prose as plotly text, escaped like `label`, with its spaces unchanged."""
    return _escaped(text.translate(_PRINTABLE))


def plain(markup: str) -> str:
    """Returns plotly text as plain text: the inverse of `label` and `sentence`, with line breaks as "; "."""
    return html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<br ?/?>", "; ", str(markup))))


def counted(number: int, noun: str) -> str:
    """Returns a number and the noun in its plural, where the number is not 1: "1 row", "2,000 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def axis_title(attrs: Mapping[str, Any], name: str = "") -> str:
    """Returns the axis title of a variable with these xarray `attrs`: "name (units)", or the units alone."""
    unit = str(attrs.get("units", ""))
    return sentence(f"{name} ({unit})" if name and unit else name or unit)


def _escaped(text: str) -> str:
    return html.escape(text).replace("&quot;", "&#34;").replace("$", "&#36;")  # plotly does not decode &quot;


class _Table(dict[int, str]):
    """A table for `str.translate`, filled as characters are met: a figure has a million of them."""

    def __init__(self, texts: Mapping[int, str], hidden: Set[str]) -> None:
        super().__init__(texts)
        self._hidden = hidden

    def __missing__(self, code: int) -> str:
        hidden = unicodedata.category(chr(code)) in self._hidden
        text = (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}") if hidden else chr(code)
        self[code] = text
        return text


_PRINTABLE = _Table({}, _HIDDEN)
_VISIBLE = _Table({ord(char): text for char, text in _SHOWN.items()}, _HIDDEN | {"Zs"})
