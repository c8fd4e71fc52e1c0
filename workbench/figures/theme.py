"""How every figure looks: one plotly template and the palettes, chosen by what a colour means."""

from __future__ import annotations

import plotly.graph_objects as go

PROBABILITY = [[0, "#f7fbff"], [0.25, "#dbe9f6"], [0.5, "#a3cce3"], [0.7, "#4a90c2"], [0.85, "#1c5fa6"], [1, "#08306b"]]
"""Sequential, light to dark, for values from none to all; light up to the middle, so that text in cells reads."""

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
