"""Plotly templates for screen and paper, and one palette per meaning of colour.

Figures are built in the light screen theme; `workbench.figures.paper` makes a copy for print, `to_dark` one for a dark
page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

INCH, POINT = 96.0, 96 / 72
"""Plotly pixels per inch and per point: CSS pixels, 96 to the inch, exact in SVG and PDF."""

COLUMNS = {1: 3.25, 2: 6.75}
"""Figure width in inches over one and two columns, from the ICML and MLSys style files (two columns of 3.25 in with a
gap of 0.25 in). Narrower than ACM's 3.33 in and IEEE's 3.5 in, so it fits these without scaling."""

PROBABILITY = [[0, "#f7fbff"], [0.25, "#dbe9f6"], [0.5, "#a3cce3"], [0.7, "#4a90c2"], [0.85, "#1c5fa6"], [1, "#08306b"]]
"""Sequential, light to dark, for values from 0 to 1; light up to the middle, so that text in cells is legible."""

SIGNED = [[0, "#08519c"], [0.2, "#4292c6"], [0.4, "#c6dbef"], [0.5, "#f7f7f7"], [0.6, "#fdd0a2"], [0.8, "#e6741e"]]
SIGNED += [[1, "#8c2d04"]]
"""Diverging, blue below and orange above a nearly white middle (set `zmid`). Distinguishable with colour-vision
deficiency; equal distances from the middle are about equally dark."""

CELLS = [[0, "#f7fbff"], [0.25, "#e1edf8"], [0.5, "#b5d4ea"], [0.75, "#8cbce0"], [1, "#65a6da"]]
"""Sequential, for cells with text in them: black text has a contrast of 8 or more on every colour, and of 4.5 or more
where a dark notebook inverts it."""

SIGNED_CELLS = [[0, "#65a6da"], [0.25, "#a5cce9"], [0.5, "#f7f7f7"], [0.75, "#f8c59a"], [1, "#f09550"]]
"""Diverging, for cells with text in them."""

MARKERS = [[0, "#1f9ad6"], [1, "#08306b"]]
"""Sequential, for points and lines: every colour has a contrast of 3 or more to the page."""

TEXT = "#000000"
"""Colour of text in cells, on `CELLS` and `SIGNED_CELLS`."""

CATEGORIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5200", "#1f9ad6", "#000000")
"""Categorical colours, distinguishable with colour-vision deficiency: Okabe and Ito's, with their yellow and light blue
darkened on white to the contrast of 3 that a line needs."""

NEUTRAL = "#7b8494"
"""Colour of references: diagonals, baselines, excluded values."""

MASKED = "#d5d8de"
"""Colour of cells that cannot have a value, such as the keys that a causal model masks."""

CLEAR = "rgba(0,0,0,0)"
GREY = [[0, MASKED], [1, MASKED]]
MARKS = [[0, CLEAR], [0.5, TEXT], [1, CATEGORIES[1]]]
"""Marks of cells: 0 none, 1 black, 2 vermilion (`zmin` 0, `zmax` 2)."""

MONOSPACE = "ui-monospace, Menlo, Consolas, monospace"
SANS = "Inter, Helvetica, Arial, sans-serif"
INK, GRID, PAGE = "#1f2430", "#e4e7ec", "white"
DARK_INK, DARK_GRID, DARK_PAGE = "#e4e7ec", "#343b47", "#14171f"
_DARK_PROBABILITY = [[0, "#171c26"], [0.25, "#1b2f4a"], [0.5, "#1f5080"], [0.7, "#3f86bd"], [0.85, "#86bade"]]
_DARK_PROBABILITY += [[1, "#e3f0fa"]]
_DARK_SIGNED = [[0, "#9ecae1"], [0.2, "#4292c6"], [0.4, "#1d3a5c"], [0.5, "#20242c"], [0.6, "#5a2f12"]]
_DARK_SIGNED += [[0.8, "#e6741e"], [1, "#fdc38d"]]
_DARK_CELLS = [[0, "#171c26"], [0.25, "#1a2a41"], [0.5, "#1c3b60"], [0.75, "#204e80"], [1, "#28609b"]]
_DARK_SIGNED_CELLS = [[0, "#28609b"], [0.25, "#1d3f66"], [0.5, "#20242c"], [0.75, "#5a3413"], [1, "#8f4d14"]]
_DARK_MARKERS = [[0, "#3f86bd"], [1, "#e3f0fa"]]
_DARK_MASKED = "#3a404c"


NUMBERS = {"exponentformat": "power", "minexponent": 5, "separatethousands": True}
"""Ticks of axes and colour bars: 20,000 and 0.00001, and powers of ten beyond; plotly's own are 20k and 10µ."""


