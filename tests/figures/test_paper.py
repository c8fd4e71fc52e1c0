"""Figures for print: nothing is lost or squeezed without a word."""

from __future__ import annotations

import re

import numpy as np
import plotly.graph_objects as go
import pytest

from tests.support.browser import draw_for_print, overlapping, text_boxes
from workbench.figures.layer_curves import layer_curves
from workbench.figures.paper import to_paper
from workbench.figures.theme import INCH, TEMPLATE
from workbench.figures.themed import ThemedFigure, themed
from workbench.figures.ticks import log_ticks
from workbench.figures.token_grid import Marks, token_grid
from workbench.figures.token_strip import token_strip

ROW = 13  # whole pixels, of type of 8


def grid(tokens: int, layers: int = 4) -> go.Figure:
    texts = [[f"w{at}.{layer}" for at in range(tokens)] for layer in range(layers)]
    marked = np.ones((layers, tokens), bool)
    return token_grid(
        np.full((layers, tokens), 0.5),
        cells=texts,
        hover=texts,
        tokens=[f"in{at}" for at in range(tokens)],
        next_tokens=[f"out{at}" for at in range(tokens)],
        positions=range(tokens),
        layers=range(layers),
        title="A title",
        subtitle="more of it",
        unit="probability",
        marks=Marks(marked, marked),
    )


def strip(words: list[str], values: np.ndarray, layers: int) -> go.Figure:
    limits, places = (0.0, layers - 1.0), range(len(words))
    return token_strip(values, tokens=words, positions=places, title="", subtitle="", unit="layer", limits=limits)


def test_rows_of_tokens_are_equally_high_in_print(tmp_path):
    figures = {
        (tokens, layers, columns): to_paper(grid(tokens, layers), columns)[0]
        for tokens, layers in ((1, 4), (4, 4), (7, 4), (15, 4), (9, 1), (7, 30))
        for columns in (1, 2)
    }
    drawings = draw_for_print(list(figures.values()), tmp_path)
    for (tokens, layers, columns), texts in zip(figures, text_boxes(drawings, tmp_path), strict=True):
        tops = {text: top for text, _, top, *_ in texts}
        words = ["in0", *(f"w0.{layer}" for layer in range(layers)), "out0"]
        apart = -np.diff([tops[word] for word in words])
        assert np.allclose(apart, ROW, atol=2), (tokens, layers, columns, apart)  # tokens are bold, or in ink
        assert np.allclose(apart[1:-1], ROW, atol=0.1), (tokens, layers, columns, apart)
        assert overlapping(texts) == []
        assert [text for text in texts if min(text[1:5]) < -0.5] == []


def test_a_grid_of_few_tokens_has_cells_of_usual_width():
    width = {tokens: to_paper(grid(tokens), 2)[0].layout.xaxis.range[1] + 0.5 for tokens in (1, 8, 15, 40)}
    assert width == {1: 8, 8: 8, 15: 15, 40: 15}


@pytest.mark.parametrize("columns", [1, 2])
def test_print_keeps_every_entry_of_the_legend(columns, tmp_path):
    names = [f"class {number} (1,234)" for number in range(12)]
    figure = layer_curves({name: np.array([1.0, 2.0]) for name in names}, layers=[0, 1], title="", unit="ratio")
    (texts,) = text_boxes(draw_for_print([to_paper(figure, columns)[0]], tmp_path), tmp_path)
    inside = {text for text, *edges, _, _ in texts if min(edges) >= -0.5}
    assert {*names} <= inside
    assert overlapping(texts) == []


@pytest.mark.parametrize(
    ("ends", "ticks"),
    [
        ((4, 64), [5, 10, 20, 50]),
        ((1, 100), [1, 2, 5, 10, 20, 50, 100]),
        ((0.02, 0.2), [0.02, 0.05, 0.1, 0.2]),
        ((1, 101), None),
        ((0, 5), None),
        ((3, 4), []),
    ],
)
def test_ticks_of_a_short_logarithmic_range(ends, ticks):
    assert log_ticks(*map(float, ends)) == ticks


