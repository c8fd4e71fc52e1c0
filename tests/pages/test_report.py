"""The report: one page that needs nothing else, with text that stays text; read here and in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from browser import chromium
from html_example import Markup

import workbench as wb
from workbench.cli.main import main
from workbench.embedded import MODEL
from workbench.figures.theme import PROBABILITY, TEMPLATE, to_dark
from workbench.figures.token_grid import rewrap, token_grid
from workbench.io.errors import RequestError
from workbench.pages.report import ROWS, Section, section, write_report
from workbench.probes import AttentionSinks, LogitLens

HOSTILE = "<img src=x onerror=alert(1)></script><script>document.title='owned'</script> ${1} \u202e \0 \"'& \U0001f642"
COLUMN = "<b onclick=alert(2)>src</b>"
TITLE = "<script>document.title='owned'</script>\u202e"

TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "script",
    "body",
    "header",
    "main",
    "nav",
    "section",
    "h1",
    "h2",
    "h3",
}
TAGS |= {
    "p",
    "a",
    "ol",
    "ul",
    "li",
    "figure",
    "figcaption",
    "small",
    "div",
    "span",
    "details",
    "summary",
    "code",
    "pre",
}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd"}


def written(path, sections, **more) -> Markup:
    return Markup(write_report(sections, path / "page.html", title="t", **more).read_text())


def figure(width=None, **heatmap) -> go.Figure:
    drawn = go.Figure(go.Heatmap(z=[[0.25, 0.5]], colorscale=PROBABILITY, **heatmap))
    title = {"text": "A title", "subtitle": {"text": "and more"}}
    return drawn.update_layout(template=TEMPLATE, title=title, width=width)


def drawings(page: Markup) -> list[dict]:
    return [json.loads(script) for about, script in page.scripts if about.get("type") == "application/json"]


def test_only_the_pages_own_scripts_may_run_and_nothing_may_be_fetched(tmp_path):
    page = written(tmp_path, [Section("part", figures={"a": figure(), "b": figure()})])
    (policy,) = [about["content"] for tag, about in page.elements if tag == "meta" and "http-equiv" in about]
    inline = [script for about, script in page.scripts if not about]
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in inline}
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert set(rules["script-src"].split()) == hashes
    assert rules["default-src"] == "'none'"
    assert len(inline) == 4  # plotly once, and what draws
    assert len(drawings(page)) == 2


def test_a_figure_is_its_data_and_its_title_is_text(tmp_path):
    page = written(tmp_path, [Section("part", figures={"a": figure(width=900)})])
    (drawn,) = drawings(page)
    plotly_figure = go.Figure({"data": drawn["data"], "layout": drawn["layout"]})
    assert np.asarray(plotly_figure.data[0].z).tolist() == [[0.25, 0.5]]
    assert plotly_figure.layout.title.text is None
    assert drawn["width"] == 900
    assert "A title and more" in page.text
    labels = [about.get("aria-label", "") for _, about in page.elements]
    assert any("2 values from 0.25 at" in label for label in labels)


def test_on_a_dark_page_a_figure_is_the_dark_one(tmp_path):
    (drawn,) = drawings(written(tmp_path, [Section("part", figures={"a": figure()})]))
    expected = json.loads(to_dark(go.Figure({"data": drawn["data"], "layout": drawn["layout"]})).to_json())
    changed = {"data": drawn["data"], "layout": drawn["layout"]}
    for path, value in drawn["dark"]:
        part = changed
        for key in path[:-1]:
            part = part[key]
        if value is None:
            del part[path[-1]]
        else:
            part[path[-1]] = value
    assert changed == expected
    assert drawn["dark"]


@pytest.mark.parametrize(("more", "fluid"), [({}, True), ({"text": [["a", "b"]], "texttemplate": "%{text}"}, False)])
def test_figures_with_text_in_cells_keep_their_width(tmp_path, more, fluid):
    (drawn,) = drawings(written(tmp_path, [Section("part", figures={"a": figure(**more)})]))
    assert drawn["fluid"] is fluid


def test_a_long_table_is_cut_and_says_so(tmp_path):
    table = pd.DataFrame({"n": range(ROWS + 5), "share": 0.123456, "token": " a", "none": None})
    page = written(tmp_path, [Section("part", table=table)])
    assert sum(tag == "td" for tag, _ in page.elements) == 4 * ROWS
    assert f"Table, {ROWS} of {ROWS + 5} rows" in page.text
    assert "0.1235 ·a" in page.text
    assert "Table, 1 of 1 row " in written(tmp_path, [Section("part", table=table.head(1))]).text


def test_sections_are_linked_in_order_with_what_was_found(tmp_path):
    page = written(tmp_path, [Section("first", ["found one", "more"]), Section("second")])
    links = [about["href"] for tag, about in page.elements if tag == "a"]
    assert links == ["#results", "#part-0", "#part-1", "#contents", "#contents"]
    assert [about["id"] for tag, about in page.elements if tag == "section"] == ["part-0", "part-1"]
    assert page.text.count("found one") == 2
    assert page.text.count("more") == 1


def test_sections_of_one_title_are_told_apart_by_what_differs(tmp_path):
    settings = [[("site", f"resid_post.{layer}", "meaning"), ("top_k", "5", "meaning")] for layer in (1, 2)]
    sections = [Section("lens of m", settings=setting, provenance={"model": "m"}) for setting in settings]
    page = written(tmp_path, [*sections, Section("sinks of m", settings=settings[0])], date="2026-01-02")
    assert "lens of m: site resid_post.1" in page.text
    assert "lens of m: site resid_post.2" in page.text
    assert "sinks of m:" not in page.text
    assert "date 2026-01-02" in page.text


def test_the_head_of_the_page_describes_the_texts(tmp_path):
    known = {"model": "m", "model_fingerprint": "0123456789abcdef", "workbench": "0.1"}
    texts = {"texts": "1 document, 3 sequences of at most 64 tokens", "sites": "embed, resid_post"}
    sections = [
        Section("a", provenance={**known, "store": "a.acts", "rows": 1}),  # saved before texts were recorded
        Section("b", provenance={**known, "store": "my b.acts", "rows": 970, **texts}),
        Section("c", provenance={**known, "store": "weights alone", "rows": 4096}),
        Section("d", provenance={**known, "store": "pairs of ioi", "rows": 8, "pairs": 8}),
    ]
    page = written(tmp_path, sections, date="2026-01-02")
    for text in (
        "date 2026-01-02",
        "model m 0123456789ab",
        "texts a.acts: 1 token my b.acts: 970 tokens; 1 document, 3 sequences of at most 64 tokens; sites embed, ",
        "pairs of ioi: 8 pairs",
        "linked views workbench serve 'my b.acts' workbench serve a.acts workbench",
    ):
        assert text in page.text, page.text[:2000]


def test_reports_of_a_folder_share_one_script(tmp_path):
    page = written(tmp_path, [Section("part", figures={"a": figure()})], plotlyjs="shared")
    assert [about["src"] for about, _ in page.scripts if "src" in about] == ["plotly.min.js"]
    assert (tmp_path / "page.html").stat().st_size < 50_000
    with chromium() as tab:
        tab.open((tmp_path / "page.html").as_uri())
        tab.wait("document.querySelector('.plot .main-svg')", 60)
        assert tab.complaints == []
        assert set(tab.requests) == {(tmp_path / name).as_uri() for name in ("page.html", "plotly.min.js")}
    with pytest.raises(RequestError, match="plotlyjs must be inside or shared, not 'cdn'"):
        written(tmp_path, [Section("part")], plotlyjs="cdn")


def test_an_existing_page_is_replaced_and_no_half_is_left(tmp_path):
    path = tmp_path / "deep" / "page.html"
    write_report([Section("old")], path, title="t")
    write_report([Section("new")], path, title="t")
    assert "new" in Markup(path.read_text()).text
    assert "old" not in Markup(path.read_text()).text.split()
    assert list(path.parent.iterdir()) == [path]


def test_nothing_to_report_and_a_folder_for_a_file_are_refused(tmp_path):
    with pytest.raises(RequestError, match="the report has no results; give at least one folder"):
        write_report([], tmp_path / "page.html", title="t")
    with pytest.raises(RequestError, match=r"is a folder; name the file, such as .*report\.html"):
        write_report([Section("part")], tmp_path, title="t")


def test_the_command_refuses_what_is_no_result_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")])
    assert stop.value.code == 2
    assert re.fullmatch(r"workbench: result .* no result\.json there; .*\n", capsys.readouterr().err)


# A hostile corpus, through the real pipeline


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results, saved and read again, of a model, a store, texts and metadata whose every name is markup."""
    folder = tmp_path_factory.mktemp("hostile")
    directory = shutil.copytree(MODEL, folder / "<i onmouseover=alert(3)>model")
    texts = [{"text": f"{HOSTILE} a {'Monday ' * 60}", COLUMN: source} for source in (HOSTILE, "plain", "plain")]
    model = wb.load_model(directory)
    store = wb.record(model, texts, sites=["resid_post", "pattern"], out=folder / "<u>&.acts")
    loaded = []
    for probe in (LogitLens(detail=60), AttentionSinks(length=60, domain=COLUMN, resamples=50)):
        probe.run(store).save(folder / f"<s>{probe.name}")
        loaded.append(wb.load_result(folder / f"<s>{probe.name}"))
    return loaded


