"""Figures as files: the same bytes twice, the numbers that were drawn, text that stays text, and print that fits."""

from __future__ import annotations

import dataclasses
import html
import html.parser
import json
import re
import sys
import warnings
import xml.etree.ElementTree as ElementTree
import zlib
from itertools import combinations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from browser import draw_for_print, overlapping, require_export, text_boxes
from plotly.subplots import make_subplots
from refusals import refused
from warned import warned

import workbench as wb
from workbench.cli.main import main
from workbench.figures.attention_map import head_attention
from workbench.figures.describe import alt_text, caption, figure_data
from workbench.figures.group_intervals import group_intervals
from workbench.figures.head_grid import head_grid, with_side_panel
from workbench.figures.layer_curves import layer_curves
from workbench.figures.legend_room import with_legend_room
from workbench.figures.paper import to_paper
from workbench.figures.safe_text import axis_title, label, plain, sentence
from workbench.figures.theme import CATEGORIES, COLUMNS, DARK, INCH, POINT, PROBABILITY, SIGNED, to_dark
from workbench.figures.token_grid import token_grid
from workbench.figures.token_strip import token_strip
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import LogitLens

HOSTILE = "<script>alert(1)</script><a href='x'>&amp;$x$\u202e\x00\"%{x}"


@pytest.fixture(scope="module")
def result(tiny_models, tiny_tokenizer, tmp_path_factory):
    model = Model(tiny_models["llama"], tiny_tokenizer, HOSTILE)
    texts = ["Once upon a time <script> $x$", "the little day"]
    store = wb.record(model, texts, out=tmp_path_factory.mktemp("figures") / "t.acts", show_progress=False)
    return LogitLens(top_k=2, where="position < 10").run(store)


def curves(names=("one", "two")) -> go.Figure:
    values = {name: np.array([1.0, 2.0, 4.0]) + at for at, name in enumerate(names)}
    return layer_curves(values, layers=[0, 1, 2], title="A title", unit="nats")


def grid(tokens, **changes) -> go.Figure:
    texts = [list(tokens)] * 2
    defaults = {"cells": texts, "hover": texts, "tokens": tokens, "positions": range(len(tokens)), "layers": [0, 1]}
    defaults |= {"title": "A title", "subtitle": "more of it", "unit": "probability"}
    return token_grid(np.linspace(0, 1, 2 * len(tokens)).reshape(2, -1), **{**defaults, **changes})


def heads() -> go.Figure:
    texts = [[""] * 12] * 4
    return head_grid(np.eye(4, 12), hover=texts, layers=range(4), title="t", subtitle="s", unit="alpha (attention)")


