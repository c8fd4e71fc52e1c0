"""The served views: answers are the store's numbers, only our own page may ask, and in a browser text stays text."""

from __future__ import annotations

import inspect
import json
import shutil
from http.client import HTTPConnection
from urllib.parse import urlencode, urlsplit

import numpy as np
import pytest
from browser import chromium
from command_line import run
from hostile_example import SITE
from planted import linear_unembed, planted_store
from refusals import refused
from sae_example import save_sae
from warned import warned

import workbench as wb
from workbench.io.errors import RequestError
from workbench.model.unembed import load_unembed
from workbench.pages.linked_view import LinkedView

WORDS = ["a", " b", "<img src=x onerror=alert(1)>", "\n", "ש", "ל", "</script>", "\u202e", "d", "e"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two documents with residuals of two layers and patterns of one."""
    rng = np.random.default_rng(0)
    documents = [rng.permutation(10) for _ in range(3)]
    patterns = np.tril(rng.random((3, 2, 10, 10)))
    patterns /= patterns.sum(-1, keepdims=True)
    sites = {f"resid_post.{layer}": rng.normal(size=(30, 6)) for layer in (0, 3)}
    sites["pattern.3"] = patterns.transpose(0, 2, 1, 3).reshape(-1, 2, 10)
    path = tmp_path_factory.mktemp("served") / "x.acts"
    return planted_store(path, documents, sites, linear_unembed(rng.normal(size=(10, 6)), WORDS))


@pytest.fixture(scope="module")
def served(store):
    running = wb.serve(store)
    yield running
    running.close()


def byte_name(value):
    """GPT-2's name of a byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [value for value in range(256) if value not in printable]
    return chr(value) if value in printable else chr(256 + rest.index(value))


def test_characters_are_whole_and_literal_points_stay(tmp_path):
    words = [*map(byte_name, range(256)), " col·legi", "é"]
    text = [256, *"приветмир".encode(), ord("a")]
    rng = np.random.default_rng(0)
    states = {"resid_post.0": np.eye(258)[[*text, *text]] + 0.01 * rng.random((2 * len(text), 258))}
    view = LinkedView(planted_store(tmp_path / "x.acts", [text] * 2, states, linear_unembed(np.eye(258), words)))
    assert view.sequence(0)["texts"][0] == " col·legi"
    for row in range(1, 19):
        assert set("".join(view._around(row, 0))) <= set(" col·legiприветмирa↪"), row
    assert [view.lens(row)["tokens"][0][0] for row in (0, 1, 2, 19)] == ["·col·legi", "<0xD0>", "<0xBF>", "a"]


def send_request(served, name="", method="GET", headers=None, token=None, **parameters):
    """Status and content of one request."""
    parts = urlsplit(served.address)
    connection = HTTPConnection(parts.hostname, parts.port, timeout=60)
    path = f"/{token or parts.path.strip('/')}/{name}?{urlencode(parameters)}"
    connection.request(method, path, headers=headers or {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content, answer.headers


def answer(served, name, **parameters):
    status, content, _ = send_request(served, name, **parameters)
    assert status == 200, content
    return json.loads(content)


def test_only_our_own_page_on_this_machine_may_ask(served):
    assert urlsplit(served.address).hostname == "127.0.0.1"
    assert send_request(served)[0] == send_request(served, "about")[0] == 200
    for refused_request in (
        {"token": "wrong"},
        {"headers": {"Host": "evil.example"}},
        {"headers": {"Origin": "http://evil.example"}},
        {"headers": {"Origin": "null"}},
        {"headers": {"Sec-Fetch-Site": "cross-site"}},
    ):
        assert send_request(served, "about", **refused_request)[0] == 403, refused_request
    assert send_request(served, "about", "POST")[0] == send_request(served, "about", "DELETE")[0] == 501
    headers = send_request(served)[2]
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in headers
    assert headers["Referrer-Policy"] == "no-referrer"
    assert send_request(served, "../../etc/passwd")[0] == 400


def test_answers_are_the_numbers_of_the_store(served, store):
    about = answer(served, "about")
    assert (about["rows"], about["sequences"]) == (30, 3)
    assert about["sites"] == {"resid_post": [0, 3], "pattern": [3]}
    sequence = answer(served, "sequence", number=1)
    assert (sequence["first"], len(sequence["texts"])) == (10, 10)
    assert sequence["ends"] == [text == "\n" for text in store.tokens["token"].to_pylist()[10:20]]
    norms = answer(served, "norms", number=1, site="resid_post", layer=3)["values"]
    states = store["resid_post", 3][:].numpy()
    np.testing.assert_allclose(norms, np.linalg.norm(states[10:20], axis=1), rtol=1e-3)
    full = [answer(served, "norms", number=n, site="resid_post", layer=3)["full"] for n in range(3)]
    later = np.linalg.norm(np.delete(states, [0, 10, 20], axis=0), axis=1)
    assert full == pytest.approx([later.max()] * 3, rel=1e-3)
    pattern = store["pattern", 3][:].numpy()
    sinks = answer(served, "sinks")
    later = np.arange(30) % 10 > 0
    np.testing.assert_allclose(sinks["values"], [pattern[later, :, 0].mean(0)], rtol=1e-3)
    head = answer(served, "head", number=2, layer=3, head=1)["pattern"]
    assert [len(line) for line in head] == list(range(1, 11))
    np.testing.assert_allclose(head[4], pattern[24, 1, :5], rtol=1e-3)
    lens = answer(served, "lens", row=7)
    unembed = load_unembed(store.path)
    logits = states[7].astype(float) @ unembed.weight.double().numpy().T  # a planted unembedding has no norm
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    np.testing.assert_allclose(lens["probabilities"][1], np.sort(shares)[::-1][:5], rtol=1e-3)
    near = answer(served, "neighbours", row=7, site="resid_post", layer=0)
    units = store["resid_post", 0][:].numpy()
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    cosine = units @ units[7]
    cosine[7] = -2
    assert [line[0] for line in near["neighbours"]] == np.argsort(-cosine)[:10].tolist()
    assert [line[2] for line in near["neighbours"]] == pytest.approx(np.sort(cosine)[::-1][:10], abs=1e-3)


def test_keys_of_a_store_of_chosen_rows_are_those_of_their_positions(tmp_path):
    model = wb.load_model("demo", device="cpu")
    text, sites = ["Once upon a time there was a cat."], ["pattern.1"]
    whole, chosen = (
        wb.record(model, text, sites=sites, dtype="float32", out=tmp_path / name, show_progress=False, **rows)
        for name, rows in (("whole", {}), ("chosen", {"where": "position % 3 = 2"}))
    )
    pattern = whole["pattern", 1][:].numpy()
    lines = LinkedView(chosen).head(0, 1, 2)["pattern"]
    for query, line in enumerate(lines):
        np.testing.assert_allclose(line, pattern[2 + 3 * query, 2, 2 : 3 + 3 * query : 3], rtol=1e-3)


@pytest.fixture
def two_folders(hostile_features, tmp_path):
    """Features of one store by two autoencoders, one of them outside of the store."""
    features, _, _ = hostile_features
    sae = wb.load_sae(save_sae(tmp_path / "sae", d_in=32, d_sae=7, seed=5, hook_name=SITE.name), device="cpu")
    return features, wb.extract_features(features.store, sae, out=tmp_path / "second", show_progress=False)


def test_features_of_a_row_and_over_the_text(two_folders):
    view = LinkedView(two_folders[0].store, two_folders)
    assert view.about()["features"] == [[folder.path.name, folder.shape[1]] for folder in two_folders]
    first, last = (int(view._starts[1]), int(view._ends[1]))
    for number, features in enumerate(two_folders):
        dense = features[:].toarray()
        lines = view.active(number, 9)["features"]
        expected = np.argsort(-dense[9], kind="stable")[: len(lines)]
        assert [value for _, value, *_ in lines] == pytest.approx(dense[9][expected], rel=1e-3)
        feature = lines[0][0]
        assert view.feature(number, 1, feature)["values"] == pytest.approx(dense[first:last, feature], rel=1e-3)
        assert view.feature(number, 2, feature)["full"] == pytest.approx(dense[:, feature].max(), rel=1e-3)
        assert f"Feature {feature} of" in view.card(number, feature)
    assert refused(RequestError, lambda: view.active(2, 9)) == "folder 2 does not exist; there are 2: 0 to 1"


def test_the_command_shows_every_folder_of_features_that_opens(two_folders, monkeypatch):
    class Interrupted:
        def wait(self):
            raise KeyboardInterrupt

    features, second = two_folders
    views = []
    monkeypatch.setattr(
        "workbench.pages.serve.LinkedView", lambda *arguments: views.append(arguments) or LinkedView(*arguments)
    )
    monkeypatch.setattr("workbench.cli.page_verbs.Event", Interrupted)
    damaged = features.path.parent / "damaged"
    damaged.mkdir()
    (damaged / "features.json").write_text("{")
    try:
        with warned("features damaged are not shown: .* is not JSON"):
            code, out, _ = run("serve", features.store.path)
        assert (code, out.splitlines()[1]) == (0, "stop with Ctrl-C")
        assert run("serve", features.store.path, "--features", features.path, second.path)[0] == 0
    finally:
        shutil.rmtree(damaged)
    assert [[folder.path for folder in arguments[1]] for arguments in views] == [
        [features.path],
        [features.path, second.path],
    ]


def test_wrong_requests(served, store, hostile_features, tmp_path):
    def error(name, **parameters):
        status, content, _ = send_request(served, name, **parameters)
        assert status == 400
        return json.loads(content)["error"]

    assert error("sequence", number=99) == "sequence 99 does not exist; there are 3: 0 to 2"
    assert error("sequence", number="-1") == "number must be a whole number, not '-1'"
    assert error("sequence", number="9" * 5000).startswith("number must be a whole number, not '999")
    assert error("head", number=0, layer=0, head=0).startswith("pattern.0 was not recorded")
    assert error("head", number=0, layer=3, head=2) == "head 2 does not exist; there are 2: 0 to 1"
    assert error("active", folder=0, row=0) == "no features are shown; give features= (--features)"
    assert error("nothing").startswith("no answer 'nothing'; there are about, ")
    assert "resid_pst" in error("norms", number=0, site="resid_pst", layer=0)
    features, _, _ = hostile_features
    assert refused(RequestError, lambda: wb.serve(store, features)).startswith("features belong to ")
    assert refused(RequestError, lambda: inspect.unwrap(wb.serve)(5)).startswith("store must be a store ")
    port = urlsplit(served.address).port
    assert refused(RequestError, lambda: wb.serve(store, port=port)).startswith(f"port {port} cannot be used: ")
    assert served._repr_html_().count("<iframe") == 1


def count(selector: str) -> str:
    return f'document.querySelectorAll("{selector}").length'


def test_the_views_in_a_browser(served, store):
    with chromium() as page:
        page.size(1300, 900)
        page.open(served.address)
        page.wait(f"{count('.token')} == 30 && {count('#sinks button')} == 2")
        assert page.run("[...document.querySelectorAll('.sequence')].map(node => node.dataset.name)") == ["0", "1", "2"]
        assert page.run("document.querySelectorAll('img, #tokens script').length") == 0
        texts = page.run("[...document.querySelectorAll('.token')].map((token) => token.textContent)")
        assert "<img src=x onerror=alert(1)>" in texts
        assert "\\u202e" in texts
        # a cell of the map of sinks shows its head over the text
        page.mouse("#sinks td:nth-child(3) button")
        page.wait("document.querySelector('.token.query') && !document.querySelector('#note').textContent", 20)
        weights = page.run("[...document.querySelectorAll('.token')].map((token) => token.title.split(': ')[1])")
        assert weights[10:] == [None] * 20  # attention stays in its sequence
        pattern = store["pattern", 3][9].numpy()[1]
        np.testing.assert_allclose([float(weight) for weight in weights[:10]], pattern, rtol=1e-3)
        # the largest weight of the query has the full colour, and the others their share of it
        shades = page.run(
            "[...document.querySelectorAll('.token')].map((token) => token.style.getPropertyValue('--a'))"
        )
        expected = 0.75 * pattern / pattern.max()
        np.testing.assert_allclose([float(shade) for shade in shades[:10]], expected, atol=2e-3)
        scale = page.run("document.querySelector('#scale output').textContent")
        assert scale == f"0 to {float(f'{pattern.max():.4g}'):g}, the query's largest"
        heads = page.run("[...document.querySelectorAll('#sinks tr:first-child th')].map((cell) => cell.textContent)")
        assert heads == ["layer", "0", "1"]
        assert page.run("document.querySelector('#sinks .key').checkVisibility()")
        # a token opens its lens and its neighbours, by the keyboard alone; the selection is a query
        page.run("document.querySelector('.token[data-row=\"0\"]').focus()")
        page.key("ArrowLeft", 37)
        page.key("Home", 36)
        page.key("ArrowRight", 39)
        page.key("Enter", 13, text="\r")
        page.wait(f"{count('#lens tr')} == 2 && {count('#neighbours li')} == 10", 30)
        assert page.run("document.querySelector('[name=sql]').value") == "row IN (1)"
        python = page.run("document.querySelector('[name=python]').value")
        assert eval(python, {"wb": wb}).ids.tolist() == [1]
        # the arrow keys cross the ends of sequences; a run of rows is a range
        for _ in range(10):
            page.key("ArrowRight", 39, modifiers=8)
        page.key("Enter", 13, text="\r", modifiers=8)
        assert page.run("document.querySelector('[name=sql]').value") == "row BETWEEN 1 AND 11"
        page.wait("document.querySelector('#lens .note').textContent.startsWith('row 11:')", 20)
        # a neighbour leads to its place
        page.mouse("#neighbours li:first-child button")
        page.wait("document.activeElement.classList.contains('token')", 20)
        page.key("Escape", 27)
        assert page.run("document.querySelector('#selection').hidden")
        assert page.complaints == []
        assert {urlsplit(address).netloc for address in page.requests} == {urlsplit(served.address).netloc}


def test_the_reader_chooses_among_folders_of_features(two_folders):
    served = wb.serve(two_folders[0].store, two_folders)
    try:
        with chromium() as page:
            page.open(served.address)
            page.wait(count(".token[data-row='9']"))
            names = page.run("[...document.querySelector('[name=features]').options].map(node => node.textContent)")
            assert names == [folder.path.name for folder in two_folders]
            page.mouse(".token[data-row='9']")
            change = "dispatchEvent(new Event('change', {bubbles: true}))"
            for number, features in reversed(list(enumerate(two_folders))):
                page.run(f"controls.features.value = {number}; controls.features.{change}")
                active = set(features[[9]].indices.tolist())
                page.wait("document.querySelector('#features .note').textContent.startsWith('active on row 9')")
                cards = "document.querySelectorAll('#features li button:first-child')"
                ids = f"[...{cards}].map(node => Number(node.textContent))"
                page.wait(f"{ids}.length && {ids}.every(id => {sorted(active)}.includes(id))")
                page.mouse("#features li button:nth-child(2)")
                feature = page.run(f"{ids}[0]")
                value = f"{features[[9]].toarray()[0, feature]:.4g}"
                page.wait(f"Number(document.querySelector('.token[data-row=\"9\"]').title.split(': ')[1]) == {value}")
            assert page.complaints == []
    finally:
        served.close()


def test_a_store_of_many_sequences_scrolls(tmp_path):
    """Sequences come before they are seen and go when they are far; the number follows, and tokens keep their rows."""
    documents = [[1, 2, 3, 4] * 100 for _ in range(40)]
    values = np.arange(16_000.0)[:, None] + 1
    path = planted_store(tmp_path / "x.acts", documents, {"resid_post.0": values}).path
    served = wb.serve(wb.open_store(path))
    try:
        with chromium() as page:
            page.size(800, 500)
            page.open(served.address)
            page.wait(f"{count('.sequence')} > 1")
            assert page.run(count(".sequence")) < 20
            page.wait("document.querySelector('#sinks .note').textContent == 'record attn_first or pattern to see it'")
            assert page.run("document.querySelector('#sinks table').textContent") == ""  # and no map
            assert page.run("document.querySelector('#scale output').textContent") == "0 to 16000 and above"
            scroll = "const list = document.querySelector('#tokens'); list.scrollTop = list.scrollHeight"
            sequence_numbers = "[...document.querySelectorAll('.sequence')].map(node => Number(node.dataset.name))"
            page.wait(f"(() => {{ {scroll}; return {sequence_numbers}.at(-1) == 39 }})()")
            numbers = page.run(sequence_numbers)
            assert numbers == list(range(numbers[0], 40))
            assert 1 < len(numbers) < 20
            assert page.run("Number(document.querySelector('[name=sequence]').value)") in numbers
            last = page.run("[...document.querySelectorAll('.token')].at(-1).title")
            assert last == "row 15999, position 399: 16000"
            scale = page.run("document.querySelector('#scale output').textContent")
            assert scale == "0 to 16000 and above"  # of the store, not of what is shown
            assert page.run("document.querySelectorAll('.token[tabindex=\"0\"]').length") == 1
            page.wait(
                f"(() => {{ document.querySelector('#tokens').scrollTop = 0; return {sequence_numbers}[0] == 0 }})()"
            )
            assert page.run("document.querySelector('.token').title") == "row 0, position 0: 1"
            assert page.complaints == []
    finally:
        served.close()
