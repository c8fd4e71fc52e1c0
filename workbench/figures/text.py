"""Model text in figures. plotly reads labels as HTML and `$...$` as LaTeX, and a token can be anything."""

from __future__ import annotations

import html
import unicodedata

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
    return html.escape(visible(token, limit)).replace("$", "&#36;")


def _printable(char: str) -> str:
    if unicodedata.category(char) in _HIDDEN:
        return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
    return char