def panels() -> go.Figure:
    figure = make_subplots(2, 2, shared_yaxes=True, subplot_titles=["a one", "b two", "c three", "d four"])
    for at in range(4):
        figure.add_scatter(x=[0, 1, 2], y=[at, 1, 2], name=f"line {at}", row=1 + at // 2, col=1 + at % 2)
    return figure.update_xaxes(title="layer", row=2).update_yaxes(title="share of tokens", col=1)


def long_titles() -> go.Figure:
    titles = [f"after the feed-forward part and its residual, {n}" for n in range(3)]
    figure = make_subplots(1, 3, shared_yaxes=True, subplot_titles=titles)
    for at in range(3):
        figure.add_heatmap(z=np.eye(9), row=1, col=1 + at, showscale=at == 2, colorbar={"title": {"text": "share"}})
    return figure.update_xaxes(title="key")


def bars() -> go.Figure:
    names = [f"a long label of a bar, {n}" for n in range(50)]
    figure = go.Figure(go.Bar(x=np.arange(50), y=names, orientation="h"))
    return figure.update_xaxes(title="a title of an axis that is longer than the axis", dtick=1)


WORDS = [f" token{n}" for n in range(30)]
SHAPES = {"curves": curves, "grid": lambda: grid([f"·token{n}" for n in range(20)]), "heads": heads}
SHAPES |= {
    "menu": lambda: head_attention(
        np.full((2, 30, 30), 1 / 30), heads=["L0H1", "L1H0"], tokens=WORDS, title="t", subtitle=""
    ),
    "strip": lambda: token_strip(
        np.arange(30.0), tokens=WORDS, positions=range(30), title="", subtitle="", unit="nats"
    ),
    "beside": lambda: with_side_panel(
        heads(), {"position 0": np.arange(1.0, 5), "others": np.full(4, 80.0)}, unit="residual L2 norm"
    ),
    "deep": lambda: head_grid(
        np.eye(48, 64), hover=[[""] * 64] * 48, layers=range(48), title="t", subtitle="s", unit="alpha (attention)"
    ),
    "names": lambda: group_intervals(
        {"one": np.ones((3, 4))},
        categories=["all layers", "random keys, all layers", "chosen<br>1,234", "of others"],
        hover="",
        title="t",
        subtitle="s",
    ),
    "panels": panels,
    "long_titles": long_titles,
    "bars": bars,
    "long_key": lambda: curves([f"a series of a long name, {n}" for n in "abcdefg"]),
}


# Palettes: what colour-blind eyes see, in CIELAB (Machado, Oliveira and Fernandes 2009, severity 1)

SEEN = {
    "all": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colour: str, vision: str = "all") -> np.ndarray:
    coded = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.asarray(SEEN[vision]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ linear / [0.9505, 1, 1.089]
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


@pytest.mark.parametrize("vision", SEEN)
def test_palettes_are_told_apart_with_any_colour_vision(vision):
    apart = [np.linalg.norm(lab(a, vision) - lab(b, vision)) for a, b in combinations(CATEGORIES, 2)]
    assert min(apart) > 10
    assert np.linalg.norm(lab(SIGNED[0][1], vision) - lab(SIGNED[-1][1], vision)) > 50


@pytest.mark.parametrize("vision", SEEN)
def test_lightness_alone_tells_the_order(vision):
    light = [lab(colour, vision)[0] for _, colour in PROBABILITY]
    assert light == sorted(light, reverse=True)
    signed = [lab(colour, vision)[0] for _, colour in SIGNED]
    middle = len(signed) // 2
    assert signed[: middle + 1] == sorted(signed[: middle + 1])
    assert signed[middle:] == sorted(signed[middle:], reverse=True)
    assert lab("#ffffff", vision)[0] - signed[middle] < 5


def test_dark_changes_colours_and_nothing_else():
    light = heads().add_scatter(x=["0"], y=["0"], name="#000000", line={"color": "#000000"})
    dark = to_dark(light)
    assert dark.layout.template == DARK
    assert dark.data[0].colorscale != light.data[0].colorscale
    assert [lab(dark.data[0].colorscale[at][1])[0] > 90 for at in (0, -1)] == [False, True]  # none is the page
    assert (dark.data[1].name, dark.data[1].line.color) == ("#000000", "#f2f4f7")
    cells = grid(["#000000", "b"])
    assert decoded(to_dark(cells).to_dict()["data"][0]["text"]).tolist() == cells.data[0].text.tolist()
    assert (to_dark(cells).data[0].textfont.color, cells.data[0].textfont.color) == ("#f2f4f7", "#000000")
    np.testing.assert_array_equal(decoded(dark.to_dict()["data"][0]["z"]), light.data[0].z)


# Words


@pytest.mark.parametrize("text", [HOSTILE, "a  b", "1 < 2 & 3", ""])
def test_plain_is_what_label_and_sentence_wrote(text):
    written = sentence(text)
    assert not set("<>$\"'") & set(written)
    assert plain(written) == text.replace("\u202e", "\\u202e").replace("\x00", "\\x00")
    assert plain(label(text, 100)).replace("·", " ") == plain(written)
    assert plain("<b>x</b><br>y") == "x; y"


def test_units_title_an_axis():
    assert axis_title({"units": "nats"}) == "nats"
    assert axis_title({"units": "nats"}, "entropy") == "entropy (nats)"
    assert axis_title({}, "k") == "k"
    assert axis_title({"units": "<b>"}) == "&lt;b&gt;"


def test_caption_and_alternative_text():
    assert caption(grid(["a", "b"])) == "A title. More of it."
    assert caption(go.Figure()) == ""
    assert alt_text(grid(["a", "b"])) == (
        "Heat map of layer by input token. 2 rows (layer): 0 to 1, 2 columns (input token): a to b. 4 values "
        "(probability) from 0 at layer 0, input token a to 1 at layer 1, input token b."
    )
    assert alt_text(curves()) == "Line chart of nats by layer. one from 1 at 0 to 4 at 2; two from 2 at 0 to 5 at 2."
    assert alt_text(curves([str(n) for n in range(11)])).endswith("; and 3 more.")
    assert "a one, line 0 from 0 at 0 to 2 at 2; b two, line 1 from 1 at 0 to 2 at 2" in alt_text(panels())
    assert alt_text(go.Figure()) == "Empty figure."
    beside = alt_text(SHAPES["beside"]())
    assert "4 rows (layer): 0 to 3, 12 columns (head): 0 to 11. 48 values (alpha (attention)) from 0 at" in beside
    assert "at layer 0, head 0." in beside
    assert "columns (input token): <s> to b." in alt_text(grid(["<s>", "b"]))
    several = alt_text(long_titles())
    assert "9 rows: 0 to 8, 9 columns (key): 0 to 8. 243 values (share) from 0 at after the feed-forward" in several


# Numbers


def decoded(value):
    """A part of `to_dict()`, which holds arrays as base64."""
    if isinstance(value, dict) and "bdata" in value:
        import base64

        flat = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
        return flat.reshape([int(n) for n in str(value["shape"]).split(",")]) if "shape" in value else flat
    return np.asarray(value)


def test_the_figures_hold_what_the_result_holds(result):
    curves = [trace for trace in result.figure("by_layer").to_dict()["data"] if trace.get("name")]  # not the bands
    for curve, name in zip(curves, ("entropy", "kl", "cross_entropy"), strict=True):
        np.testing.assert_array_equal(decoded(curve["y"]), result.data[f"mean_{name}"])
        np.testing.assert_array_equal(decoded(curve["x"]), result.data["layer"])
    drawn = figure_data(result.figure("grid"))["value"].to_numpy().reshape(result.data.sizes["layer"], -1)
    np.testing.assert_array_equal(drawn, result.data["top_probability"][:, : drawn.shape[1], 0])


def test_the_table_holds_what_is_drawn():
    table = figure_data(grid(["<b>", "$"]))
    assert table.columns.tolist() == ["series", "x", "x_label", "y", "y_label", "value", "text"]
    assert table["value"].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert table["x_label"].tolist() == table["text"].tolist() == ["<b>", "$"] * 2
    assert table["y_label"].tolist() == ["0", "0", "1", "1"]
    points = go.Figure(go.Scatter(x=[1, 2], y=[3.0, 5.0], error_y={"array": [1, 1], "arrayminus": [2, 0]}, name="&lt;"))
    assert figure_data(points).to_dict("list") == {
        "series": ["<", "<"],
        "x": [1, 2],
        "y": [3, 5],
        "low": [1, 5],
        "high": [4, 6],
    }
    assert figure_data(panels())["panel"].tolist() == [
        t for t in ("a one", "b two", "c three", "d four") for _ in "xyz"
    ]
    assert figure_data(go.Figure([go.Pie(values=[1, 2], name="p"), go.Box(y=[1, 2], name="b")]))["y"].tolist() == [1, 2]
    coloured = go.Figure(go.Bar(y=[1, 2], marker={"color": [0.5, -0.5]}))
    assert figure_data(coloured)["value"].tolist() == [0.5, -0.5]
    note = {"xref": "paper", "yref": "paper", "showarrow": False, "text": "a note"}
    assert figure_data(go.Figure(go.Scatter(y=[1]), {"annotations": [note]}))["panel"].tolist() == ["a note"]


# Paper


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_paper_has_real_units_and_no_title(shape, columns):
    figure = SHAPES[shape]()
    before = json.loads(figure.to_json())
    printed, _ = to_paper(figure, columns)
    assert json.loads(figure.to_json()) == before
    assert printed.layout.width == COLUMNS[columns] * INCH
    assert printed.layout.height <= 9 * INCH
    assert printed.layout.title.text is None
    layout = printed.layout.template.layout
    sizes = [layout.xaxis.tickfont.size, layout.xaxis.title.font.size, layout.legend.font.size, layout.font.size]
    assert [size / POINT for size in sizes] == pytest.approx([7, 8, 7, 8])
    visible = go.Figure(figure)
    visible.data = [trace for trace in visible.data if trace.visible is not False]
    drawn = (figure_data(f).get("value", pd.Series(dtype=float)).dropna() for f in (printed, visible))
    pd.testing.assert_series_equal(*drawn, check_index=False)


def test_a_grid_keeps_as_many_tokens_as_stay_legible():
    narrow, cut = to_paper(grid(["abcdefghi"] * 40))
    assert narrow.layout.meta["grid"]["line"] == 7
    assert {text for row in narrow.data[0].text for text in row} == {"abcdef…", ""}
    assert cut == ["the text in cells after 7 characters"]
    two, cut = to_paper(grid(["abc"] * 20), 2)
    assert (two.layout.meta["grid"]["line"], cut) == (15, [])
    deep = {"layers": range(30), "cells": [["abc"] * 40] * 30, "hover": [["abc"] * 40] * 30}
    tokens = {"tokens": ["abc"] * 40, "positions": range(40), "title": "", "subtitle": "", "unit": ""}
    few, cut = to_paper(token_grid(np.zeros((30, 40)), **deep, **tokens))
    assert (len(figure_data(few)), cut) == (7 * 30, ["tokens after the first 7"])
    menu, cut = to_paper(SHAPES["menu"]())
    assert [trace.name for trace in menu.data] == ["L0H1", None]
    assert not menu.layout.updatemenus
    assert cut == ["other entries of the menu: L1H0", "labels of the x axis, all but one in 2"]
    assert refused(RequestError, lambda: to_paper(curves(), 3)) == "columns must be 1 or 2, not 3"


# Files


def drawn_at(pdf: bytes) -> float:
    """By how much a page's drawing is scaled: CSS pixels are 0.75 pt."""
    for start in (match.end() for match in re.finditer(rb"stream\r?\n", pdf)):
        try:
            drawing = zlib.decompressobj().decompress(pdf[start:])
        except zlib.error:
            continue
        page = re.match(rb"([\d.]+) 0 0 -[\d.]+ 0 [\d.]+ cm\nq\n([\d.]+) 0 0 [\d.]+ ([\d.]+) ([\d.]+) cm", drawing)
        if page:
            assert (float(page[3]), float(page[4])) == (0, 0)  # from the corner on
            return round(float(page[1]) * float(page[2]) / 0.75, 4)
    raise AssertionError("no drawing found")


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_everything_twice_is_the_same_bytes(result, tmp_path):
    require_export()
    paths = wb.export(result, tmp_path / "one")
    wb.export(result, tmp_path / "two")
    files = contents(tmp_path / "one")
    assert files == contents(tmp_path / "two")
    kinds = ("html", "json", "parquet", "pdf", "png", "svg")
    assert list(files) == sorted(
        [*(f"{name}.{k}" for name in ("grid", "by_layer", "depth") for k in kinds), "plotly.min.js"]
    )
    assert sorted(path.name for path in paths) == list(files)
    for name, file in files.items():
        if name.endswith(".pdf"):
            width = float(re.search(rb"/MediaBox \[0 0 ([\d.]+)", file)[1])
            assert width == 3.25 * 72
            fonts = re.findall(rb"/FontName /([\w+-]+)", file)
            assert fonts
            assert len(re.findall(rb"/FontFile", file)) == len(fonts)  # each is embedded
            assert b"D:19700101000000" in file
            assert drawn_at(file) == 1  # 8 pt are 8 pt
        if name.endswith(".svg"):
            tree = ElementTree.fromstring(file)
            tags = {element.tag.rpartition("}")[2] for element in tree.iter()}
            assert tags & {"script", "a", "foreignObject"} == set()
            assert tree.get("width") == "312"
            links = [value for element in tree.iter() for key, value in element.items() if key.endswith("href")]
            assert all(link.startswith(("#", "data:image/png")) for link in links)
        if name.endswith(".png"):
            assert int.from_bytes(file[16:20]) == 3.25 * 300


def test_no_label_in_print_is_cut_or_lies_on_another(tmp_path):
    figures = {(shape, columns): to_paper(SHAPES[shape](), columns)[0] for shape in SHAPES for columns in COLUMNS}
    figures["long_key", "screen"] = with_legend_room(SHAPES["long_key"]().update_layout(title={"text": "a title"}))
    boxes = text_boxes(draw_for_print(list(figures.values()), tmp_path), tmp_path)
    for name, texts in zip(figures, boxes, strict=True):
        assert len(texts) > 5
        assert [text for text in texts if min(text[1:5]) < -0.5] == [], name
        assert overlapping(texts) == [], name


def test_one_tab_draws_for_print_as_export_does(tmp_path):
    require_export()
    wb.export(panels(), tmp_path / "panels", formats=["svg"])
    (drawing,) = draw_for_print([to_paper(panels())[0]], tmp_path)
    exported = (tmp_path / "panels" / "panels.svg").read_text()
    assert drawing == re.sub("<title>.*?</desc>", "", exported)


def test_hostile_text_is_text_in_every_file(result, tmp_path):
    figure = result.figure("by_layer")
    next(trace for trace in figure.data if trace.name).name = label(HOSTILE, 100)
    wb.export(figure, tmp_path / "x", formats=["html"], data="csv")
    page = (tmp_path / "x" / "x.html").read_text()
    description = json.loads((tmp_path / "x" / "x.json").read_text())
    visible = HOSTILE.replace("\u202e", "\\u202e").replace("\x00", "\\x00")
    assert visible in description["provenance"]
    assert visible.replace(" ", "·")[:20] in description["alt"]
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)
    parser.feed(page)
    assert tags.count("script") == 2  # plotly's and the figure's
    assert "a" not in tags
    assert not re.findall(r'(?:src|href)="?http', page)
    assert pd.read_csv(tmp_path / "x" / "x.csv")["series"].iloc[0] == visible.replace(" ", "·")
    figure.update_layout(title={"text": f"title {HOSTILE} \x1b[31m"})  # of another author, who escapes nothing
    wb.export(figure, tmp_path / "x", formats=["html"])
    page = (tmp_path / "x" / "x.html").read_text()
    caption = page.partition("<figcaption>")[2].partition("</figcaption>")[0]
    assert "Title " in caption
    assert not set("<>\u202e\x00\x1b") & set(caption)


def test_a_result_is_exported_by_its_path(result, tmp_path):
    options = {"formats": "html", "figures": "by_layer"}
    for source, folder in ((result, "one"), (str(result.save(tmp_path / "saved")), "two")):
        wb.export(source, tmp_path / folder, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_lies_beside_a_figure(result, tmp_path):
    wb.export(result, tmp_path, formats=["html"], figures=["by_layer"])
    description = json.loads((tmp_path / "by_layer.json").read_text())
    assert description["caption"] == caption(result.figure("by_layer"))
    assert description["alt"] == alt_text(result.figure("by_layer"))
    source = result.provenance
    for part in (
        source["model_fingerprint"][:12],
        source["store"],
        source["store_fingerprint"][:12],
        "probe logit-lens",
    ):
        assert part in description["provenance"]
    assert f'top_k 2, where "position < 10"; workbench {source["workbench"]}' in description["provenance"]
    table = pd.read_parquet(tmp_path / "by_layer.parquet")
    pd.testing.assert_frame_equal(table, figure_data(result.figure("by_layer")))
    np.testing.assert_array_equal(table["y"], np.concatenate([c.y for c in result.figure("by_layer").data if c.name]))
    page = (tmp_path / "by_layer.html").read_text()
    assert f"<figcaption>{description['caption']}</figcaption>" in html.unescape(page)
    assert '<script src="plotly.min.js">' in page
    assert sorted(contents(tmp_path)) == ["by_layer.html", "by_layer.json", "by_layer.parquet", "plotly.min.js"]


def test_settings_of_the_pages(tmp_path):
    wb.export(curves(), tmp_path / "in", formats=["html"], plotlyjs="inside", theme="dark")
    assert sorted(contents(tmp_path / "in")) == ["in.html", "in.json", "in.parquet"]
    page = (tmp_path / "in" / "in.html").read_text()
    assert len(page) > 1e6
    assert "background: #14171f" in page


def test_without_a_chrome_the_rest_is_written_and_one_line_says_how(tmp_path, monkeypatch):
    pytest.importorskip("kaleido")
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "nowhere"))
    with warned(r"^no pdf, svg: no Chrome or Chromium was found; install one, or run ") as warnings_logged:
        wb.export(curves(), tmp_path / "fig", formats=["svg", "html", "pdf"])
    assert len(warnings_logged) == 1
    assert sorted(contents(tmp_path / "fig")) == ["fig.html", "fig.json", "fig.parquet", "plotly.min.js"]


