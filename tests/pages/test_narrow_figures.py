"""Figures on a phone and in small windows: what the page draws, measured in a browser."""

from __future__ import annotations

import json

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.subplots import make_subplots

import workbench as wb
from tests.support.browser import chromium, overlapping
from workbench.figures.layer_curves import layer_curves
from workbench.figures.token_grid import Marks, token_grid
from workbench.figures.token_strip import restrip, token_strip
from workbench.pages.report import Section, write_report

PHONE = 390
MEASURE = """(() => {
  const plot = document.getElementById("figure"), { _size, width } = plot._fullLayout;
  const page = plot.querySelector("svg.main-svg").getBoundingClientRect();
  const texts = [...plot.querySelectorAll("svg text")].filter(text => text.textContent.trim()).map(text => {
    const box = text.getBoundingClientRect();
    return [text.textContent, box.left - page.left, box.top - page.top, page.right - box.right,
      page.bottom - box.bottom, box.width, box.height];
  }).filter(text => text[5] > 0);
  const cells = plot.data.map(({ text, customdata, z }) => ({ text, customdata, z: z?.bdata ? null : z }));
  return JSON.stringify({ texts, cells, width, plot: [_size.w, _size.h], page: document.documentElement.scrollWidth });
})()"""


def grid(tokens: int) -> go.Figure:
    texts = [[f"w{at}.{layer}" for at in range(tokens)] for layer in range(4)]
    names = {"tokens": [f"in{at}" for at in range(tokens)], "positions": range(tokens), "layers": range(4)}
    marked = np.ones((4, tokens), bool)
    title = {"title": "Lens of a model, resid_post", "subtitle": f"cell: {'a word ' * 15}", "unit": "probability"}
    return token_grid(np.zeros((4, tokens)), cells=texts, hover=texts, marks=Marks(marked, marked), **names, **title)


def strip() -> go.Figure:
    """Two paragraphs, the second with a run from right to left that no line of four tokens holds."""
    words = [*(f"{at:09}" for at in range(10)), "\n", "a", "b", *(chr(0x5D0 + at) * 4 for at in range(7)), "c"]
    title = {"title": "t", "subtitle": "s", "unit": "nats"}
    return token_strip(np.arange(21) / 10, tokens=words, positions=range(100, 121), **title)


