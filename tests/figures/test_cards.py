"""Tests of the cards that a notebook shows for stores, arrays, selections, features and results."""

from __future__ import annotations

import numpy as np
import pytest
import store_example
from html_example import Markup

import workbench as wb
from workbench.figures.markup import card, cell, escape, inline, prose

TAGS = {"div", "style", "strong", "table", "thead", "tbody", "tr", "th", "td", "code", "p"}
BAD = "<img src=x onerror=alert(1)>\u202e\0"


@pytest.fixture
def store(tmp_path):
    return wb.open_store(store_example.write_store(tmp_path / "<b>&.acts", [[4, 9]]))


def card_text(value) -> str:
    """The text of a value's card, after making sure that it is safe and takes its colours from the page around it."""
    html = value._repr_html_()
    page = Markup(html)
    assert {tag for tag, _ in page.elements} <= TAGS
    assert not [name for _, about in page.elements for name in about if name.startswith("on")]
    assert "#" not in html.replace("&#", "")
    assert "rgb(" not in html
    assert len(html) < 20_000
    return page.text


def test_a_store_shows_what_its_repr_says(store):
    text = card_text(store)
    assert text.startswith("Store")
    for line in repr(store).splitlines():
        assert " ".join(line.split()) in text


def test_an_array_shows_its_axes_and_size(store):
    text = card_text(store["pattern.1"])
    assert "ActivationArray pattern.1" in text
    assert "row 13 head 2 key 4" in text
    assert "bfloat16, 0.0 MB" in text
    assert "LayeredArray pattern" in card_text(store["pattern", 1:2])


def test_rows_show_the_first_ten_tokens(store):
    text = card_text(store.where("row >= 1"))
    assert "selected 12 of 13" in text
    assert text.endswith("2 more")
    assert r"a\x00b" in text
    assert "·Monday" in text
    assert "selected 0 of 13" in card_text(store.where("row < 0"))


def test_features_show_what_is_active(tmp_path):
    store = wb.record(wb.load_model("demo"), ["Monday came."], sites=["resid_post.0"], out=tmp_path / "a.acts")
    features = wb.extract_features(store, wb.load_sae("demo"))
    dead = int((features[:].toarray() == 0).all(0).sum())
    assert f"1,024, of which {dead:,} are never active here" in card_text(features)


def test_a_result_shows_what_was_found_also_without_its_probe(tmp_path):
    from workbench.probes import LogitLens

    store = wb.record(wb.load_model("demo"), ["Monday came. " * 4], sites=["resid_post"], out=tmp_path / "a.acts")
    result = LogitLens().run(store)
    text = card_text(result)
    assert f"finding {result.headline()}" in text
    assert "Result of logit-lens" in text
    unknown = wb.Result("not-installed", result.data, result.table, result.provenance)
    assert "probe 'not-installed' is not installed" in card_text(unknown)


@pytest.mark.parametrize(
    ("value", "markup"),
    [
        (None, ""),
        (float("nan"), ""),
        (0.123456, "0.1235"),
        (12, "12"),
        (np.int64(3), "3"),
        (" a<b>", "<code>·a&lt;b&gt;</code>"),
        ([BAD], "[&#x27;&lt;img src=x onerror=alert(1)&gt;\\u202e\\x00&#x27;]"),
    ],
)
def test_cells(value, markup):
    assert cell(value) == markup


def test_text_shows_what_would_be_markup_or_hidden():
    assert escape(BAD) == "&lt;img src=x onerror=alert(1)&gt;\\u202e\\x00"
    assert BAD not in card(BAD, {BAD: BAD})


def test_prose_keeps_formulas_and_links_papers():
    markup = prose("One `two`\nthree.\n\n    a = b\n      < c\n\narXiv 2410.10781")
    assert markup == (
        '<p>One <code>two</code> three.</p><pre tabindex="0">a = b\n  &lt; c</pre>'
        '<p><a href="https://arxiv.org/abs/2410.10781" rel="noreferrer">arXiv 2410.10781</a></p>'
    )
    assert "href" not in inline("javascript:alert(1) arXiv:javascript")