def test_without_kaleido_too(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with warned(r"^no png: kaleido is not installed; pip install 'interp-workbench\[export\]'$"):
        wb.export(curves(), tmp_path / "fig", formats=["png"])
    assert sorted(contents(tmp_path / "fig")) == ["fig.json", "fig.parquet"]


def test_a_chrome_that_fails_is_told(tmp_path, monkeypatch):
    kaleido = pytest.importorskip("kaleido")

    def write(jobs, **_):
        jobs[0]["path"].write_bytes(b"<svg/>")
        return (RuntimeError("it\nbroke"),)

    monkeypatch.setattr(kaleido, "write_fig_from_object_sync", write)
    with warned(r"^no pdf, svg: 1 of 2 pictures failed in Chrome: it broke$"):
        wb.export(curves(), tmp_path / "fig", formats=["svg", "pdf"])
    assert sorted(contents(tmp_path / "fig")) == ["fig.json", "fig.parquet", "fig.pdf"]


def test_refusals(result, tmp_path):
    def refusal_of(source=None, folder=tmp_path / "x", **changes):
        return refused(RequestError, lambda: wb.export(source or curves(), folder, **changes))

    assert refusal_of(formats=["pfd"]) == "formats has 'pfd'; nearest: pdf; known: html, pdf, svg, png"
    assert refusal_of(theme="drak") == "theme has 'drak'; nearest: dark; known: light, dark"
    assert refusal_of(data="xls").startswith("data has 'xls'")
    assert refusal_of(plotlyjs="cdn") == "plotlyjs has 'cdn'; known: shared, inside"
    assert refusal_of(columns=3) == "columns must be 1 or 2, not 3"
    assert refusal_of(result, figures=["gird"]) == "figure 'gird' is none of grid, by_layer, depth"
    (tmp_path / "file").touch()
    assert refusal_of(folder=tmp_path / "file") == f"folder {str(tmp_path / 'file')!r} is a file; name a folder"

    class Odd:
        def figures(self):
            return {"../x": curves()}

    assert refusal_of(Odd()) == "figure '../x' cannot be used as a file name; use letters, digits, - and _"
    assert not (tmp_path / "x").exists()


def test_the_command(result, tmp_path, capsys):
    named = dataclasses.replace(result, provenance={**result.provenance, "model": "m"})
    named.save(tmp_path / "lens")
    out = tmp_path / "figures"
    options = ["--figures", "by_layer", "--formats", "html", "--data", "csv", "--columns", "2"]
    with pytest.raises(SystemExit) as stop, warnings.catch_warnings():
        main(["export", str(tmp_path / "lens"), "--out", str(out), *options])
    assert stop.value.code == 0
    names = ["by_layer.html", "by_layer.csv", "by_layer.json", "plotly.min.js"]
    assert capsys.readouterr().out.splitlines() == [f"wrote  {out / name}" for name in names]
    with pytest.raises(SystemExit) as stop:
        main(["export", str(tmp_path / "lens"), "--out", str(out), "--figures", "gird"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "workbench: figure 'gird' is none of grid, by_layer, depth\n"
