"""Figures: values as they were given, and text of models that can never become markup."""

from __future__ import annotations

import html
import html.parser
import json
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import workbench as wb
from workbench.figures.describe import figure_data
from workbench.figures.layer_curves import layer_curves
from workbench.figures.safe_text import label, visible
from workbench.figures.theme import CATEGORIES, TEMPLATE
from workbench.figures.ticks import integer_step
from workbench.figures.token_grid import Marks, rewrap, token_grid
from workbench.model.load import Model
from workbench.probes import LogitLens

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)",
    "<b>bold</b>",
    "<a href='javascript:alert(1)'>",
    "<br>",
    "&lt;i&gt;",
    "&#60;i>",
    "$x$",
    "$$\\frac{1}{2}$$",
    "\u202eevil",
    "\u2066x\u2069",
    "a\x00b",
    "\x1b[31mred",
    "\x9b31m",
    "a\u2028b",
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    "\ufeff",
    "%{x}",
    "%{customdata}<extra>",
    "x" * 500,
    " ",
    "\n\r\t",
    '"quoted"',
    "'",
    "\\u003cscript>",
]


# Text


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("", ""),
        (" Monday", "·Monday"),
        ("a\nb\tc\rd", "a⏎b⇥c␍d"),
        ("\x00\x1b\x7f\x9b", "\\x00\\x1b\\x7f\\x9b"),
        ("\u202eab", "\\u202eab"),
        ("\u2028", "\\u2028"),
        ("\ud800", "\\ud800"),
        ("é日本😀", "é日本😀"),
        ("a\u00a0b\u3000c\u2009", "a\\xa0b\\u3000c\\u2009"),
        ("שלום", "שלום"),
        ("x" * 24, "x" * 24),
        ("x" * 25, "x" * 23 + "…"),
    ],
)
def test_visible(token, expected):
    assert visible(token) == expected


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("<b>", "&lt;b&gt;"),
        ("&lt;", "&amp;lt;"),
        ("$x$", "&#36;x&#36;"),
        ("\"'", "&#34;&#x27;"),
        ("<" * 10, "&lt;" * 8 + "…"),
    ],
)
def test_label(token, expected):
    assert label(token, 9) == expected


@given(st.text(st.characters(codec=None)), st.integers(1, 40))
def test_a_label_is_a_short_line_that_reads_back(token, limit):
    short = label(token, limit)
    assert not set("<>$\"'") & set(short)
    assert not any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for char in short)
    assert re.sub(r"&(lt|gt|amp|#34|#x27|#36);", "", short).count("&") == 0
    assert html.unescape(short) == visible(token, limit)  # an entity is never cut in two
    assert len(visible(token, limit)) <= limit


# Grid and curves


def grid(**changes):
    defaults = {
        "cells": [["a", "b"], ["c", "<i>"]],
        "hover": [["<b>1</b>", "2"], ["3", "4"]],
        "tokens": [" x", "$"],
        "positions": [3, 7],
        "layers": [0, 5],
        "title": "a title",
        "subtitle": "more of it",
        "unit": "nats",
    }
    return token_grid(np.array([[0.0, 0.25], [0.5, 1.0]], dtype=np.float32), **{**defaults, **changes})


