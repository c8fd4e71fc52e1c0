"""How every figure looks: one plotly template and the palettes, chosen by what a colour means."""

from __future__ import annotations

import plotly.graph_objects as go

PROBABILITY = [
    [0.0, "#f7fbff"],
    [0.2, "#d0e1f2"],
    [0.4, "#94c4df"],
    [0.6, "#4a98c9"],
    [0.8, "#1764ab"],
    [1.0, "#08306b"],
]
"""Sequential, light to dark, equal steps of lightness: for values from none to all."""

CATEGORIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's colours: told apart with any colour vision."""

MONOSPACE = "ui-monospace, Menlo, Consolas, monospace"
INK, GRID = "#1f2430", "#e4e7ec"

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "Inter, Helvetica, Arial, sans-serif", "size": 13, "color": INK},
        "title": {"x": 0.01, "xanchor": "left", "font": {"size": 16}},
        "colorway": CATEGORIES,
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 70, "r": 30, "t": 70, "b": 60},
        "xaxis": {"gridcolor": GRID, "linecolor": INK, "ticks": "outside", "zeroline": False, "automargin": True},
        "yaxis": {"gridcolor": GRID, "linecolor": INK, "ticks": "outside", "zeroline": False, "automargin": True},
        "hoverlabel": {"font": {"family": MONOSPACE, "size": 12}, "align": "left"},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    }
)
