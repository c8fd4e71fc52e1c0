"""Figures in a notebook: plotly's format after a hidden style, and plain figures everywhere else."""

from __future__ import annotations

import json
import pickle

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly import io

from workbench.figures.contrast import in_dark_notebook
from workbench.figures.layer_curves import layer_curves
from workbench.figures.theme import CATEGORIES, DARK_PAGE, TEMPLATE, to_dark
from workbench.figures.themed import DARK_FILTER, ThemedFigure, is_style, themed


def curves() -> go.Figure:
    return layer_curves({"one": np.arange(3.0)}, layers=[0, 1, 2], title="", unit="nats")


@pytest.mark.parametrize(("renderer", "with_style"), [("plotly_mimetype", True), ("json", False)])
def test_the_style_precedes_the_figure_where_plotlys_format_is_shown(renderer, with_style, monkeypatch):
    display = pytest.importorskip("IPython.display", reason="needs IPython, which comes with jupyterlab")
    bundles = []
    monkeypatch.setattr(display, "display", lambda bundle, raw: bundles.append(bundle))
    monkeypatch.setattr(io.renderers, "default", renderer)
    curves()._ipython_display_()
    curves().show()
    styles = [is_style(bundle.get("text/html", "")) for bundle in bundles]
    assert styles == ([True, False] * 2 if with_style else [False] * 2)
    assert all(DARK_FILTER in bundle["text/html"] for bundle, style in zip(bundles, styles, strict=True) if style)
    assert len({str(bundle) for bundle in bundles}) == 1 + with_style  # the figure itself is the same


def test_a_figure_of_plotly_becomes_themed_and_stays_the_same():
    plain = go.Figure(go.Scatter(y=[1, 2], error_y={"array": [1, 1]}), {"title": {"text": "t"}})
    themed_figure = themed(plain)
    assert isinstance(themed_figure, ThemedFigure)
    assert themed(themed_figure) is themed_figure
    assert json.loads(themed_figure.to_json()) == json.loads(plain.to_json())
    assert isinstance(curves(), ThemedFigure)


def test_a_figure_is_what_plotly_makes_of_its_parts():
    line, none = go.Scatter(y=np.arange(3), error_y={"array": [1, 1, 1]}), {"dtick": None, "type": "log"}
    drawn = ThemedFigure([line], {"title": {"text": "t"}, "xaxis": none})
    plain = go.Figure([line]).update_layout(template=TEMPLATE, title="t", xaxis={"type": "log"})
    assert json.loads(drawn.to_json()) == json.loads(plain.to_json())
    assert drawn == plain
    for copy in (ThemedFigure(drawn), pickle.loads(pickle.dumps(drawn))):
        assert json.loads(copy.to_json()) == json.loads(drawn.to_json())


@pytest.mark.parametrize(
    "change",
    [
        lambda figure: figure.update_layout(height="high"),
        lambda figure: figure.update_xaxes(type="none"),
        lambda figure: figure.update_traces(line={"width": -1}),
        lambda figure: figure.add_scatter(mode="dots"),
    ],
)
def test_changes_of_a_figure_are_validated(change):
    with pytest.raises(ValueError, match="Invalid value"):
        change(curves())


def test_figures_share_no_template():
    first, second = curves(), curves()
    first.layout.template.layout.font.size = 99
    assert second.layout.template == TEMPLATE == curves().layout.template


@pytest.mark.parametrize(
    ("colour", "screen_colour"),  # as Chromium shows them, read from a screenshot
    [("#ffffff", "#0d0d0d"), ("#1f2430", "#ced2dd"), ("#d55e00", "#e77c28"), ("#65a6da", "#356f9e")],
)
def test_colours_in_a_dark_notebook(colour, screen_colour):
    assert in_dark_notebook(colour) == screen_colour


@pytest.mark.parametrize(
    ("colour", "dark"),
    [
        *(
            (black, "#f2f4f7")
            for black in ("black", "#000", "#000000", "Black", "rgb(0, 0, 0)", "rgba(0,0,0,1)", "#333")
        ),
        *((other, other) for other in ("white", "#fff", "red", "rgba(0,0,0,0)", "rgba(0,0,0,0.2)", CATEGORIES[0])),
        *((other, other) for other in ("#000080", "#808080")),
    ],
)
def test_no_literal_colour_is_black_on_a_dark_page(colour, dark):
    figure = go.Figure(go.Scatter(y=[1], marker={"color": [colour], "line": {"color": colour}}, text="black"))
    figure.update_xaxes(linecolor=colour).add_annotation(text="black", font={"color": colour})
    drawn = to_dark(figure)
    assert drawn.data[0].marker.color == (dark,)
    assert drawn.data[0].marker.line.color == drawn.layout.xaxis.linecolor == dark
    assert drawn.layout.annotations[0].font.color == dark
    assert (drawn.data[0].text, drawn.layout.annotations[0].text) == ("black", "black")


def test_a_white_background_is_the_page_on_a_dark_page():
    light = go.Figure().update_layout(paper_bgcolor="white", plot_bgcolor="#FFFFFF", legend={"bgcolor": "#0072b2"})
    layout = to_dark(light).layout
    assert (layout.paper_bgcolor, layout.plot_bgcolor, layout.legend.bgcolor) == (DARK_PAGE, DARK_PAGE, "#0072b2")