def test_logarithmic_axes_in_print():
    lengths = [4, 8, 16, 32, 64]
    short = go.Figure(go.Scatter(x=lengths, y=lengths)).update_xaxes(type="log")
    axis = to_paper(short)[0].layout.xaxis
    assert (axis.tickvals, axis.ticktext) == ((5, 10, 20, 50), ("5", "10", "20", "50"))
    assert to_paper(short.update_xaxes(range=[0, 4]))[0].layout.xaxis.dtick == 1
    doubled = go.Figure(go.Scatter(x=lengths, y=lengths)).update_xaxes(type="log", dtick=np.log10(2))
    assert to_paper(doubled)[0].layout.xaxis.dtick == np.log10(2)
    assert to_paper(doubled.update_xaxes(dtick=0.05))[0].layout.xaxis.tickvals == (5, 10, 20, 50)
    beside = short.update_xaxes(domain=[0.9, 1], range=None)
    assert to_paper(beside)[0].layout.xaxis.ticktext == ("5", "50")
    short.update_xaxes(domain=None)
    named = short.update_xaxes(tickvals=lengths, ticktext=list(map(str, lengths)))
    assert to_paper(named)[0].layout.xaxis.ticktext == ("4", "8", "16", "32", "64")


def test_ticks_between_powers_of_ten_are_numbers(tmp_path):
    lengths = [4, 8, 16, 32, 64]
    figure = ThemedFigure(go.Scatter(x=lengths, y=lengths), {"xaxis": {"type": "log", "dtick": float(np.log10(2))}})
    screen = themed(figure).update_layout(width=400, height=300)
    boxes = text_boxes(draw_for_print([screen, to_paper(figure)[0]], tmp_path), tmp_path)
    assert all({"4", "8", "16", "32", "64"} <= {text for text, *_ in texts} for texts in boxes)


def test_words_of_a_strip_and_whole_layers(tmp_path):
    words, layers = [" marble", " market", " Monday", " the"], np.array([0.0, 3, 1, np.nan])
    figure = strip(words * 5, np.tile(layers, 5), 4)
    printed, omitted = to_paper(figure)
    assert omitted == []
    assert {*printed.data[0].text[0]} == {"·marble", "·market", "·Monday", "·the"}
    assert printed.data[0].colorbar.dtick == figure.data[0].colorbar.dtick == 1
    assert strip(words, layers + 12, 30).data[0].colorbar.dtick == 7  # of 0 to 29, and not of the layers that occur
    pictures = [to_paper(figure)[0] for figure in (strip(words, layers, 4), strip(words[:1], np.zeros(1), 1))]
    boxes = text_boxes(draw_for_print([printed, *pictures], tmp_path), tmp_path)
    for texts, shown in zip(boxes, ("0123", "0123", "0"), strict=True):
        above = [text for text, _, top, *_ in texts if top < 30 and text.isdigit()]
        assert above == list(shown)
        assert [text for text in texts if min(text[1:5]) < -0.5] == []
    assert pictures[0].layout.height < 0.8 * INCH  # one line


def test_the_axis_states_that_some_labels_are_left_out():
    labels = [f"token {number}" for number in range(50)]
    figure = go.Figure(go.Heatmap(z=np.eye(50))).update_xaxes(tickvals=list(range(50)), ticktext=labels, title="token")
    printed, omitted = to_paper(figure)
    assert omitted == ["labels of the x axis, all but one in 3"]
    assert printed.layout.xaxis.title.text == "token (1 in 3 labelled)"
    assert to_paper(figure, 2)[0].layout.xaxis.title.text in ("token", "token (1 in 2 labelled)")


def test_numbers_have_no_prefixes_of_units(tmp_path):
    """Probabilities of 10µ and counts of 20k are no usual notation."""
    points = go.Scatter(y=[0, 2e-5], mode="markers", marker={"color": [0, 3e-5], "showscale": True, "cmax": 3e-5})
    figures = [go.Figure(go.Heatmap(z=[[0, 2e-5]])), go.Figure(points), go.Figure(go.Bar(y=[30_000]))]
    figures += [go.Figure(go.Scatter(y=[1e-7, 2e-7]))]
    drawn = [figure for part in figures for figure in (part.update_layout(template=TEMPLATE), to_paper(part)[0])]
    drawn = [go.Figure(figure).update_layout(width=312, height=250) for figure in drawn]
    boxes = text_boxes(draw_for_print(drawn, tmp_path), tmp_path)
    texts = [[text for text, *_ in found] for found in boxes]
    assert not [text for found in texts for text in found if re.search("[µnkM]", text)]
    assert all(found & {"0.00001", "0.00002", "30,000"} for found in map(set, texts[:6]))
    assert all(any("10−7" in text.replace("\u200b", "") for text in found) for found in texts[6:]), texts[6:]