def test_the_grid_draws_what_it_is_given():
    figure = grid(next_tokens=["y", "<"], marks=Marks(np.eye(2, dtype=bool), np.ones((2, 2), bool)))
    heat, marks, *_, tokens, following = figure.data
    assert np.array(heat.z)[1:3].tolist() == [[0, 0.25], [0.5, 1]]
    assert np.isnan(np.array(heat.z)[[0, 3, 4]]).all()  # the tokens' rows and the gap
    assert [list(row) for row in heat.text[1:3]] == [["a", "b"], ["c", "&lt;i&gt;"]]
    assert [list(row) for row in heat.customdata[1:3]] == [["<b>1</b>", "2"], ["3", "4"]]
    assert np.array(marks.z)[2].tolist() == [1, 2, 0, 2]
    assert np.array(marks.z)[4].tolist() == [0, 2, 1, 2]
    assert (heat.texttemplate, heat.hovertemplate) == ("%{text}", "%{customdata}<extra></extra>")
    assert (heat.zmin, heat.zmax) == (0, 1)
    assert heat.colorbar.title.text == "nats"
    assert (figure.layout.title.text, figure.layout.title.subtitle.text) == ("a title", "more of it")
    assert (list(tokens.text), list(tokens.y)) == (["·x", "&#36;"], [0, 0])
    assert (list(following.text), list(following.y)) == (["y", "&lt;"], [3, 3])
    axis = figure.layout.yaxis
    assert (list(axis.tickvals), list(axis.ticktext)) == ([1, 2, 0, 3], ["0", "5", "input", "next"])
    assert axis.title.text == "layer"
    assert figure.layout.template == TEMPLATE


