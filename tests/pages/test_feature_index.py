"""The index of features: its lines are what the features hold, and in a browser it sorts, filters and stays text."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from browser import chromium
from command_line import refused as refused_by_cli
from command_line import run
from hostile_example import SITE
from refusals import refused
from sae_example import save_sae
from store_example import write_store

import workbench as wb
from workbench.figures.safe_text import visible
from workbench.io.errors import RequestError
from workbench.pages.feature_index import strongest_tokens


def data_of(path) -> dict:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', path.read_text(), re.S)[1])


def test_a_line_for_every_feature(hostile_features, tmp_path):
    features, _, _ = hostile_features
    data = data_of(wb.feature_index(features, tmp_path / "deep" / "index.html", tokens=2))
    dense, tokens = features[:].toarray(), features.store.tokens["token"].to_pylist()
    assert data["rows"] == len(dense)
    assert data["active"] == (dense > 0).sum(0).tolist()
    assert data["max"] == pytest.approx(dense.max(0), rel=5e-3)
    for feature, codes in enumerate(data["tokens"]):
        order = [row for row in np.argsort(-dense[:, feature], kind="stable")[:16] if dense[row, feature] > 0]
        expected = list(dict.fromkeys(visible(tokens[row]) for row in order))[:2]
        assert [data["words"][code] for code in codes] == expected


def test_the_index_in_a_browser(hostile_features, tmp_path):
    features, sae, _ = hostile_features
    labelled = wb.import_labels(
        features, _labels(tmp_path, {3: "<img src=x onerror=alert(1)> days", 4: "names of days"})
    )
    most = int(features.counts.argmax())
    index, page = wb.feature_pages(labelled, tmp_path / "pages", [most], sae=sae)
    with chromium() as tab:
        tab.size(1000, 800)
        tab.open(index.as_uri())
        cells = "[...document.querySelectorAll('tbody tr')].map((row) => row.cells[0].textContent)"
        alive = [feature for feature in range(20) if features.counts[feature]]
        assert tab.run(cells) == [str(f) for f in sorted(alive, key=lambda f: (-features.counts[f], f))]
        tab.mouse("th button[data-column=max]")
        assert tab.run(cells)[0] == str(int(features.max.argmax()))
        tab.run("document.querySelector('input[type=search]').focus()")
        for letter in "days":
            tab.key(letter, ord(letter.upper()), text=letter)
        assert set(tab.run(cells)) == {"3", "4"} & {str(f) for f in alive}
        assert tab.run("document.querySelectorAll('img').length") == 0
        assert "never active" not in tab.run("document.querySelector('[role=status]').textContent")
        tab.run("form.words.value = 'no such word'; form.dispatchEvent(new Event('input'))")
        assert tab.run("document.querySelector('[role=status]').textContent") == "no feature has these words"
        tab.run("form.words.value = ''; form.dispatchEvent(new Event('input'))")
        tab.run("data.active = data.active.map(() => 0); choose()")
        status = "document.querySelector('[role=status]').textContent"
        assert tab.run(status) == "no feature is active on these tokens"
        tab.run("data.active[3] = 1; choose()")
        assert tab.run(status) == "1 to 1 of 1 feature"
        tab.run("location.reload()")
        tab.wait("document.querySelector('tbody a')", 20)
        tab.mouse("tbody a")
        tab.wait(f"document.title == 'Feature {most} of {features.record.site}'", 20)
        assert tab.complaints == []
        assert {address for address in tab.requests if "favicon" not in address} == {index.as_uri(), page.as_uri()}


def test_an_index_without_labels_fits_a_phone(hostile_features, tmp_path):
    (index,) = wb.feature_pages(hostile_features[0], tmp_path / "pages", [])
    with chromium() as tab:
        tab.size(390, 800, mobile=True)
        tab.open(index.as_uri())
        tab.run("data.words = data.words.map(() => ' gardener'); draw()")
        assert tab.run("document.querySelector('.wide').scrollWidth <= document.querySelector('.wide').clientWidth")
        assert tab.run("document.querySelector('th:last-child').getBoundingClientRect().right") <= 390
        assert tab.run("getComputedStyle(document.querySelector('th:nth-child(4)')).display") == "none"


def test_bytes_of_split_characters_are_no_letters(hostile_features, monkeypatch):
    features, _, _ = hostile_features
    words = list(features.texts.words)
    rows = len(features)
    cyrillic, letter = [len(words), len(words) + 1], len(words)  # "Ð" and "Ł" are the bytes of "П", alone a letter
    codes = np.full(rows, letter)
    codes[::3] = 0
    codes[1:9:3], codes[2:9:3] = cyrillic
    split = replace(features.texts, words=["a", *words[1:], "Ð", "Ł"], codes=codes)
    monkeypatch.setitem(features.__dict__, "texts", split)
    strongest, shown = strongest_tokens(features, 16)
    for feature, numbers in enumerate(strongest):
        expected = {_shown(int(row), codes, split.words) for row in features.rows_of(feature)[0][:16]}
        assert {shown[number] for number in numbers} == expected
    assert {"Ð", "<0xD0>", "<0x9F>"} <= {shown[number] for numbers in strongest for number in numbers}


def _shown(row, codes, words):
    bytes_of = {"Ð": "<0xD0>", "Ł": "<0x9F>"}
    return bytes_of.get(words[codes[row]], words[codes[row]]) if row < 9 else words[codes[row]]


def test_printed_tokens_stay_on_the_page(hostile_features, tmp_path):
    features, _, _ = hostile_features
    with chromium() as tab:
        tab.size(680, 900)
        tab.open(wb.feature_index(features, tmp_path / "index.html", tokens=16).as_uri())
        tab.ask("Emulation.setEmulatedMedia", media="print")
        edges = tab.run("[...document.querySelectorAll('td, code')].map((part) => part.getBoundingClientRect().right)")
        assert len(edges) > 100
        assert max(edges) <= 680


def _labels(folder, names):
    path = folder / "labels.csv"
    lines = [f'{number},"{name}"' for number, name in names.items()]
    path.write_text("feature,description\n" + "\n".join(lines) + "\n")
    return path


def test_the_command_and_wrong_requests(tmp_path):
    path = write_store(tmp_path / "x.acts", [[9]], sites=(SITE,))
    sae = save_sae(tmp_path / "sae", d_in=32, hook_name=SITE.name, model_name="demo")
    features = wb.extract_features(wb.open_store(path), wb.load_sae(sae, device="cpu"), show_progress=False)
    code, out, err = run("index", features.path, "--out", tmp_path / "out", "--pages", 2, "--feature", 3)
    assert (code, err) == (0, "")
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert out == f"index  {tmp_path / 'out' / 'index.html'}\npages  {len(names) - 1}\n"
    assert "feature-3.html" in names
    assert data_of(tmp_path / "out" / "index.html")["pages"] == sorted(int(name[8:-5]) for name in names if "-" in name)
    command = ("index", features.path, "--out", tmp_path / "other")
    assert refused_by_cli(*command, "--sae", "demo").startswith("--sae is used on pages of features alone")
    assert refused_by_cli(*command, "--feature", 99).startswith("--feature 99 does not exist")
    assert not (tmp_path / "other").exists()
    page = tmp_path / "new" / "index.html"
    said = refused_by_cli("index", features.path, "--out", page)
    assert said == f"folder {str(page)!r} is the name of a page; name its folder, {str(page.parent)!r}"
    assert not page.exists()
    assert refused(RequestError, lambda: wb.feature_index(features, tmp_path)).startswith(f"{tmp_path} is a folder")
    assert "tokens must be a whole number, at least 1" in refused(
        RequestError, lambda: wb.feature_index(features, "x", tokens=0)
    )
