"""How every figure looks: plotly templates for screen and paper, and the palettes, chosen by what a colour means.

A figure is built in the light screen theme; `workbench.figures.paper` sets a copy for print, `to_dark` for a dark page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

INCH, POINT = 96.0, 96 / 72
"""plotly's pixels are CSS pixels: 96 to the inch, in SVG and PDF exactly."""

COLUMNS = {1: 3.25, 2: 6.75}
"""Width in inches of a figure over one and over two columns: ICML's and MLSys' style files (two columns of 3.25 in,
0.25 in between them). Narrower than ACM's 3.33 and IEEE's 3.5, so it fits these without scaling."""

PROBABILITY = [[0, "#f7fbff"], [0.25, "#dbe9f6"], [0.5, "#a3cce3"], [0.7, "#4a90c2"], [0.85, "#1c5fa6"], [1, "#08306b"]]
"""Sequential, light to dark, for values from none to all; light up to the middle, so that text in cells reads."""

SIGNED = [[0, "#08519c"], [0.2, "#4292c6"], [0.4, "#c6dbef"], [0.5, "#f7f7f7"], [0.6, "#fdd0a2"], [0.8, "#e6741e"]]
SIGNED += [[1, "#8c2d04"]]
"""Diverging, blue below and orange above a middle that is nearly white: give `zmid`. Blue and orange are told apart
with any colour vision, and equal distances from the middle are about equally dark."""

CATEGORIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's colours: told apart with any colour vision."""

NEUTRAL = "#9aa1ad"
"""What is there to compare with: a diagonal, a baseline, what does not count."""

MONOSPACE = "ui-monospace, Menlo, Consolas, monospace"
SANS = "Inter, Helvetica, Arial, sans-serif"
INK, GRID, PAGE = "#1f2430", "#e4e7ec", "white"
DARK_INK, DARK_GRID, DARK_PAGE = "#e4e7ec", "#343b47", "#14171f"
_DARK_PROBABILITY = [[0, "#171c26"], [0.25, "#1b2f4a"], [0.5, "#1f5080"], [0.7, "#3f86bd"], [0.85, "#86bade"]]
_DARK_PROBABILITY += [[1, "#e3f0fa"]]
_DARK_SIGNED = [[0, "#9ecae1"], [0.2, "#4292c6"], [0.4, "#1d3a5c"], [0.5, "#20242c"], [0.6, "#5a2f12"]]
_DARK_SIGNED += [[0.8, "#e6741e"], [1, "#fdc38d"]]


def _template(ink: str, grid: str, page: str) -> go.layout.Template:
    axis = {"gridcolor": grid, "linecolor": ink, "ticks": "outside", "zeroline": False, "automargin": True}
    return go.layout.Template(
        layout={
            "font": {"family": SANS, "size": 13, "color": ink},
            "title": {"x": 0.01, "xanchor": "left", "font": {"size": 16}},
            "colorway": _dark(list(CATEGORIES)) if page == DARK_PAGE else CATEGORIES,
            "paper_bgcolor": page,
            "plot_bgcolor": page,
            "margin": {"l": 70, "r": 30, "t": 70, "b": 60},
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {"font": {"family": MONOSPACE, "size": 12}, "align": "left"},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
            "updatemenudefaults": {"bgcolor": page, "bordercolor": grid, "font": {"color": ink}},
        }
    )


def _paper_template() -> go.layout.Template:
    """8 pt for what is read first, 7 pt for ticks and keys, no line under 0.5 pt: what print still shows."""
    text, small = {"size": 8 * POINT}, {"size": 7 * POINT}
    axis = {"gridcolor": GRID, "gridwidth": 0.5 * POINT, "linecolor": INK, "linewidth": 0.5 * POINT, "ticks": "outside"}
    axis |= {"ticklen": 2 * POINT, "tickwidth": 0.5 * POINT, "zeroline": False, "automargin": True, "tickfont": small}
    axis |= {"title": {"font": text, "standoff": 3 * POINT}}
    bar = {"thickness": 5 * POINT, "outlinewidth": 0, "ticklen": 2 * POINT, "tickfont": small, "title": {"font": text}}
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
            "legend": {"orientation": "h", "font": small, "itemwidth": 30, "tracegroupgap": 0}
            | {"yref": "container", "y": 0, "yanchor": "bottom", "xref": "container", "x": 0.01, "xanchor": "left"},
        },
        data={
            "scatter": [{**line, **marker, "error_y": error}],
            "bar": [{"error_y": error}],
            "heatmap": [{"colorbar": bar}],
        },
    )


def colour_bar(unit: str) -> dict[str, Any]:
    """The colour bar of a heat map of this unit, which is plotly text."""
    return {"title": {"text": unit, "side": "right"}, "thickness": 14, "outlinewidth": 0}


def to_dark(figure: go.Figure) -> go.Figure:
    """A copy for a dark page: its template, and the palettes' dark twins, which end where the page begins."""
    told = figure.to_plotly_json()
    copy = go.Figure({"data": _dark(told["data"]), "layout": _dark({**told["layout"], "template": None})})
    return copy.update_layout(template=DARK)


def _dark(value: Any, key: str = "") -> Any:
    """`value` with the light theme's colours, wherever a colour is asked for, replaced; no other text is touched."""
    if isinstance(value, Mapping):
        return {name: _dark(part, name) for name, part in value.items()}
    if key == "colorscale":
        return _TWINS.get(_scale(value), value)
    if key in ("color", "") and isinstance(value, str):
        return _DARK_COLOURS.get(value, value)
    return [_dark(part, key) for part in value] if isinstance(value, list | tuple) else value


def _scale(scale: Any) -> tuple[tuple[float, str], ...]:
    return tuple((float(at), str(colour)) for at, colour in scale)


_DARK_COLOURS = {"#000000": "#f2f4f7", INK: DARK_INK}
_TWINS = {_scale(PROBABILITY): _DARK_PROBABILITY, _scale(SIGNED): _DARK_SIGNED}

TEMPLATE = _template(INK, GRID, PAGE)
DARK = _template(DARK_INK, DARK_GRID, DARK_PAGE)
PAPER = _paper_template()
