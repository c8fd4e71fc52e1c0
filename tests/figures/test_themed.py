"""Figures in a notebook: plotly's format after a hidden style, and plain figures everywhere else."""

from __future__ import annotations

import json

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly import io

from workbench.figures.contrast import in_dark_notebook
from workbench.figures.layer_curves import layer_curves
from workbench.figures.themed import DARK_FILTER, ThemedFigure, is_style, themed


def curves() -> go.Figure:
    return layer_curves({"one": np.arange(3.0)}, layers=[0, 1, 2], title="", unit="nats")


@pytest.mark.parametrize(("renderer", "shown"), [("plotly_mimetype", True), ("json", False)])
def test_the_style_precedes_the_figure_where_plotlys_format_is_shown(renderer, shown, monkeypatch):
    display = pytest.importorskip("IPython.display", reason="needs IPython, which comes with jupyterlab")
    bundles = []
    monkeypatch.setattr(display, "display", lambda bundle, raw: bundles.append(bundle))
    monkeypatch.setattr(io.renderers, "default", renderer)
    curves()._ipython_display_()
    curves().show()
    styles = [is_style(bundle.get("text/html", "")) for bundle in bundles]
    assert styles == ([True, False] * 2 if shown else [False] * 2)
    assert all(DARK_FILTER in bundle["text/html"] for bundle, style in zip(bundles, styles, strict=True) if style)
    assert len({str(bundle) for bundle in bundles}) == 1 + shown  # the figure itself is the same


def test_a_figure_of_plotly_becomes_themed_and_stays_the_same():
    plain = go.Figure(go.Scatter(y=[1, 2], error_y={"array": [1, 1]}), {"title": {"text": "t"}})
    made = themed(plain)
    assert isinstance(made, ThemedFigure)
    assert themed(made) is made
    assert json.loads(made.to_json()) == json.loads(plain.to_json())
    assert isinstance(curves(), ThemedFigure)


@pytest.mark.parametrize(
    ("colour", "seen"),  # as Chromium shows them, read from a screenshot
    [("#ffffff", "#0d0d0d"), ("#1f2430", "#ced2dd"), ("#d55e00", "#e77c28"), ("#65a6da", "#356f9e")],
)
def test_colours_in_a_dark_notebook(colour, seen):
    assert in_dark_notebook(colour) == seen
