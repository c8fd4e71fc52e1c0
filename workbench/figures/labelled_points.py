"""Histograms of several groups, and points with a text each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from workbench.figures.error_bars import error_bars
from workbench.figures.log_axis import log_axis
from workbench.figures.safe_text import label, sentence
from workbench.figures.theme import NEUTRAL
from workbench.figures.themed import ThemedFigure

_BINS = 80


def labelled_histogram(
    groups: Mapping[str, Float[np.ndarray, " value"]],
    *,
    title: str,
    subtitle: str,
    unit: str,
    mark: float | None = None,
    mark_name: str = "",
) -> go.Figure:
    """Returns the distribution of each group over common bins, as shares of the group.

    Args:
        groups: Name of a group to its values.
        title: Title.
        subtitle: Line below the title.
        unit: Title of the horizontal axis.
        mark: Place of a dashed vertical line. None or NaN: none.
        mark_name: Text at that line.
    """
    pooled = np.concatenate(list(groups.values()))
    low, high = np.quantile(pooled, [0.0, 1.0]) if len(pooled) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    lines = []
    for name, values in groups.items():
        counts = np.histogram(values, edges)[0] / max(1, len(values))
        lines.append(
            go.Scatter(
                x=middles,
                y=counts,
                mode="lines",
                line={"shape": "hvh"},
                name=sentence(f"{name} ({len(values):,})"),
                hovertemplate="%{x:.3g}: %{y:.3f}",
            )
        )
    figure = ThemedFigure(lines, _layout(title, subtitle, (unit, "share of the group")))
    if mark is not None and np.isfinite(mark):
        figure.add_vline(mark, line={"dash": "dash", "color": NEUTRAL}, annotation_text=sentence(mark_name))
    return figure


def labelled_scatter(
    groups: Mapping[str, tuple[Float[np.ndarray, " point"], Float[np.ndarray, " point"], Sequence[str]]],
    *,
    title: str,
    subtitle: str,
    names: tuple[str, str],
    line: float | None = None,
    diagonal: bool = False,
    log: bool = False,
) -> go.Figure:
    """Returns a point with a text for each entry of a group.

    Args:
        groups: Name of a group to horizontal values, vertical values and texts of tokens.
        title: Title.
        subtitle: Line below the title.
        names: Titles of the axes.
        line: Height of a dashed horizontal line. None: none.
        diagonal: Draw the line of equal values.
        log: Draw the vertical axis in logarithmic scale.
    """
    points = [
        go.Scatter(
            x=x,
            y=y,
            mode="markers",
            marker={"size": 6, "opacity": 0.75},
            name=sentence(f"{name} ({len(x):,})"),
            text=[label(text) for text in texts],
            hovertemplate="%{text}<br>%{x:.3g}, %{y:.3g}",
        )
        for name, (x, y, texts) in groups.items()
    ]
    if diagonal:
        ends = [min(x.min() for x, _, _ in groups.values()), max(x.max() for x, _, _ in groups.values())]
        dashes = {"dash": "dash", "color": NEUTRAL}
        points.append(go.Scatter(x=ends, y=ends, mode="lines", line=dashes, name="equal", hoverinfo="skip"))
    figure = ThemedFigure(points, _layout(title, subtitle, names))
    marked = np.array([] if line is None else [line], float)
    if line is not None:
        figure.add_hline(line, line={"dash": "dash", "color": NEUTRAL})
    return figure.update_yaxes(**log_axis(*(y for _, y, _ in groups.values()), marked)) if log else figure


def _layout(title: str, subtitle: str, names: tuple[str, str]) -> dict[str, Any]:
    return {
        "title": {"text": sentence(title), "subtitle": {"text": sentence(subtitle)}},
        "height": 460,
        "width": 760,
        "margin": {"t": 130},
        "xaxis": {"title": {"text": sentence(names[0]) or None}},
        "yaxis": {"title": {"text": sentence(names[1])}},
    }


def category_points(
    groups: Mapping[str, Float[np.ndarray, " category"]],
    categories: Sequence[str],
    *,
    title: str,
    subtitle: str,
    unit: str,
    line: float | None = None,
    ends: Mapping[str, tuple[Float[np.ndarray, " category"], Float[np.ndarray, " category"]]] | None = None,
) -> go.Figure:
    """Returns a point for each group and category.

    Args:
        groups: Name of a group to its values.
        categories: Names on the horizontal axis.
        title: Title.
        subtitle: Line below the title.
        unit: Title of the vertical axis.
        line: Height of a dashed horizontal line. None: none.
        ends: Lower and upper ends of the intervals of the groups that have them.
    """
    points = [
        go.Scatter(
            x=[label(category) for category in categories],
            y=values,
            mode="markers",
            marker={"size": 8},
            error_y=error_bars(values, *ends[name]) if ends and name in ends else None,
            name=sentence(name),
            hovertemplate="%{x}: %{y:.3f}",
        )
        for name, values in groups.items()
    ]
    figure = ThemedFigure(points, _layout(title, subtitle, ("", unit)))
    if line is not None:
        figure.add_hline(line, line={"dash": "dash", "color": NEUTRAL})
    return figure.update_xaxes(type="category")
