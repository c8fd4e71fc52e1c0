"""The token view: what it holds is the store's, and what a reader without a kernel sees of it."""

from __future__ import annotations

import html
import re
import shutil

import numpy as np
import pytest
import xarray as xr
from html_example import Markup
from token_view_example import foreign_store, hostile_store, sequence_rows, values

pytest.importorskip("anywidget", reason="needs anywidget: pip install 'interp-workbench[notebook]'")

import workbench as wb
from workbench.figures.contrast import contrast
from workbench.figures.safe_text import visible
from workbench.io.errors import RequestError
from workbench.pages.token_picture import HUES
from workbench.pages.token_view import LIMIT


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return hostile_store(tmp_path_factory.mktemp("view"))


@pytest.fixture(scope="module")
def features(store):
    return wb.extract_features(store, wb.load_sae("demo"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return foreign_store(tmp_path_factory.mktemp("foreign"))


def quantile(numbers, share):
    """Of a sorted list, between its two nearest members."""
    ordered = sorted(numbers)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def token_spans(markup):
    return [attributes for tag, attributes in Markup(markup).elements if tag == "span" and "title" in attributes]


def token_markup(markup):
    """The text between the tags of each token of a picture."""
    return [html.unescape(text) for text in re.findall(r"<span title=[^>]*>([^<]*)", markup)]


def test_values_are_norms_of_the_sequence_at_every_layer(store):
    view = wb.TokenView(store, "resid_post", sequence=1)
    rows = sequence_rows(store, 1)
    assert view.rows == rows.tolist()
    assert view.layers == ["0", "1", "2", "3"]
    assert view.measure == "L2 norm of resid_post"
    for layer in range(4):
        expected = np.linalg.norm(np.asarray(store["resid_post", layer])[rows].astype(np.float64), axis=1)
        np.testing.assert_allclose(values(view)[layer], expected, rtol=1e-3)
        full = quantile(expected[1:].tolist(), 0.99) if len(rows) > 101 else expected[1:].max()  # BOS apart
        assert view.scales[layer] == pytest.approx(full, rel=1e-3)


def test_moving_to_another_sequence_reads_it(store, features):
    view = wb.TokenView(store, features=features)
    view.sequence = 2
    rows = sequence_rows(store, 2)
    assert view.rows == rows.tolist()
    assert view.positions == list(range(len(rows)))
    token, feature = (np.frombuffer(part, np.int32) for part in (view.entry_token, view.entry_feature))
    dense = np.zeros((len(rows), view.features), np.float32)
    dense[token, feature] = np.frombuffer(view.entry_value, np.float32)
    np.testing.assert_array_equal(dense, features[rows].toarray())


def test_full_colour_of_a_feature_is_a_high_quantile_of_its_active_tokens(store, features):
    dense = features[:].toarray()
    scales = wb.TokenView(store, features=features).feature_scales
    often = int((dense > 0).sum(0).argmax())
    for feature in (often, int(dense.max(0).argmax()), int((dense > 0).sum(0).argmin())):
        active = sorted(dense[dense[:, feature] > 0, feature].tolist(), reverse=True)
        assert scales[feature] == (active[(len(active) - 1) // 100] if active else 0)
    assert (dense[:, often] > 0).sum() > 100
    assert scales[often] < dense[:, often].max()


def test_the_first_token_does_not_bleach_the_others_of_a_model_without_bos(foreign):
    rows = sequence_rows(foreign, 1)
    sink = xr.DataArray([900.0, 1.0, -2.0], {"row": rows[:3]}, name="norm")
    view = wb.TokenView(foreign, sink, sequence=1)
    assert view.scales == [2.0]
    assert "norm: full colour at 2, 1 token beyond" in Markup(view._picture()).text
    assert wb.TokenView(foreign, sink[:1], sequence=1).scales == [900.0]  # the only value


def test_layers_have_the_numbers_of_the_model(foreign):
    assert wb.TokenView(foreign).layers == ["1", "3"]
    for count, names in ((2, ["1", "3"]), (4, ["0", "1", "2", "3"]), (3, [f"line {n} of values" for n in range(3)])):
        assert wb.TokenView(foreign, np.zeros((count, foreign.rows))).layers == names
    view = wb.TokenView(foreign, sequence=1)
    view.layer = 1
    expected = np.linalg.norm(np.asarray(foreign["resid_post", 3])[view.rows].astype(np.float64), axis=1)
    np.testing.assert_allclose(values(view)[1], expected, rtol=1e-3)
    assert repr(view).endswith("L2 norm of resid_post, layer 3)")


def test_characters_lines_and_spaces_are_those_of_the_text(foreign):
    view = wb.TokenView(foreign)
    assert "".join(view.texts).replace("↪", "") == "Привет⏎мир⏎⏎end"
    assert [view.texts[index] for index in view.breaks] == ["⏎"] * 3
    assert view.pieces[:2] == ["Ð", "Ł"]
    assert view.backward == []
    assert re.sub(r"<[^b][^>]*>|</[^>]*>", "", view._picture().partition("<pre")[2]).count("<br>") == 3
    view.sequence = 1
    first, stop = view.backward[0]
    assert "".join(view.texts[first:stop]).replace("↪", "") == "שלום·123·עולם"
    assert view.texts[stop - 1] == "↪"  # the last letter's second half belongs to the run
    assert view._picture().count('<bdi dir="rtl">') == 1
    view.sequence = 2
    assert "".join(view.texts).replace("↪", "") == "emoji·👩·日本\\xa0x\\u3000y"
    assert token_markup(view._picture()) == view.texts


def test_features_are_found_by_number_label_and_token(store, features, tmp_path):
    order = np.argsort(-features.counts)
    often, seldom = int(order[0]), int(order[5])
    labels = tmp_path / "labels.csv"
    labels.write_text(f"feature,description\n{seldom},Days of the WEEK\n{often},a week\n")
    path = shutil.copytree(features.path, tmp_path / "copied")
    view = wb.TokenView(store, features=wb.import_labels(wb.open_features(path, store), labels))
    view.search = "week"
    assert [found["feature"] for found in view.found[:2]] == [often, seldom]
    view.search = " days  week "
    assert [(found["feature"], found["name"]) for found in view.found] == [(seldom, "Days of the WEEK")]
    assert view.found_count == 1
    top = features.top(seldom, 1, context=0)["token"][0]
    view.search = visible(top)
    assert view.found_count >= 1
    strongest = [features.top(found["feature"], 16, context=0)["token"] for found in view.found]
    assert all(any(visible(top) in visible(token) for token in tokens) for tokens in strongest)
    view.search = str(seldom)
    assert view.found[0]["feature"] == seldom
    dead = int(np.flatnonzero(features.counts == 0)[0])
    view.search = str(dead)
    assert view.found[0]["feature"] == dead
    view.search = "no such words"
    assert (view.found, view.found_count) == ([], 0)
    view.search = " "
    assert view.found == []


def test_pinned_selections_are_rows_of_the_store(store):
    view = wb.TokenView(store)
    view.pinned = [[4, 2, 2], [], [9]]
    assert view.pinned == [[2, 4], [9]]
    assert all(isinstance(rows, wb.Rows) for rows in view.pins)
    assert [rows.ids.tolist() for rows in view.pins] == [[2, 4], [9]]
    assert view.pins[0]["resid_post", 3].shape == (2, 256)
    assert "pinned selection 1: 2 rows" in Markup(view._picture()).text
    assert re.findall(r"(\d)</sup>", view._picture()) == ["1", "1", "2"]


def test_a_picture_underlines_several_features(store, features):
    view = wb.TokenView(store, features=features, sequence=1)
    dense = features[view.rows].toarray()
    first, second = (int(feature) for feature in np.argsort(-(dense > 0).sum(0))[:2])
    view.underlined = [first, second, first]
    assert view.underlined == [first, second]
    markup = view._picture()
    for line, feature in enumerate((first, second)):
        assert f"feature {feature}" in Markup(markup).text
        colour = ",".join(str(int(HUES[line][at : at + 2], 16)) for at in (1, 3, 5))
        drawn = [re.search(rf"rgba\({colour},([\d.]+)\)", token["style"]) for token in token_spans(markup)]
        assert [match is not None for match in drawn] == (dense[:, feature] > 0).tolist()
        alphas = np.array([float(match[1]) if match else 0.35 for match in drawn])
        shares = np.minimum(1, dense[:, feature] / view.feature_scales[feature])
        np.testing.assert_allclose(alphas, 0.35 + 0.65 * shares, atol=2e-3)
    view.colour, view.feature = "feature", first
    titles = [token["title"] for token in token_spans(view._picture())]
    place = f"row {view.rows[1]}, position 1: "
    assert titles[1] == f"{place}{dense[1, first]:.4g}; feature {second}: {dense[1, second]:.4g}"  # each value once


@pytest.mark.parametrize("hue", HUES)
def test_underlines_are_legible_on_light_and_dark_pages(hue):
    assert min(contrast(hue, page) for page in ("#ffffff", "#111111")) >= 3


def test_any_numbers_over_rows_can_be_shown(store):
    rows = sequence_rows(store, 1)
    numbers = np.arange(store.rows, dtype=np.float32)
    np.testing.assert_array_equal(values(wb.TokenView(store, numbers, sequence=1)), numbers[None, rows])
    known = rows[3:5]
    entropy = xr.DataArray([[1.0, -2.0]], {"layer": [7], "row": known}, name="entropy", attrs={"units": "nats"})
    view = wb.TokenView(store, entropy, sequence=1)
    assert (view.layers, view.measure) == (["7"], "entropy (nats)")
    assert values(view)[0, 3:5].tolist() == [1.0, -2.0]
    assert np.isnan(np.delete(values(view)[0], [3, 4])).all()
    assert view.scales == [2.0]


def test_a_selection_is_rows_of_the_store(store):
    view = wb.TokenView(store)
    view.selected = [5, 3, 5]
    assert view.selected == [3, 5]
    assert view.selection.ids.tolist() == [3, 5]
    assert view.selection["resid_post", 3].shape == (2, 256)


def test_a_long_sequence_is_cut_and_says_so(store, monkeypatch):
    monkeypatch.setattr("workbench.pages.token_view.LIMIT", 4)
    view = wb.TokenView(store, sequence=1)
    assert len(view.texts) == len(view.rows) == 4 < LIMIT
    assert view.note == f"the first 4 of {len(sequence_rows(store, 1))} tokens"


def test_a_reader_without_a_kernel_sees_the_tokens_and_their_values(store, features):
    view = wb.TokenView(store, "resid_post", features=features)
    view.layer, view.selected = 2, view.rows[3:5]
    bundle, _ = view._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == view.model_id
    assert (
        bundle["text/plain"] == repr(view) == f"TokenView('{store.path}', sequence 0, L2 norm of resid_post, layer 2)"
    )
    page = Markup(bundle["text/html"])
    assert {tag for tag, _ in page.elements} == {"div", "pre", "span"}
    tokens = token_spans(bundle["text/html"])
    assert token_markup(bundle["text/html"]) == view.texts  # one element a token, and none of it became markup
    norms = np.linalg.norm(np.asarray(store["resid_post", 2])[view.rows].astype(np.float64), axis=1)
    numbers = [float(token["title"].rpartition(" ")[2]) for token in tokens]
    np.testing.assert_allclose(numbers, norms, rtol=1e-3)
    alphas = [float(token["style"].partition("15,")[2].partition(")")[0]) for token in tokens]
    full = norms[1:].max()  # of at most 100 tokens
    np.testing.assert_allclose(alphas, 0.65 * np.minimum(1, norms / full), atol=2e-3)
    assert norms[0] > full
    assert "1 token beyond" in page.text
    assert [n for n, token in enumerate(tokens) if "outline" in token["style"]] == [3, 4]
    assert "L2 norm of resid_post, layer 2: full colour at " in page.text
    assert "2 selected" in page.text
    assert page.elements[0][1]["class"] == "tex2jax_ignore mathjax_ignore"  # $...$ of a token is no formula


def test_a_reader_without_a_kernel_sees_the_feature_chosen(store, features):
    view = wb.TokenView(store, features=features, sequence=1)
    dense = features[view.rows].toarray()
    view.colour, view.feature = "feature", int(dense.sum(0).argmax())
    tokens = token_spans(view._repr_mimebundle_()[0]["text/html"])
    numbers = [float(token["title"].rpartition(" ")[2]) for token in tokens]
    np.testing.assert_allclose(numbers, dense[:, view.feature], rtol=1e-3)


def test_a_value_below_zero_has_another_colour_and_a_missing_one_none(store):
    rows = sequence_rows(store, 1)[:2]
    view = wb.TokenView(store, xr.DataArray([1.0, -2.0], {"row": rows}, name="<b>gain"), sequence=1)
    page = Markup(view._repr_mimebundle_()[0]["text/html"])
    tokens = token_spans(view._repr_mimebundle_()[0]["text/html"])
    # full colour is that of the largest ordinary token; the first one is BOS
    assert [token["style"].partition("line-height:1.5")[2].strip(";") for token in tokens[:3]] == [
        "background-color:rgba(230,125,15,0.325)",
        "background-color:rgba(30,120,200,0.650)",
        "",
    ]
    assert tokens[2]["title"] == f"row {rows[0] + 2}, position 2: none"
    assert "<b>gain: full colour at 2" in page.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, f: wb.TokenView(s, sequence=99), "sequence 99 does not exist; the store has 0 to 4"),
        (lambda s, f: wb.TokenView(s, "patern"), "values: no site of kind 'patern' was recorded"),
        (lambda s, f: wb.TokenView(s, np.zeros(3)), r"values has shape \(3,\); expected \(\d+,\) or \(layers, \d+\)"),
        (
            lambda s, f: wb.TokenView(s, xr.DataArray([0.0], dims="head")),
            r"values has axes \('head',\); expected \(row\) or",
        ),
        (lambda s, f: setattr(wb.TokenView(s), "layer", 4), "layer 4 does not exist; there are 4: 0 to 3"),
        (lambda s, f: setattr(wb.TokenView(s), "feature", 4), "feature 4 does not exist; there are 0"),
        (lambda s, f: setattr(wb.TokenView(s), "selected", [10**6]), "are not within the"),
        (lambda s, f: setattr(wb.TokenView(s), "pinned", [[10**6]]), "are not within the"),
        (lambda s, f: setattr(wb.TokenView(s), "underlined", [4]), "underlined: feature 4 does not exist; there are 0"),
        (
            lambda s, f: setattr(wb.TokenView(s, features=f), "underlined", list(range(6))),
            "underlined has 6 features; at most 5 are legible, remove some",
        ),
    ],
    ids=["sequence", "kind", "shape", "axes", "layer", "feature", "rows", "pinned", "underlined", "too many"],
)
def test_what_cannot_be_shown_is_refused(store, features, change, message):
    with pytest.raises(RequestError, match=message):
        change(store, features)
