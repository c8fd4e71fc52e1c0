"""Model text in figures. plotly reads labels as HTML and `$...$` as LaTeX, and a token can be anything."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

_SHOWN = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(token: str, limit: int = 24) -> str:
    """A token as one line that shows its white space and control characters; longer ones end in "…".

    A space is "·", a newline "⏎"; controls, direction marks and unassigned code points are written `\\u202e`.
    """
    shown = "".join(_SHOWN.get(char) or _printable(char) for char in token)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def label(token: str, limit: int = 24) -> str:
    """`visible`, and safe as a plotly text: nothing in it can become markup, a link or LaTeX."""
    return _escaped(visible(token, limit))


def sentence(text: str) -> str:
    """A line of prose that may hold text of models or files: safe as `label` is, its spaces left as they are."""
    return _escaped("".join(map(_printable, text)))


def plain(markup: str) -> str:
    """What a plotly text says, as plain text: the inverse of `label` and `sentence`, with line breaks as "; "."""
    return html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<br ?/?>", "; ", str(markup))))


def axis_title(attrs: Mapping[str, Any], name: str = "") -> str:
    """The title of an axis that shows a variable with these `attrs`: "name (units)", or the units alone."""
    unit = str(attrs.get("units", ""))
    return sentence(f"{name} ({unit})" if name and unit else name or unit)


def _escaped(text: str) -> str:
    return html.escape(text).replace("&quot;", "&#34;").replace("$", "&#36;")  # plotly knows no &quot;


def _printable(char: str) -> str:
    if unicodedata.category(char) in _HIDDEN:
        return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
    return char
