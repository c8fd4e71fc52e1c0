"""The token view in a browser: what is done there reaches Python, with the mouse, the keyboard and by touch."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from browser import chromium
from token_view_example import HOSTILE, foreign_store, hostile_store, page_of, values

pytest.importorskip("anywidget", reason="needs anywidget: pip install 'interp-workbench[notebook]'")

import workbench as wb
from workbench.pages.token_picture import HUES


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return hostile_store(tmp_path_factory.mktemp("view"))


@pytest.fixture(scope="module")
def features(store):
    return wb.extract_features(store, wb.load_sae("demo"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return foreign_store(tmp_path_factory.mktemp("foreign"))


def colours(page):
    return page.run("[...document.querySelectorAll('.token')].map((t) => t.style.backgroundColor)")


def strength(colour):
    alpha = re.search(r"([\d.]+)\)$", colour)
    return 0.0 if not colour else float(alpha[1]) if colour.startswith("rgba") or "/" in colour else 1.0


def test_the_view_in_a_browser(store, features, tmp_path):
    view = wb.TokenView(store, "resid_post", features=features)
    view.layer = 1
    with chromium() as page:
        page.size(900, 700)
        page.open(page_of(view, tmp_path))
        # text is text: one element a token, and nothing of it became an element or ran
        assert page.run("[...document.querySelectorAll('.token')].map((t) => t.textContent)") == view.texts
        assert page.run("document.querySelectorAll('img, script[src]').length") == 0
        assert page.run("document.title") == "view"
        # colours are the values
        strengths = np.array([strength(colour) for colour in colours(page)])
        np.testing.assert_allclose(strengths, 0.65 * np.minimum(1, values(view)[1] / view.scales[1]), atol=0.01)
        # the layer slider, with the keyboard
        page.run("document.querySelector('input[name=layer]').focus()")
        page.key("ArrowRight", 39)
        page.wait("window.sent.layer === 2", 10)
        strengths = np.array([strength(colour) for colour in colours(page)])
        np.testing.assert_allclose(strengths, 0.65 * np.minimum(1, values(view)[2] / view.scales[2]), atol=0.01)
        # hovering tells the value and the features, and one of these colours by itself
        page.mouse(".token:nth-child(4)", "move")
        status = "document.querySelector('[role=status]').textContent"
        page.wait(status, 10)
        foot = page.run(status)
        assert f"row {view.rows[3]}, position 3, L2 norm of resid_post: {values(view)[2, 3]:.4g}"[:-1] in foot
        row_features = features[view.rows[3]].toarray()[0]
        page.mouse(".features button")
        page.wait("window.sent.colour === 'feature'", 10)
        assert page.run("window.sent.feature") == row_features.argmax()
        lit = [n for n, colour in enumerate(colours(page)) if colour]
        assert lit == np.flatnonzero(features[view.rows].toarray()[:, row_features.argmax()]).tolist()
        # clicks and keys select rows, which reach Python
        page.mouse(".token:nth-child(2)")
        page.key("ArrowRight", 39)
        page.key("ArrowRight", 39)
        page.key("Enter", 13, text="\r", modifiers=8)
        page.wait("window.sent.selected.length === 3", 10)
        assert page.run("[...document.querySelectorAll('[aria-selected=true]')].length") == 3
        view.set_state(page.run("window.sent"))
        assert view.selection.ids.tolist() == view.rows[1:4]
        assert (view.layer, view.colour, view.feature) == (2, "feature", row_features.argmax())
        page.key("Escape", 27)
        assert page.run("window.sent.selected") == []
        # one token of the list is in the order of the tab key
        assert page.run("[...document.querySelectorAll('.token')].filter((t) => t.tabIndex === 0).length") == 1
        page.picture(tmp_path / "view.png")
        assert page.complaints == []


def tap(page, selector):
    element = f"document.querySelector({json.dumps(selector)})"
    page.run(f"{element}.scrollIntoView({{block: 'center'}})")
    box = page.run(f"{element}.getBoundingClientRect().toJSON()")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.ask("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    page.ask("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])


def enter(page, selector, text):
    page.run(f"document.querySelector({json.dumps(selector)}).select()")
    page.ask("Input.insertText", text=text)
    page.key("Enter", 13, text="\r")


STATUS = "document.querySelector('[role=status]').textContent"


def test_a_feature_is_aimed_at_by_number_and_by_search(store, features, tmp_path):
    view = wb.TokenView(store, features=features, sequence=1)
    strongest = np.argsort(-features.counts)[:3].tolist()
    with chromium() as page:
        page.size(900, 700)
        page.open(page_of(view, tmp_path))
        enter(page, "[name=feature_number]", str(strongest[0]))
        page.wait(f"window.sent.feature === {strongest[0]} && window.sent.colour === 'feature'", 10)
        lit = [n for n, colour in enumerate(colours(page)) if colour]
        assert lit == np.flatnonzero(features[view.rows].toarray()[:, strongest[0]]).tolist()
        key = page.run("document.querySelector('.key').textContent")
        assert f"feature {strongest[0]}0" in key  # the colour bar begins at 0
        assert f"{view.feature_scales[strongest[0]]:.4g}" in key
        enter(page, "[name=feature_number]", "99999")
        page.wait(f"{STATUS}.startsWith('feature 99999 does not exist; there are {view.features}: 0 to')", 10)
        assert page.run("document.querySelector('[name=feature_number]').value") == str(strongest[0])
        # Python searches; the page lists what was found, as text, and it is chosen with the keyboard
        page.run("document.querySelector('[name=search]').focus()")
        page.ask("Input.insertText", text="days")
        page.wait("window.sent.search === 'days'", 10)
        found = [{"feature": feature, "name": HOSTILE, "tokens": ["<b>"]} for feature in strongest[1:]]
        page.run(f"answer('found_count', 12), answer('found', {json.dumps(found)})")
        results = page.run("document.querySelector('.results').textContent")
        assert "<img src=x onerror=alert(1)>" in results
        assert "2 of 12 features" in results
        page.key("ArrowDown", 40)
        page.key("Enter", 13, text="\r")
        page.wait(f"window.sent.feature === {strongest[1]}", 10)
        page.run("answer('found_count', 0), answer('found', [])")
        assert page.run("document.querySelector('.results').textContent") == "no feature has these words"
        # the number box of sequences reads another one
        enter(page, "[name=sequence_number]", "2")
        page.wait("window.sent.sequence === 2", 10)
        assert page.run("document.title") == "view"
        assert page.complaints == []


def test_several_features_are_underlined_each_in_its_own_colour(store, features, tmp_path):
    view = wb.TokenView(store, "resid_post", features=features, sequence=1)
    dense = features[view.rows].toarray()
    first, second, third = (int(feature) for feature in np.argsort(-(dense > 0).sum(0))[:3])
    view.underlined = [first, second]
    lines = "[...document.querySelectorAll('.token')].map((token) => token.style.backgroundImage)"
    with chromium() as page:
        page.size(900, 700)
        page.open(page_of(view, tmp_path))

        def drawn(line):
            colour = ", ".join(str(int(HUES[line][at : at + 2], 16)) for at in (1, 3, 5))
            return [f"({colour}" in image for image in page.run(lines)]

        assert drawn(0) == (dense[:, first] > 0).tolist()
        assert drawn(1) == (dense[:, second] > 0).tolist()
        assert all(page.run("[...document.querySelectorAll('.token')].map((token) => !!token.style.backgroundColor)"))
        key = page.run("[...document.querySelectorAll('.key > div')].map((line) => line.textContent)")
        assert [f"feature {feature}" in line for feature, line in zip((first, second), key[1:3], strict=True)] == [
            True,
            True,
        ]
        assert f"{view.feature_scales[second]:.4g}" in key[2]
        page.mouse(".token:nth-child(3)", "move")
        page.wait(f"{STATUS}.includes('feature {second}: ')", 10)
        assert f"feature {first}: {dense[2, first]:.4g}" in page.run(STATUS)
        enter(page, "[name=feature_number]", str(first))
        page.mouse(".token:nth-child(4)", "move")
        page.wait(f"{STATUS}.includes('position 3, ')", 10)
        assert page.run(STATUS).count(f"feature {first}: ") == 1  # filled and underlined, described once
        enter(page, "[name=feature_number]", str(third))
        page.run("[...document.querySelectorAll('.control button')].find((b) => b.textContent === 'underline').click()")
        assert page.run("window.sent.underlined") == [first, second, third]
        page.mouse(".key .remove")
        assert page.run("window.sent.underlined") == [second, third]
        assert page.run("document.activeElement.getAttribute('aria-label')") == f"do not underline feature {second}"
        assert drawn(0) == (dense[:, second] > 0).tolist()
        view.set_state(page.run("window.sent"))
        assert view.underlined == [second, third]
        assert page.complaints == []


def test_selections_are_made_and_pinned_by_touch(store, tmp_path):
    view = wb.TokenView(store, "resid_post", sequence=1)
    with chromium() as page:
        page.size(390, 800, mobile=True)
        page.ask("Emulation.setTouchEmulationEnabled", enabled=True)
        page.open(page_of(view, tmp_path))
        tap(page, ".token:nth-child(2)")
        page.wait("window.sent.selected?.length === 1", 10)
        tap(page, ".tools [aria-pressed]")
        tap(page, ".token:nth-child(5)")
        page.wait("window.sent.selected?.length === 4", 10)
        assert page.run("document.querySelector('.tools [aria-pressed]').getAttribute('aria-pressed')") == "false"
        tap(page, ".tools .pin")
        page.wait("window.sent.pinned?.length === 1", 10)
        tap(page, ".token:nth-child(4)")
        page.wait("window.sent.selected?.length === 1", 10)
        tap(page, ".tools .pin")
        page.wait("window.sent.pinned?.length === 2", 10)
        view.set_state(page.run("window.sent"))
        assert [rows.ids.tolist() for rows in view.pins] == [view.rows[1:5], view.rows[3:4]]
        marks = page.run(
            "[...document.querySelectorAll('.token')].slice(0, 6).map((token) => token.dataset.pins ?? '')"
        )
        assert marks == ["", "1", "1", "1,2", "1", ""]
        pins = page.run("[...document.querySelectorAll('.pins li span')].map((line) => line.textContent)")
        assert pins == [
            f"pinned 1: 4 rows, {view.rows[1]} to {view.rows[4]}",
            f"pinned 2: 1 row, {view.rows[3]}",
        ]
        tap(page, ".pins button")
        page.wait("window.sent.selected.length === 4", 10)
        tap(page, ".tools .clear")
        page.wait("window.sent.selected.length === 0", 10)
        tap(page, ".pins .remove")
        page.wait("window.sent.pinned.length === 1", 10)
        assert page.run("window.sent.pinned") == [[view.rows[3]]]
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert page.complaints == []


BOXES = """[...document.querySelectorAll(SELECTOR)].map((token) => {
  const box = token.getBoundingClientRect();
  return [token.getClientRects().length, Math.round(box.left), Math.round(box.top)];
})"""


def test_arrow_keys_go_where_they_point(foreign, tmp_path):
    view = wb.TokenView(foreign, sequence=1)
    first, stop = view.backward[0]
    focused = "[...document.querySelectorAll('.token')].indexOf(document.activeElement)"
    with chromium() as page:
        page.size(900, 700)
        page.open(page_of(view, tmp_path))
        page.run("document.querySelector('.token').focus()")
        for index in range(1, first + 1):
            page.key("ArrowRight", 39)
            assert page.run(focused) == index
        page.key("ArrowLeft", 37)  # inside the run, the next token is on the left
        assert page.run(focused) == first + 1
        page.key("ArrowRight", 39)
        assert page.run(focused) == first
        page.key("End", 35)
        assert page.run(focused) == len(view.texts) - 1
        page.key("ArrowLeft", 37)
        assert page.run(focused) == stop - 1


@pytest.mark.parametrize("saved", [False, True], ids=["live", "saved"])
def test_lines_and_runs_stand_as_they_are_read(foreign, tmp_path, saved):
    view = wb.TokenView(foreign)

    def boxes(sequence, width):
        view.sequence = sequence
        path = tmp_path / "saved.html"
        path.write_text(f'<!doctype html><meta charset="utf-8"><title>view</title>{view._picture()}')
        page.size(width, 700)
        page.open(path.as_uri() if saved else page_of(view, tmp_path))
        return page.run(BOXES.replace("SELECTOR", "'pre span'" if saved else "'.token'"))

    with chromium() as page:
        tops = [top for _, _, top in boxes(0, 900)]
        starts = [n for n in range(1, len(tops)) if tops[n] > tops[n - 1] + 10]
        assert starts == [index + 1 for index in view.breaks]
        lefts = [left for _, left, _ in boxes(1, 900)]
        digits = [view.texts.index(text) for text in ("·1", "2", "3")]
        assert sorted(digits, key=lefts.__getitem__) == digits
        letters = [index for index in range(*view.backward[0]) if index not in digits and view.texts[index] != "·"]
        assert sorted(letters, key=lefts.__getitem__) == letters[::-1]
        assert lefts[0] < min(lefts[1:])
        assert lefts[-1] == max(lefts)
        for sequence in range(3):
            pieces, _, tops = zip(*boxes(sequence, 150), strict=True)
            broken = {view.texts[index] for index, number in enumerate(pieces) if number > 1}
            assert broken <= {"·1"}  # lines break between tokens; this space stands on the right of "123"
            assert len({top // 10 for top in tops}) > 2
        assert page.complaints == []
