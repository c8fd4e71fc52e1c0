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
from workbench.figures.layer_curves import layer_curves
from workbench.figures.safe_text import label, visible
from workbench.figures.theme import CATEGORIES, TEMPLATE
from workbench.figures.ticks import integer_step
from workbench.figures.token_grid import token_grid
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
    ("token", "shown"),
    [
        ("", ""),
        (" Monday", "·Monday"),
        ("a\nb\tc\rd", "a⏎b⇥c␍d"),
        ("\x00\x1b\x7f\x9b", "\\x00\\x1b\\x7f\\x9b"),
        ("\u202eab", "\\u202eab"),
        ("\u2028", "\\u2028"),
        ("\ud800", "\\ud800"),
        ("é日本😀", "é日本😀"),
        ("שלום", "שלום"),
        ("x" * 24, "x" * 24),
        ("x" * 25, "x" * 23 + "…"),
    ],
)
def test_visible(token, shown):
    assert visible(token) == shown


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("<b>", "&lt;b&gt;"),
        ("&lt;", "&amp;lt;"),
        ("$x$", "&#36;x&#36;"),
        ("\"'", "&#34;&#x27;"),
        ("<" * 10, "&lt;" * 8 + "…"),
    ],
)
def test_label(token, shown):
    assert label(token, 9) == shown


@given(st.text(st.characters(codec=None)), st.integers(1, 40))
def test_a_label_is_a_short_line_that_reads_back(token, limit):
    shown = label(token, limit)
    assert not set("<>$\"'") & set(shown)
    assert not any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for char in shown)
    assert re.sub(r"&(lt|gt|amp|#34|#x27|#36);", "", shown).count("&") == 0
    assert html.unescape(shown) == visible(token, limit)  # an entity is never cut in two
    assert len(visible(token, limit)) <= limit


# Grid and curves


def grid(**changes):
    given = {
        "cells": [["a", "b"], ["c", "<i>"]],
        "hover": [["<b>1</b>", "2"], ["3", "4"]],
        "tokens": [" x", "$"],
        "positions": [3, 7],
        "layers": [0, 5],
        "title": "a title",
        "subtitle": "more of it",
        "unit": "nats",
    }
    return token_grid(np.array([[0.0, 0.25], [0.5, 1.0]], dtype=np.float32), **{**given, **changes})


def test_the_grid_draws_what_it_is_given():
    figure = grid()
    (heat,) = figure.data
    assert np.array(heat.z).tolist() == [[0, 0.25], [0.5, 1]]
    assert (list(heat.x), list(heat.y)) == (["3", "7"], ["0", "5"])
    assert [list(row) for row in heat.text] == [["a", "b"], ["c", "&lt;i&gt;"]]
    assert [list(row) for row in heat.customdata] == [["<b>1</b>", "2"], ["3", "4"]]
    assert (heat.texttemplate, heat.hovertemplate) == ("%{text}", "%{customdata}<extra></extra>")
    assert (heat.zmin, heat.zmax) == (0, 1)
    assert heat.colorbar.title.text == "nats"
    assert (figure.layout.title.text, figure.layout.title.subtitle.text) == ("a title", "more of it")
    assert list(figure.layout.xaxis.tickvals) == ["3", "7"]
    assert list(figure.layout.xaxis.ticktext) == ["·x", "&#36;"]
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("input token", "layer")
    assert figure.layout.template == TEMPLATE


def test_limits_are_the_ends_of_the_colours():
    (heat,) = grid(limits=(-1.0, 8.0)).data
    assert (heat.zmin, heat.zmax) == (-1, 8)


def test_a_long_text_makes_a_wide_figure():
    def width(n):
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
        return figure.layout.width

    assert width(1) == width(4) == 640
    assert width(100) - width(50) >= 50 * 40


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
    made = {}
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
        made[kind] = (store, result, folder / "lens")
    return made


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
    found = {}
    for kind, (_, _, folder) in pages.items():
        for page in sorted(folder.glob("figures/*.html")):
            parser = Elements()
            parser.feed(page.read_text())
            found.setdefault(page.name, {})[kind] = parser.found
    assert list(found) == ["by_layer.html", "depth.html", "grid.html"]
    for page in found.values():
        assert page["harmless"] == page["hostile"]
        assert sum(tag == "script" for tag, _ in page["hostile"]) == 3


def test_template_marks_of_plotly_are_not_taken_from_tokens(pages):
    """`%{...}` is filled in once, in the template; a token may hold one as text."""
    _, result, _ = pages["hostile"]
    heat = result.figure("grid").data[0]
    assert (heat.texttemplate, heat.hovertemplate) == ("%{text}", "%{customdata}<extra></extra>")
    assert any("%{x}" in text for row in heat.customdata for text in row)