@pytest.fixture(scope="module")
def path(results, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    return write_report([section(result) for result in results], out, title=TITLE, text=[HOSTILE])


@pytest.fixture(scope="module")
def markup(path):
    return Markup(path.read_text())


def test_text_of_models_and_files_never_becomes_markup(results, markup):
    figures = sum(len(result.figures()) for result in results)
    assert {tag for tag, _ in markup.elements} <= TAGS
    assert len(markup.scripts) == 4 + figures
    names = {name for _, about in markup.elements for name in about}
    assert not [name for name in names if name.startswith("on") or name == "src"]
    links = {about["href"] for tag, about in markup.elements if tag == "a"}
    assert all(re.fullmatch(r"#[\w-]+|https://arxiv\.org/abs/[\d.]+", link) for link in links)
    for text in (
        r"<script>document.title='owned'</script>\u202e",
        r"\x00",
        "🙂",
        "<i onmouseover=alert(3)>model",
        "<u>&.acts",
    ):
        assert text in markup.text
    assert "\0" not in markup.text
    assert "\u202e" not in markup.text


def test_a_result_tells_what_it_found_how_and_from_what(results, markup):
    lens, sinks = results
    for text in (
        lens.headline(),
        "the model's unembedding applied to the residual stream of every layer",  # the question
        "LogitLens(h_l) = W_U LN_f(h_l) + b_U",  # the definition
        "arXiv 2410.10781",  # its source
        "Maximum number of tokens with their own rows in the table",  # what a setting means
        "(default 64)",
        "mean_kl layer nats",  # what was measured, its axes and units
        "has alpha of H_T / T at position 0",  # a control
        lens.provenance["store_fingerprint"],
        sinks.provenance["model_fingerprint"],
    ):
        assert text in markup.text, text
    loss = lens.data["mean_cross_entropy"].to_numpy()
    assert f"{loss.min():.4g} to {loss.max():.4g}" in markup.text


def test_the_same_results_give_the_same_page(results, path, tmp_path):
    again = write_report([section(result) for result in results], tmp_path / "again.html", title=TITLE, text=[HOSTILE])
    assert again.read_bytes() == path.read_bytes()


REACHABLE = """[...document.querySelectorAll('a[href], .wide, summary, button')]
  .filter((part) => part.checkVisibility() && !part.closest('details:not([open]) > :not(summary)'))
  .map((part) => part.outerHTML.slice(0, 60))"""


def test_the_page_in_a_browser(results, path, tmp_path):
    figures = [figure for result in results for figure in result.figures().values()]
    with chromium() as page:
        page.size(1200, 900)
        page.open(path.as_uri())
        # nothing ran that is not ours, nothing was asked for
        for number in range(len(figures)):  # each is drawn when it comes near
            page.run(f"document.querySelectorAll('.plot')[{number}].scrollIntoView()")
            page.wait(f"document.querySelectorAll('.plot > div')[{number}].querySelector('.main-svg')")
        assert page.run("document.title") == r"<script>document.title='owned'</script>\u202e"
        assert page.run("document.querySelectorAll('img, [onerror], [onclick], [onmouseover]').length") == 0
        # what is drawn is what was found
        drawn = page.run("[...document.querySelectorAll('.plot > div')].map((p) => p.data.length)")
        assert drawn == [len(figure.data) for figure in figures]
        values = "document.querySelector('.plot > div').calcdata[0][0].z"
        numbers = page.run(f"Array.from({values}, (line) => Array.from(line))")
        line = len(numbers[0])  # as many tokens as the page is wide
        expected = np.asarray(rewrap(figures[0], line).data[0].z, float)
        np.testing.assert_allclose(np.array(numbers, float)[: len(expected)], expected, rtol=1e-6)
        assert page.run("document.querySelector('.plot > div').getBoundingClientRect().width") <= 1200
        # the keyboard reaches everything, in the order of the page
        expected = page.run(REACHABLE)
        page.run("location.hash = '#top'")  # the keyboard starts at what was last scrolled to, in some browsers
        reached = []
        for _ in expected:
            page.key("Tab", 9)
            reached.append(page.run("document.activeElement.outerHTML.slice(0, 60)"))
        assert reached == expected
        page.run("document.querySelector('summary').focus()")
        page.key("Enter", 13, text="\r")
        page.wait("document.querySelector('details').open", 10)
        # dark, as the reader's system asks for it, and back
        page.media("dark")
        light, ink = "rgb(255, 255, 255)", "document.querySelector('.plot .main-svg').style.background"
        page.wait(
            f"{ink} != '{light}' && {ink} != 'white' && getComputedStyle(document.body).backgroundColor != '{light}'"
        )
        # printing opens what is folded, and draws light
        page.run("dispatchEvent(new Event('beforeprint'))")
        page.wait(
            f"document.querySelectorAll('details:not([open])').length == 0 && ({ink} == '{light}' || {ink} == 'white')"
        )
        page.run("dispatchEvent(new Event('afterprint'))")
        assert page.run("document.querySelectorAll('details[open]').length") == 1
        assert len(page.pdf()) > 50_000
        page.size(680, 900)
        page.ask("Emulation.setEmulatedMedia", media="print")
        page.run("dispatchEvent(new Event('beforeprint'))")
        tables = "[...document.querySelectorAll('.data')].filter((part) => part.clientWidth)"
        assert page.run(f"{tables}.length") == 2
        whole = "(part) => part.scrollWidth <= part.parentElement.clientWidth"
        assert page.run(f"{tables}.every({whole})")
        # on a phone nothing but figures and tables scrolls sideways
        page.media("light")
        page.size(390, 844, mobile=True)
        page.open(path.as_uri())
        assert page.run("document.documentElement.scrollWidth") <= 390
        assert page.run("[...document.querySelectorAll('.wide')].every((part) => part.clientWidth <= 390)")
        assert page.complaints == []
        assert set(page.requests) == {path.as_uri()}


PRINTED_CELLS = """[...document.querySelectorAll('.data table:not([hidden])')].map((part) =>
  [...part.rows].map((row) => [...row.cells].map((cell) => cell.textContent)))"""
CUT = """[...document.querySelectorAll('table:not([hidden]) :is(th, td)')].filter((cell) => {
  const range = document.createRange(); range.selectNodeContents(cell);
  const right = range.getBoundingClientRect().right;
  const lines = new Set([...range.getClientRects()].map((part) => Math.round(part.top)));
  const broken = lines.size > 1 && !/\\s/.test(cell.textContent);
  return broken || right > 680 || right > cell.getBoundingClientRect().right + 1;
}).map((cell) => cell.textContent)"""


def test_a_printed_table_goes_on_below_with_every_column_whole(tmp_path):
    names = ["layer", "place", *(f"same_answer_high_{number}" for number in range(20))]
    values = {name: np.linspace(-6.648e-05, 1, 4) + number for number, name in enumerate(names[2:])}
    table = pd.DataFrame({"layer": [0, 1, 2, 3], "place": ["subject", "other", "end", "a" * 70], **values})
    settings = [("a_name_of_a_setting", json.dumps({"key": "value " * 40}), "what it means")]
    path = write_report([Section("part", table=table, settings=settings)], tmp_path / "page.html", title="t")
    with chromium() as page:
        page.size(700, 900)
        page.open(path.as_uri())
        before = page.run(PRINTED_CELLS)
        page.ask("Emulation.setEmulatedMedia", media="print")
        page.run("dispatchEvent(new Event('beforeprint'))")
        parts = page.run(PRINTED_CELLS)
        assert len(parts) > 1
        assert page.run(CUT) == []
        for row in range(5):
            keys = len([name for name in parts[1][0] if name in ("layer", "place")])
            assert [cell for n, part in enumerate(parts) for cell in part[row][keys * (n > 0) :]] == before[0][row]
        assert keys == 1  # the texts of the other one are long
        page.run("dispatchEvent(new Event('afterprint'))")
        assert page.run(PRINTED_CELLS) == before


def drawn_for_print(page, path, pictures):
    """Opens a page as it is printed, and waits for as many pictures by plotly, two a figure."""
    page.size(700, 900)
    page.open(path.as_uri())
    page.ask("Emulation.setEmulatedMedia", media="print")
    page.run("dispatchEvent(new Event('beforeprint'))")
    page.wait(f"document.querySelectorAll('.plot .main-svg').length >= {pictures}")


def test_printed_figures_leave_room_for_their_heading(tmp_path):
    figures = {str(height): figure(width=600).update_layout(height=height) for height in (450, 800, 1600)}
    first = {"first": figure(width=600).update_layout(height=1600)}
    sections = [Section("part", figures=figures), Section("high", figures=first)]
    path = write_report(sections, tmp_path / "page.html", title="t")
    with chromium() as page:
        drawn_for_print(page, path, pictures=4)
        heights = page.run("[...document.querySelectorAll('.plot > div')].map((p) => p.getBoundingClientRect().height)")
    assert heights[0] <= 345
    assert heights[1] <= 560
    assert 640 < heights[2] <= 900
    assert heights[3] <= 641  # below the heading of its result


def test_printed_results_follow_each_other_and_headings_stay_with_their_figure(tmp_path):
    """Pages of the results, by the destinations of the links to them: [page, points from its foot]."""
    lines = [("name", "1", "meaning")] * 3
    short = [Section(f"part {number}", ["A headline."], controls=lines) for number in range(2)]
    plots = {name: figure(width=600).update_layout(height=450) for name in "ab"}
    path = write_report([*short, Section("drawn", ["A headline."], plots)], tmp_path / "page.html", title="t")
    with chromium() as page:
        page.open(path.as_uri())
        pdf = page.pdf()
    found = re.findall(rb"/part-(\d+) \[(\d+) 0 R ?/XYZ [\d.]+ ([\d.]+)", pdf)
    places = {int(part): (int(sheet), float(top)) for part, sheet, top in found}
    assert places[0][0] == places[1][0] != places[2][0]
    assert places[2][1] == 792  # the top: its first figure does not fit below the others


def test_a_printed_grid_of_tokens_is_as_large_as_longer_lines_allow(tmp_path):
    drawn = token_grid(
        np.zeros((30, 28)),
        tokens=[f"in{at}" for at in range(28)],
        positions=range(28),
        layers=range(30),
        title="t",
        subtitle="s",
        unit="probability",
        cells=[["word"] * 28] * 30,
        hover=[["word"] * 28] * 30,
    )
    path = write_report([Section("part", figures={"a": figure(), "b": drawn})], tmp_path / "page.html", title="t")
    with chromium() as page:
        drawn_for_print(page, path, pictures=6)
        drawn_at = "document.querySelectorAll('.plot')[1]"
        box = page.run(f"{drawn_at}.querySelector('.main-svg').getBoundingClientRect().toJSON()")
        scale = float(page.run(f"{drawn_at}.style.getPropertyValue('--fit')"))
    assert scale >= 0.5  # lines of 8 tokens, which fit without a change of scale: less than 0.4
    assert box["width"] <= 681
    assert box["height"] <= 900
