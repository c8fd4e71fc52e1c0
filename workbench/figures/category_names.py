"""Names of categories along a horizontal axis: in one line, wrapped or turned, as their room allows."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from workbench.figures.safe_text import plain, sentence

_CHARACTER = 0.52  # mean width, in sizes of the type
_MAX_LINES = 3
_SHORT = 3  # characters that always fit: plotly leaves out labels of these


def name_ticks(names: Mapping[str, str], length: float, size: float) -> dict[str, Any]:
    """Returns ticks of categories whose names would overlap: wrapped, or turned where their words are too long.

    Args:
        names: Category to its name, as plotly text.
        length: Length of the axis in pixels.
        size: Size of the type in pixels.

    Returns:
        Properties of the axis; none where the names fit as they are.
    """
    lines = [[plain(line) for line in name.split("<br>")] for name in names.values()]
    room = int(length / max(1, len(names)) / (_CHARACTER * size) - 0.5)  # between two names half a character
    if max((len(line) for parts in lines for line in parts), default=0) <= max(room, _SHORT):
        return {}
    words = textwrap.TextWrapper(max(room, 1), break_long_words=False, break_on_hyphens=False)
    wrapped = [[part for line in parts for part in words.wrap(line)] for parts in lines]
    longest = max((len(part) for parts in wrapped for part in parts), default=0)
    turned = longest > room or max(map(len, wrapped)) > _MAX_LINES
    ticks = [[" ".join(parts)] for parts in lines] if turned else wrapped
    return {
        "tickvals": list(names),
        "ticktext": ["<br>".join(map(sentence, parts)) for parts in ticks],
        "tickangle": -90 if turned else 0,
    }