def series() -> go.Figure:
    names = [f"a class of words, {number}" for number in range(9)]
    figure = layer_curves({name: np.arange(24.0) for name in names}, layers=range(24), title="t", unit="ratio")
    return figure.update_layout(legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"})


def bars() -> go.Figure:
    names = [f"a name of a bar that is longer than a third of a phone, {number}" for number in range(9)]
    figure = go.Figure(go.Bar(x=np.arange(9), y=names, orientation="h"), {"title": {"text": "t"}})
    return figure.update_xaxes(title="% of (occurrence, head) that are hidden sinks of the text")


def groups() -> go.Figure:
    names = [f"a class<br>{number},000" for number in range(11)]
    figure = go.Figure(go.Scatter(x=list(range(11)), y=list(range(11)), mode="markers"))
    return figure.update_xaxes(tickvals=list(range(11)), ticktext=names, tickangle=0)


def cells() -> go.Figure:
    bar = {"title": {"text": "alpha (attention)", "side": "right"}}
    return go.Figure(go.Heatmap(z=np.eye(8), colorbar=bar)).update_xaxes(title="head").update_yaxes(title="layer")


def panels() -> go.Figure:
    figure = make_subplots(1, 2, subplot_titles=["the first of the two panels", "the second of the two panels"])
    for column in (1, 2):
        figure.add_scatter(x=[0, 1], y=[0, 1], name=f"line {column}", row=1, col=column)
    return figure


SINGLE = {"series": series, "bars": bars, "groups": groups, "cells": cells}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What is drawn of each figure by its name and the width of the window."""
    folder = tmp_path_factory.mktemp("narrow")
    figures = {name: draw() for name, draw in (SINGLE | {"panels": panels}).items()}
    figures |= {f"grid-{tokens}": grid(tokens) for tokens in (3, 20)} | {"strip": strip()}

    class Every:
        def figures(self):
            return figures

    wb.export(Every(), folder, formats="html")
    seen = {}
    with chromium() as page:
        for name in figures:
            for width in (PHONE, 640 if name == "strip" else 900):
                page.size(width, 800, mobile=width == PHONE)
                page.open((folder / f"{name}.html").as_uri())
                page.wait("document.querySelector('#figure .main-svg')")
                seen[name, width] = json.loads(page.run(MEASURE))
        assert page.complaints == []
    return seen


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_panel_needs_no_scrolling_on_a_phone(measured, name):
    drawn = measured[name, PHONE]
    assert drawn["width"] <= PHONE
    assert drawn["page"] == PHONE
    assert drawn["plot"][0] > 150
    assert drawn["plot"][1] > 150
    assert [text for text in drawn["texts"] if min(text[1:5]) < -1] == []
    assert overlapping(drawn["texts"]) == []


def test_a_key_on_a_phone_has_every_name_below_the_plot(measured):
    texts = {text: (left, top) for text, left, top, *_ in measured["series", PHONE]["texts"]}
    assert {f"a class of words, {number}" for number in range(9)} <= {*texts}
    assert min(top for text, (_, top) in texts.items() if text.startswith("a class")) > texts["layer"][1]
    layers = [int(text) for text in texts if text.isdigit()]
    assert 4 <= len([number for number in layers if number in range(24)]) <= 9


def test_panels_beside_each_other_scroll_with_room_for_their_titles(measured):
    drawn = measured["panels", PHONE]
    assert PHONE < drawn["width"] < 760
    assert drawn["page"] == PHONE
    assert overlapping(drawn["texts"]) == []


@pytest.mark.parametrize("width", [PHONE, 900])
def test_lines_of_an_exported_grid_fit_the_window(measured, width):
    for tokens in (3, 20):
        drawn = measured[f"grid-{tokens}", width]
        assert drawn["width"] <= width
        tops = {text: top for text, _, top, *_ in drawn["texts"]}
        assert {f"w{at}.{layer}" for at in range(tokens) for layer in range(4)} <= {*tops}
        assert 20 < tops["w0.0"] - tops["w0.1"] < 26
        assert [text for text in drawn["texts"] if min(text[1:5]) < -1] == []
        assert overlapping(drawn["texts"]) == []


def test_a_grid_of_few_tokens_is_as_wide_as_its_title():
    for tokens in (1, 4, 9):
        figure = grid(tokens)
        axis, width = figure.layout.xaxis, figure.layout.width
        assert width == 760
        assert (axis.range[1] - axis.range[0]) * 66 == pytest.approx(width - 100)


@pytest.mark.parametrize(("width", "line"), [(PHONE, 5), (640, 8)])
def test_lines_of_a_strip_fit_the_window_and_are_those_of_the_library(measured, width, line):
    drawn = measured["strip", width]
    assert drawn["width"] <= width
    assert drawn["page"] == width
    (heat,) = restrip(strip(), line, 99)[0].data
    assert drawn["cells"][0]["text"] == [list(row) for row in heat.text]
    assert drawn["cells"][0]["customdata"] == [list(row) for row in heat.customdata]
    assert [[value for value in row if value is not None] for row in drawn["cells"][0]["z"]] == [
        [value for value in row if not np.isnan(value)] for row in np.array(heat.z, float)
    ]
    assert [text for text in drawn["texts"] if min(text[1:5]) < -1] == []
    assert overlapping(drawn["texts"]) == []


def test_plotlys_buttons_cover_no_name_of_a_key_of_two_lines(tmp_path):
    names = [f"a curve with a long name, {number}" for number in range(6)]
    drawn = layer_curves({name: np.arange(4.0) for name in names}, layers=range(4), title="t", unit="ratio")
    path = write_report([Section("part", figures={"a": drawn})], tmp_path / "page.html", title="t")
    with chromium() as page:
        page.size(1000, 800)
        page.open(path.as_uri())
        page.wait("document.querySelector('.legend') && document.querySelector('.modebar-group')")
        page.run("window.box = (name) => document.querySelector(name).getBoundingClientRect()")
        assert page.run("box('.legend').height") > 30
        page.wait("box('.legend .bg').top >= box('.modebar-group:last-child').bottom", 10)