@pytest.mark.parametrize(
    ("layers", "tokens", "line", "line_between"), [(1, 1, 1, 3), (3, 40, 7, 15), (2, 28, 40, 14), (4, 15, 15, 1)]
)
def test_the_lines_of_a_grid_can_be_laid_out_again(layers, tokens, line, line_between):
    values = np.arange(layers * tokens, dtype=float).reshape(layers, tokens)
    texts = [[f"{value:g}" for value in row] for row in values]
    figure = token_grid(
        values,
        cells=texts,
        hover=texts,
        tokens=texts[0],
        positions=range(tokens),
        layers=range(layers),
        title="",
        subtitle="",
        unit="",
        marks=Marks(values % 2 == 0, values % 3 == 0),
    )
    again = rewrap(rewrap(rewrap(figure, line), line_between), figure.layout.meta["grid"]["line"])
    assert json.loads(again.to_json()) == json.loads(figure.to_json())
    table = figure_data(rewrap(figure, line))
    assert table["value"].tolist() == values.ravel().tolist()
    assert table["text"].tolist() == [text for row in texts for text in row]
    assert table["y_label"].tolist() == [str(layer) for layer in range(layers) for _ in range(tokens)]
    few = rewrap(figure, line, max(1, tokens // 2))
    assert figure_data(few)["value"].tolist() == values[:, : max(1, tokens // 2)].ravel().tolist()


def test_limits_are_the_ends_of_the_colours():
    heat, _ = grid(limits=(-1.0, 8.0)).data
    assert (heat.zmin, heat.zmax) == (-1, 8)


def test_a_long_text_is_cut_into_lines():
    def size(n):
        texts = [["a"] * n]
        figure = token_grid(
            np.zeros((1, n)),
            cells=texts,
            hover=texts,
            tokens=["a"] * n,
            positions=range(n),
            layers=[0],
            title="",
            subtitle="",
            unit="",
        )
        return figure.layout.width, figure.layout.height

    assert size(14)[0] == size(200)[0] < 1_100
    assert size(28)[1] - size(14)[1] == 4 * 22


def test_repeated_tokens_keep_columns_of_their_own():
    figure = grid(tokens=["a", "a"])
    assert len(set(figure.data[0].x)) == 2


def test_the_curves_draw_what_they_are_given():
    curves = {"one": np.array([1.0, 2.0, 4.0]), "two": np.array([0.5, np.nan, 0.0])}
    figure = layer_curves(curves, layers=[0, 1, 5], title="a title", unit="nats")
    for curve, (name, values) in zip(figure.data, curves.items(), strict=True):
        assert (curve.name, list(curve.x)) == (name, [0, 1, 5])
        np.testing.assert_array_equal(curve.y, values)
    assert (figure.layout.title.text, figure.layout.yaxis.title.text) == ("a title", "nats")
    assert figure.layout.yaxis.rangemode == "tozero"
    assert len({CATEGORIES[i] for i in range(len(curves))}) == 2


@pytest.mark.parametrize(("depth", "step"), [(1, 1), (12, 1), (24, 2), (80, 6)])
def test_ticks_are_whole_layers(depth, step):
    figure = layer_curves({"a": np.zeros(depth)}, layers=range(depth), title="", unit="")
    assert figure.layout.xaxis.dtick == step


@pytest.mark.parametrize(
    ("values", "step"),
    [([0, 1, 2], 1), ([-3, 0, 3], 1), ([0.0, 23.0], 2), ([1, 101], 8), ([0, 1000], None), ([0.5, 1], None), ([], None)],
)
def test_whole_numbers_have_whole_ticks_unless_they_span_far(values, step):
    assert integer_step(values) == step
    assert integer_step([*values, "a"]) is None


# The whole path: from the tokens of a model to the page


@pytest.fixture(scope="module")
def pages(tiny_models, tmp_path_factory):
    """Saved results of one model, once with harmless names and once with hostile ones, by kind."""
    written = {}
    for kind in ("harmless", "hostile"):
        names = [HOSTILE[i] if kind == "hostile" and i < len(HOSTILE) else f"token{i}" for i in range(320)]
        backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="token319"))
        backend.decoder = decoders.Fuse()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        model = Model(tiny_models["llama"], tokenizer, HOSTILE[1] + "$y$" if kind == "hostile" else "a model")
        folder = tmp_path_factory.mktemp(kind)
        ids = [list(range(len(HOSTILE)))]
        store = wb.record(model, ids, out=folder / "acts", dtype="float32", show_progress=False)
        result = LogitLens(top_k=64).run(store)
        result.save(folder / "lens")
        written[kind] = (store, result, folder / "lens")
    return written


def strings(value) -> list[str]:
    if isinstance(value, dict):
        return [text for part in value.values() for text in strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


MARKUP = re.compile(r"<b>|</b>|<br>|<extra></extra>")


def test_the_names_are_really_there(pages):
    store, result, _ = pages["hostile"]
    assert store.tokens["token"].to_pylist()[: len(HOSTILE)] == HOSTILE
    named = {text for k in range(1, 65) for text in result.table[f"top_token_{k}"]}
    assert set(HOSTILE) <= named


def test_no_text_of_a_model_is_markup_in_a_figure(pages):
    counts = {}
    for kind, (_, result, _) in pages.items():
        texts = strings(
            json.loads(json.dumps({name: f.to_plotly_json() for name, f in result.figures().items()}, default=list))
        )
        assert len(texts) > 200
        bare = [MARKUP.sub("", text) for text in texts]
        assert [text for text in bare if set(text) & set("<>$")] == []
        assert [text for text in bare if re.sub(r"&(lt|gt|amp|#34|#x27|#36);", "", text).count("&")] == []
        hidden = [text for text in bare if any(unicodedata.category(char) in ("Cc", "Cf") for char in text)]
        assert hidden == []
        counts[kind] = sum(len(MARKUP.findall(text)) for text in texts)
    assert counts["harmless"] == counts["hostile"]  # what markup there is, is ours


class Elements(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, [name for name, _ in attrs]))


def test_no_text_of_a_model_is_markup_in_a_page(pages):
    by_page = {}
    for kind, (_, _, folder) in pages.items():
        for page in sorted(folder.glob("figures/*.html")):
            parser = Elements()
            parser.feed(page.read_text())
            by_page.setdefault(page.name, {})[kind] = parser.found
    assert list(by_page) == ["by_layer.html", "depth.html", "grid.html"]
    for page in by_page.values():
        assert page["harmless"] == page["hostile"]
        assert sum(tag == "script" for tag, _ in page["hostile"]) == 3


def test_template_marks_of_plotly_are_not_taken_from_tokens(pages):
    """`%{...}` is filled in once, in the template; a token may hold one as text."""
    _, result, _ = pages["hostile"]
    heat = result.figure("grid").data[0]
    assert (heat.texttemplate, heat.hovertemplate) == ("%{text}", "%{customdata}<extra></extra>")
    assert any("%{x}" in text for row in heat.customdata for text in row)