def _template(ink: str, grid: str, page: str) -> go.layout.Template:
    axis = {"gridcolor": grid, "linecolor": ink, "ticks": "outside", "zeroline": False, "automargin": True, **NUMBERS}
    axis |= {"title": {"standoff": 8}}  # by the width that labels really have: those of logarithmic axes are wide
    return go.layout.Template(
        layout={
            "font": {"family": SANS, "size": 13, "color": ink},
            "title": {"x": 0.01, "xanchor": "left", "font": {"size": 16}}
            | {"y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 14}},  # away from a legend of two lines
            "colorway": _dark(list(CATEGORIES)) if page == DARK_PAGE else CATEGORIES,
            "paper_bgcolor": page,
            "plot_bgcolor": page,
            "margin": {"l": 70, "r": 30, "t": 70, "b": 60},
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {"font": {"family": MONOSPACE, "size": 12}, "align": "left"},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
            "updatemenudefaults": {"bgcolor": page, "bordercolor": grid, "font": {"color": ink}},
            "coloraxis": {"colorbar": NUMBERS},
        },
        data=_traces(ink),
    )


def _traces(ink: str) -> dict[str, Any]:
    """Colour bars of the traces of a template, and intervals of bars, which plotly draws in dark grey."""
    marker = {"marker": {"colorbar": NUMBERS}}
    intervals = {"error_x": {"color": ink}, "error_y": {"color": ink}}
    return {"heatmap": [{"colorbar": NUMBERS}], "scatter": [marker], "bar": [{**marker, **intervals}]}


def _paper_template() -> go.layout.Template:
    """Text of 8 pt, ticks and legend of 7 pt, no line under 0.5 pt, the thinnest that prints."""
    text, small = {"size": 8 * POINT}, {"size": 7 * POINT}
    axis = {"gridcolor": GRID, "gridwidth": 0.5 * POINT, "linecolor": INK, "linewidth": 0.5 * POINT, "ticks": "outside"}
    axis |= {"ticklen": 2 * POINT, "tickwidth": 0.5 * POINT, "zeroline": False, "automargin": True, "tickfont": small}
    axis |= {"title": {"font": text, "standoff": 3 * POINT}, **NUMBERS}
    bar = {
        **NUMBERS,
        "thickness": 5 * POINT,
        "outlinewidth": 0,
        "ticklen": 2 * POINT,
        "tickfont": small,
        "title": {"font": text},
    }
    error = {"thickness": 0.5 * POINT, "width": 1.5 * POINT}
    line, marker = {"line": {"width": POINT}}, {"marker": {"size": 3 * POINT}}
    return go.layout.Template(
        layout={
            "font": {"family": "Helvetica, Arial, Liberation Sans, sans-serif", "size": 8 * POINT, "color": INK},
            "colorway": CATEGORIES,
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "margin": {"l": 4, "r": 4, "t": 6, "b": 4},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "font": small, "itemwidth": 30, "tracegroupgap": 0, "maxheight": 1}
            | {"yref": "container", "y": 0, "yanchor": "bottom", "xref": "container", "x": 0.01, "xanchor": "left"},
        },
        data={
            "scatter": [{**line, **marker, "error_y": error}],
            "bar": [{"error_y": error}],
            "heatmap": [{"colorbar": bar}],
        },
    )


def colour_bar(unit: str) -> dict[str, Any]:
    """Returns the colour bar of a heat map; `unit`, its title, is plotly markup."""
    return {"title": {"text": unit, "side": "right"}, "thickness": 14, "outlinewidth": 0}


BELOW_TOP = {"pad": {"t": 40}}
"""Place of the title of a figure with a `top_bar`: plotly moves it up by half of what such a bar takes, 26 pixels."""


def top_bar(unit: str) -> dict[str, Any]:
    """Returns a colour bar above a heat map, at its left edge, which stays in view however wide the heat map is."""
    place = {"orientation": "h", "x": 0, "xanchor": "left", "xpad": 0, "y": 1, "yanchor": "bottom", "ypad": 6}
    title = {"text": unit, "side": "top", "font": {"size": 12}}
    return {"title": title, "thickness": 10, "outlinewidth": 0, "lenmode": "pixels", "len": 220, "nticks": 5, **place}


