"""The page of a feature: what it shows is what the features hold, and no text of a model becomes markup."""

import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from command_line import refused as refused_by_cli
from command_line import run
from hostile_example import HOSTILE, SITE
from refusals import refused
from sae_example import save_sae
from store_example import write_store

import workbench as wb
from workbench.features.extract import extract_features
from workbench.figures.safe_text import visible
from workbench.io.errors import RequestError
from workbench.pages.feature_page import _histogram
from workbench.sae.decoder import decoder_logits
from workbench.sae.load import load_sae
from workbench.store.reader import open_store

TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "span", "small", "section"),
    *("svg", "rect", "table", "tr", "th", "td", "code", "h3", "br", "details", "summary"),
}


class Page(HTMLParser):
    """The elements of a page: (tag, class, attributes, own text), in order of their beginnings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.open, self.strays = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes).get("class") or "", dict(attributes), ""])
        if tag not in ("meta", "br"):
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        if self.open and self.open[-1][0] == tag:
            self.open.pop()
        else:
            self.strays += 1

    def handle_data(self, data):
        if self.open:
            self.open[-1][3] += data

    def texts(self, tag, kind=None):
        return [text for name, kinds, _, text in self.elements if name == tag and kind in (None, *kinds.split())]


def test_hostile_tokens_stay_text(hostile_features, tmp_path):
    features, sae, _ = hostile_features
    feature = int(features.counts.argmax())
    text = wb.feature_page(features, feature, tmp_path / "deep" / "page.html", sae=sae, k=40).read_text()
    page = Page(text)
    assert (page.open, page.strays) == ([], 0)
    assert {tag for tag, *_ in page.elements} <= TAGS
    assert not [name for _, _, attributes, _ in page.elements for name in attributes if name.startswith("on")]
    assert "http" not in text.replace("http-equiv", "")  # no address of anything
    assert "default-src 'none'" in text
    texts = set(page.texts("span")) | set(page.texts("code"))
    assert {
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        " &amp; ",
        "</span></div>",
    } <= texts
    spelt_out = {visible(token.replace("\ud800", "?"), 60) for token in HOSTILE}
    assert len(set(page.texts("code"))) > 3
    assert set(page.texts("code")) <= spelt_out
    assert {"a⏎b", "\\u202egnp", "nul\\x00l", "🦜"} <= texts
    assert not {"\u202e", "\0"} & set(text)
    assert any("model <b>tiny</b>; 58 tokens" in part for part in page.texts("p", "from"))


def test_contexts_show_the_top_rows(hostile_features, tmp_path):
    features, _, _ = hostile_features
    feature = int(features.counts.argmax())
    page = Page(wb.feature_page(features, feature, tmp_path / "page.html", k=3, context=2).read_text())
    dense, sequence = features[:].toarray()[:, feature], features.store.tokens["sequence"].to_numpy()
    order = np.lexsort((np.arange(len(dense)), -dense))
    listed: list[int] = []
    expected = []
    for row in order[: min(4 * 3, int((dense > 0).sum()))]:
        if row in listed:
            continue
        near = [r for r in range(max(row - 2, 0), min(row + 3, len(dense))) if sequence[r] == sequence[row]]
        listed += near
        expected.append((row, near))
    tokens = features.store.tokens["token"].to_pylist()
    alike: dict = {}  # contexts with the same tokens around are folded under their first
    for row, near in expected:
        alike.setdefault(tuple(tokens[r] for r in near), []).append((row, near))
    expected = [row for group in list(alike.values())[:3] for row in group]
    boxes = re.split(r'<div class="context">', (tmp_path / "page.html").read_text())[1:]
    for box, (row, near) in zip(boxes, expected, strict=False):
        spans = [
            part for part in Page(box).elements if part[0] == "span" and "style" in part[2]
        ]  # not the key of the next section
        assert len(spans) == len(near)
        assert [("here" in part[1]) for part in spans] == [r == row for r in near]
        assert [part[2].get("tabindex") for part in spans] == ["0" if dense[r] else None for r in near]
        assert [float(part[2].get("title", 0)) for part in spans] == [float(f"{dense[r]:.4g}") for r in near]
        shades = [float(part[2]["style"].removeprefix("--a:")) for part in spans]
        expected_shades = [0.12 + 0.68 * dense[r] / dense.max() if dense[r] else 0 for r in near]
        assert shades == pytest.approx(expected_shades, abs=0.006)
    strongest = page.texts("div", "value")
    assert strongest[0] == f"{dense.max():.3g}"
    assert (tmp_path / "page.html").read_text().count("<section>") == 2


def test_groups_hold_every_active_token_once(hostile_features, tmp_path):
    features, _, _ = hostile_features
    feature = int(features.counts.argmax())
    text = wb.feature_page(features, feature, tmp_path / "page.html").read_text()
    groups = re.findall(r"<h3>(\S+) to (\S+) <small>(\S+) % of its (\d+) active tokens", text)
    assert len(groups) == 5
    values = features.rows_of(feature)[1].astype(float)
    edges = np.linspace(values[0], min(0, values[-1]), 6)
    shares = [100 * np.mean((values <= high) & (values > low)) for high, low in pairwise(edges)]
    shares[-1] = 100 - sum(shares[:-1])
    assert [float(share) for *_, share, _ in groups] == pytest.approx(shares, abs=0.5)
    assert [float(low) for low, *_ in groups] == pytest.approx(edges[1:], rel=5e-3)


def test_panels_show_counts_tokens_and_neighbours(hostile_features, tmp_path):
    features, sae, unembed = hostile_features
    feature = int(features.counts.argmax())
    text = wb.feature_page(features, feature, tmp_path / "page.html", sae=sae).read_text()
    counts, _ = wb.feature_histogram(features, feature)
    titles = re.findall(r"<title>[^<]* to [^<]*: ([\d,]+)</title></rect>", text)
    bars = [int(n.replace(",", "")) for n in titles]
    active = [n for n in counts if n]
    assert bars[: len(active)] == active
    assert sum(bars[len(active) :]) == 320  # the histogram of logits holds the whole vocabulary
    assert f"Active on {features.counts[feature]} of 58 tokens" in text
    effects = np.sort(decoder_logits(sae, unembed, [feature])[0].numpy())
    logits = [float(cell) for cell in re.findall(r"<td>([+-]\d+\.\d{3})</td>", text)]
    assert logits == pytest.approx([*effects[::-1][:10], *effects[:10]], abs=6e-4)
    cosines = wb.nearest_features(sae, feature)["cosine"]
    assert [f"<td>{x:.3g}</td>" in text for x in cosines] == [True] * 10
    together = wb.coactivation(features, feature).head(10)
    for line in together.itertuples():
        assert f"<td>{line.feature}</td><td>{line.both}</td><td>{line.lift:.3g}</td><td>{line.jaccard:.3g}" in text


def test_a_page_without_sae_and_of_a_dead_feature(tmp_path):
    bare = open_store(write_store(tmp_path / "x.acts", [[9]], sites=(SITE,)))
    folder = save_sae(tmp_path / "sae", "topk", d_in=32, k=1, hook_name=SITE.name, model_name="demo")
    sae = load_sae(folder, device="cpu")
    features = extract_features(bare, sae, show_progress=False)
    dead = int(features.counts.argmin())
    text = wb.feature_page(features, dead, tmp_path / "page.html").read_text()
    assert "Active on 0 of 9 tokens (0 %)" in text
    assert "Promoted" not in text
    assert "<section>" not in text
    text = wb.feature_page(features, dead, tmp_path / "page.html", sae=sae).read_text()
    assert "holds no unembedding: the model has none" in text
    assert "Nearest by decoder" in text


def test_a_card_of_a_notebook_holds_the_page_and_runs_nothing(hostile_features, tmp_path):
    features, sae, _ = hostile_features
    card = wb.feature_card(features, 3, sae=sae, k=20)
    assert card.html == wb.feature_page(features, 3, tmp_path / "page.html", sae=sae).read_text()
    (frame,) = [about for tag, _, about, _ in Page(card._repr_html_()).elements if tag == "iframe"]
    assert frame["srcdoc"] == card.html
    assert frame["sandbox"] is None  # nothing is allowed
    assert repr(card) == f"FeatureCard('Feature 3 of {features.record.site}')"


def test_wrong_requests_of_a_page(hostile_features, tmp_path):
    features, _, _ = hostile_features
    second_sae = load_sae(save_sae(tmp_path / "other", d_in=32, seed=1), device="cpu")
    page = tmp_path / "page.html"
    assert "not with other" in refused(RequestError, lambda: wb.feature_page(features, 0, page, sae=second_sae))
    assert refused(RequestError, lambda: wb.feature_page(features, 99, page)).startswith("feature 99 does not exist")
    assert (
        refused(RequestError, lambda: wb.feature_page(features, 0, page, k=0))
        == "k must be a whole number, at least 1, not 0"
    )
    text = refused(RequestError, lambda: wb.feature_page(features, 0, tmp_path))
    assert text == f"{tmp_path} is a folder; name the file, such as {tmp_path / 'feature-0.html'}"
    assert not page.exists()


# ---- workbench top ----------------------------------------------------------------------------------------


def test_top_lists_and_counts(hostile_features, tmp_path):
    features, _, _ = hostile_features
    feature = int(features.counts.argmax())
    code, out, err = run("top", features.path, feature, "--k", 3, "--where", "position > 3")
    table = features.top(feature, 3, 5, "position > 3")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["activation", "row", "sequence", "position", "token", "context"]
    assert [int(line.split()[1]) for line in lines[1:4]] == table["row"].tolist()
    assert lines[4] == f"active on {features.counts[feature]} of 58 rows, 3 shown"
    code, out, _ = run("top", features.path, feature, "--k", 99)
    assert out.splitlines()[-1] == f"active on {features.counts[feature]} of 58 rows"


def test_top_writes_a_page(hostile_features, tmp_path):
    features, sae, _ = hostile_features
    folder = features.path.parents[2] / "sae"
    code, out, err = run("top", features.path, 2, "--page", tmp_path / "p.html", "--sae", folder)
    assert (code, out, err) == (0, f"page  {tmp_path / 'p.html'}\n", "")
    assert (tmp_path / "p.html").read_text() == wb.feature_page(features, 2, tmp_path / "q.html", sae=sae).read_text()


def test_wrong_requests_of_top(hostile_features, tmp_path):
    features, _, _ = hostile_features
    command, page = ("top", features.path), ("--page", tmp_path / "p.html")
    assert refused_by_cli(*command, 20) == "feature 20 does not exist; the SAE has features 0 to 19"
    assert refused_by_cli(*command, 20, *page) == "feature 20 does not exist; the SAE has features 0 to 19"
    assert (
        refused_by_cli(*command, 2, "--sae", "demo")
        == "--sae is used on the page alone; give --page too, or leave --sae out"
    )
    assert refused_by_cli(*command, 2, *page, "--sae-id", "x") == "--sae-id chooses one of several SAEs; give --sae too"
    assert refused_by_cli(*command, 2, *page, "--where", "true").startswith(
        "--where selects among the listed tokens; give"
    )
    assert refused_by_cli(*command, 2, "--where", "tokn = 3").startswith("query 'tokn = 3': ")
    assert refused_by_cli("top", tmp_path, 2).startswith(f"no features at {tmp_path}: ")
    assert not (tmp_path / "p.html").exists()


def test_a_page_links_to_those_beside_it_and_to_the_index(hostile_features, tmp_path):
    features, sae, _ = hostile_features
    feature = int(features.counts.argmax())
    alone = wb.feature_page(features, feature, tmp_path / "alone" / f"feature-{feature}.html", sae=sae).read_text()
    assert "<a href" not in alone
    others = [number for number in range(features.shape[1]) if number != feature]
    wb.feature_pages(features, tmp_path / "all", others[:-1])
    (tmp_path / "all" / "feature-x.html").touch()
    text = wb.feature_page(features, feature, tmp_path / "all" / "mine.html", sae=sae).read_text()
    links = set(re.findall(r'<a href="([^"]*)"', text))
    assert "index.html" in links
    assert links > {"index.html"}
    assert links <= {"index.html", *(f"feature-{number}.html" for number in others[:-1])}
    assert '<a href="index.html"' in (tmp_path / "all" / f"feature-{others[0]}.html").read_text()
    (tmp_path / "all" / "index.html").write_text("<title>Another page</title>")
    assert "index.html" not in wb.feature_page(features, feature, tmp_path / "all" / "mine.html").read_text()


def test_features_have_a_page_in_a_notebook(hostile_features):
    features, sae, _ = hostile_features
    card = features.page(np.int64(3), sae=sae, k=4)
    assert card == wb.feature_card(features, 3, sae=sae, k=4)
    assert "<iframe" in card._repr_html_()


@pytest.mark.parametrize(("counts", "text"), [([1, 0], "1 token."), ([1, 2], "2 tokens.")])
def test_the_highest_bar_is_counted_in_words(counts, text):
    assert f"Highest bar: {text}</p>" in _histogram(np.array(counts), np.array([0.0, 1, 2]), "activation")