def to_dark(figure: go.Figure) -> go.Figure:
    """Returns a copy for a dark page, with the dark template and the dark counterpart of each palette."""
    return go.Figure(to_dark_spec(figure.to_plotly_json()))


def to_dark_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `to_dark` does to a figure, of its specification: its data and layout as plain values."""
    return {
        "data": _dark(spec["data"]),
        "layout": {**_dark({**spec["layout"], "template": None}), "template": _DARK_SPEC},
    }


def _dark(value: Any, key: str = "") -> Any:
    """`value` with the light theme's colours replaced where a colour is expected; other text is unchanged."""
    if key in _WITHOUT_COLOURS:
        return value
    if isinstance(value, Mapping):
        return {name: _dark(part, name) for name, part in value.items()}
    if key == "colorscale":
        return _DARK_SCALES.get(_scale(value), value)
    if isinstance(value, str):
        return _dark_colour(value, key)
    return [_dark(part, key) for part in value] if isinstance(value, list | tuple) else value


def _dark_colour(colour: str, key: str) -> str:
    """A colour on a dark page: black and greys near it are the colour of text, and a white background is the page."""
    if key in ("color", "") and colour in _DARK_COLOURS:
        return _DARK_COLOURS[colour]
    parts = _parts(colour) if key.endswith("color") else None
    if parts is None:
        return colour
    if key.endswith("bgcolor"):
        return DARK_PAGE if min(parts) >= _WHITE else colour
    return _DARK_COLOURS[TEXT] if max(parts) <= _BLACK and max(parts) - min(parts) <= _GREY else colour


def _parts(colour: str) -> tuple[int, ...] | None:
    """Red, green and blue of an opaque colour of plotly; None for what is none, and for most names."""
    name = colour.strip().lower()
    name = {"black": "#000000", "white": "#ffffff"}.get(name, name)
    if match := re.fullmatch(r"#([0-9a-f]{3}|[0-9a-f]{6})", name):
        digits = match[1] if len(match[1]) == 6 else "".join(2 * digit for digit in match[1])
        return tuple(int(digits[at : at + 2], 16) for at in (0, 2, 4))
    match = re.fullmatch(r"rgba?\((\d+),\s*(\d+),\s*(\d+)(,\s*1(\.0*)?)?\)", name)
    return tuple(map(int, match.groups()[:3])) if match else None


def _scale(scale: Any) -> tuple[tuple[float, str], ...]:
    return tuple((float(position), str(colour)) for position, colour in scale)


_BLACK, _WHITE, _GREY = (
    0x55,
    0xF0,
    0x18,
)  # most of a part of black, least of white, most by which parts of a grey differ
_WITHOUT_COLOURS = {"x", "y", "z", "text", "customdata", "hovertext", "tickvals", "ticktext", "meta"}
_DARK_COLOURS = {TEXT: "#f2f4f7", INK: DARK_INK, MASKED: _DARK_MASKED, "#7a5200": "#e69f00", "#1f9ad6": "#56b4e9"}
_DARK_SCALES = {
    _scale(PROBABILITY): _DARK_PROBABILITY,
    _scale(SIGNED): _DARK_SIGNED,
    _scale(CELLS): _DARK_CELLS,
    _scale(SIGNED_CELLS): _DARK_SIGNED_CELLS,
    _scale(MARKERS): _DARK_MARKERS,
    _scale(GREY): [[0, _DARK_MASKED], [1, _DARK_MASKED]],
    _scale(MARKS): [[0, CLEAR], [0.5, "#f2f4f7"], [1, CATEGORIES[1]]],
}

TEMPLATE = _template(INK, GRID, PAGE)
DARK = _template(DARK_INK, DARK_GRID, DARK_PAGE)
PAPER = _paper_template()
_DARK_SPEC: dict[str, Any] = json.loads(json.dumps(DARK.to_plotly_json()))


def colour_on(dark: bool, colour: str) -> str:
    """Returns a colour of the light theme as the page shows it."""
    return _DARK_COLOURS.get(colour, colour) if dark else colour


def palette_on(dark: bool, palette: list[list[Any]]) -> list[list[Any]]:
    """Returns a palette of the light theme as the page shows it."""
    return _DARK_SCALES.get(_scale(palette), palette) if dark else palette
