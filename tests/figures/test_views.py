"""Tests of the views: their content, at the size of large models too, and hostile tokens as text in a browser."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from browser import visit
from planted import linear_unembed, planted_store
from plotly import io
from plotly.io._base_renderers import NotebookRenderer
from plotly.offline import get_plotlyjs
from refusals import refused

import workbench as wb
from workbench.analysis.lens_figures import lens_depth, lens_grid
from workbench.figures.attention_map import head_attention
from workbench.figures.head_grid import head_grid, with_side_panel
from workbench.figures.paper import to_paper
from workbench.figures.safe_text import visible
from workbench.figures.theme import SIGNED
from workbench.figures.token_strip import restrip, token_strip
from workbench.io.errors import RequestError
from workbench.probes import AttentionSinks, FutureLens, LogitLens, SuccessorHeads, TokenErasure
from workbench.results.result import Result

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><img src=x onerror='window.hacked = 1'>",
    "<a href='javascript:alert(1)'>",
    "<b>bold</b>",
    "&lt;i&gt;",
    "$x$",
    "\u202eevil",
    "a\x00b",
    "\x1b[31m",
    "😀",
    "%{x}",
    '"quoted"',
    "שלום",
    "\n",
]
SOURCE = {"model": "m", "model_fingerprint": "a" * 64, "store": "s", "store_fingerprint": "b" * 64, "rows": 1}
SOURCE |= {"settings": {"site": "resid_post"}, "workbench": "0"}


def tokens_of(number: int) -> list[str]:
    return [f" token{n}" for n in range(number)]


# What they draw


def strip(values, **changes):
    defaults = {"tokens": tokens_of(len(values)), "positions": range(7, 7 + len(values)), "title": "t", "subtitle": "s"}
    return token_strip(np.asarray(values, float), **{**defaults, "unit": "nats", **changes})


def test_a_strip_is_read_line_by_line():
    figure = strip([1, 2, np.nan, 4, 5], line=2, tokens=["a", " b", "<", "d", "e"])
    (heat,) = figure.data
    np.testing.assert_array_equal(np.array(heat.z), [[1, 2], [np.nan, 4], [5, np.nan]])
    assert [list(row) for row in heat.text] == [["a", "·b"], ["&lt;", "d"], ["e", ""]]
    assert heat.customdata[1][1] == "position 10, d: 4"
    assert figure.layout.yaxis.ticktext == ("7", "9", "11")
    assert heat.colorbar.title.text == "nats"


@pytest.mark.parametrize(
    ("values", "changes", "ends"),
    [
        ([1, 4], {}, (0, 4)),
        ([-3, 4], {}, (-3, 4)),
        ([-3, 2], {"palette": SIGNED}, (-3, 3)),
        ([np.nan, np.nan], {}, (0, 1)),
        ([1, 4], {"limits": (2.0, 8.0)}, (2, 8)),
    ],
)
def test_ends_of_a_strips_colours(values, changes, ends):
    (heat,) = strip(values, **changes).data
    assert (heat.zmin, heat.zmax) == ends


@pytest.mark.parametrize("line", [4, 6, 10])  # the first paragraph has 10 tokens
def test_a_strip_in_shorter_lines_is_what_would_be_drawn_so(line):
    """Newlines end lines, and runs of Hebrew stand from right to left, in long lines and in short ones."""
    words = [*tokens_of(5), "שלום", "עולם", "ספר", " a", "\n", *tokens_of(9)]
    values = np.arange(len(words)) / 10
    long, short = (strip(values, tokens=words, line=line) for line in (line, 3))
    copy, number = restrip(long, 3, 60)
    assert number == len(words)
    for name in ("z", "text", "customdata"):
        np.testing.assert_array_equal(np.array(copy.data[0][name]), np.array(short.data[0][name]))
    assert copy.layout.yaxis.ticktext == short.layout.yaxis.ticktext
    assert (copy.layout.width, copy.layout.height) == (short.layout.width, short.layout.height)
    cut, number = restrip(long, 3, 2)
    assert (number, len(cut.data[0].z)) == (6, 2)
    printed, omitted = to_paper(strip(values, tokens=words))
    assert printed.data[0].text[0][0] == "·token0"
    assert not any("too narrow" in note for note in omitted)
    assert "tokens after the first 420" in to_paper(strip(np.zeros(500)))[1]


def test_the_head_picker_has_every_head():
    patterns = np.random.default_rng(0).dirichlet(np.ones(5), (3, 5))
    figure = head_attention(patterns, heads=["L2H0", "L0H1", "L1H1"], tokens=list("abcde"), title="T", subtitle="s")
    for trace, pattern in zip(figure.data[:3], patterns, strict=True):
        causal = np.tril(np.ones((5, 5), bool))
        np.testing.assert_allclose(np.array(trace.z, float)[causal], pattern[causal], rtol=1e-6)
        assert np.isnan(np.array(trace.z, float)[~causal]).all()
    assert [trace.visible for trace in figure.data] == [True, False, False, None, None, None]
    masked, small_masked, small = figure.data[3:]
    grey = ~np.isnan(np.array(small_masked.z, float))
    assert grey.sum() == 3 * 10  # keys after their query, of each head
    np.testing.assert_array_equal(grey[:, 6:11], ~causal)
    assert (small_masked.xaxis, small_masked.yaxis, small_masked.colorscale) == ("x2", "y2", masked.colorscale)
    np.testing.assert_array_equal(np.isnan(np.array(masked.z)), np.tril(np.ones((5, 5), bool)))
    assert np.array(small.z).shape == (5, 3 * 6)
    np.testing.assert_allclose(np.array(small.z)[:, 6:11][causal], patterns[1][causal], atol=1e-3)
    without = figure.layout.updatemenus[1].buttons[1].args
    assert without[0]["zmax"] == pytest.approx([np.tril(pattern)[1:, 1:].max() for pattern in patterns])
    assert without[1]["xaxis.range"] == [0.5, 4.5]
    assert figure.layout.title.text == "T, L2H0"
    buttons = figure.layout.updatemenus[0].buttons
    assert [button.label for button in buttons] == ["L2H0", "L0H1", "L1H1"]
    assert buttons[1].args[0]["visible"] == [False, True, False]
    assert buttons[1].args[2] == (0, 1, 2)
    assert buttons[1].args[1]["title.text"] == "T, L0H1"


def test_a_panel_beside_a_map_of_heads():
    grid = head_grid(np.eye(3, 2), hover=[["", ""]] * 3, layers=[0, 2, 5], title="t", subtitle="s", unit="alpha")
    figure = with_side_panel(grid, {"sink": np.array([1.0, 10, 100])}, unit="L2 norm")
    assert list(figure.data[1].x) == [1, 10, 100]
    assert figure.data[1].y == figure.data[0].y == ("0", "2", "5")
    assert figure.layout.xaxis.domain[1] < figure.layout.xaxis2.domain[0]
    assert (figure.layout.xaxis2.type, figure.layout.xaxis2.title.text) == ("log", "L2 norm")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """12 documents of hostile tokens, two layers, and a model whose unembedding knows them all."""
    rng, number = np.random.default_rng(0), len(HOSTILE)
    documents = [rng.permutation(number) for _ in range(12)]
    ids = np.concatenate(documents)
    first = rng.normal(size=(number, 6))[ids]
    patterns = np.tril(rng.random((12, 2, number, number)))
    patterns /= patterns.sum(-1, keepdims=True)
    sites = {
        "resid_post.0": first,
        "resid_post.1": first + rng.normal(size=first.shape),
        "pattern.0": patterns.transpose(0, 2, 1, 3).reshape(-1, 2, number),
    }
    source = np.repeat(["</script><script>window.hacked = 1</script>", "<b>'$y$"], len(ids) // 2).tolist()
    columns = {"source": source, "word_span": np.arange(len(ids)) // 2}
    path = tmp_path_factory.mktemp("hostile") / "<b>$x$.acts"
    return planted_store(path, documents, sites, linear_unembed(rng.normal(size=(number, 6)), HOSTILE), columns=columns)


def test_the_overview_of_a_store(hostile):
    figures = hostile.figures()
    assert list(figures) == ["sites", "tokens", "norms"]
    (sites,) = figures["sites"].data
    bytes_of = {site.label: hostile[site.label][:].numpy().nbytes for site in hostile.sites}
    assert sites.y == ("pattern (1)", "resid_post (2)")
    assert sites.x == pytest.approx([bytes_of["pattern.0"] / 1e6, 2 * bytes_of["resid_post.0"] / 1e6])
    (tokens,) = figures["tokens"].data
    counts = hostile.tokens["token"].to_pandas().value_counts()
    assert list(tokens.x) == [12] * len(HOSTILE) == counts.tolist()
    assert "14 of 14 distinct tokens, 100 % of 168 rows" in figures["tokens"].layout.title.subtitle.text
    (norms,) = figures["norms"].data
    expected = [np.median(np.linalg.norm(hostile["resid_post", layer][:].numpy(), axis=1)) for layer in (0, 1)]
    np.testing.assert_allclose(norms.y, expected, rtol=1e-5)
    assert hostile.figure("norms").to_json() == figures["norms"].to_json()
    assert refused(RequestError, lambda: hostile.figure("gird")) == "figure 'gird' is none of sites, tokens, norms"
    assert "store &lt;b&gt;&#36;x&#36;.acts" in figures["sites"].layout.meta["provenance"]


def test_sinks_keep_the_attention_of_the_strongest_heads(hostile, tmp_path):
    result = AttentionSinks(length=14, min_visible=2, examples=1).run(hostile)
    strongest = int(np.argmax(result.data["alpha"].to_numpy()[0, :, 0]))
    assert result.data["example_head"].to_numpy().tolist() == [strongest]
    np.testing.assert_allclose(
        result.data["example_pattern"][0], hostile["pattern", 0][:14].numpy()[:, strongest], rtol=1e-6
    )
    assert json.loads(result.data["example_pattern"].attrs["tokens"]) == hostile.tokens["token"].to_pylist()[:14]
    result.save(tmp_path / "sinks")
    again = wb.load_result(tmp_path / "sinks")
    assert again.figure("attention").to_json() == result.figure("attention").to_json()
    none = AttentionSinks(length=14, min_visible=2, examples=0).run(hostile)
    assert "example_pattern" not in none.data
    assert "attention" not in none.figures()


# At 48 layers of 64 heads and 1,024 tokens


def page_size(figure) -> int:
    """Returns the size of the page without plotly's script, which pages share."""
    return len(figure.to_html(full_html=False, include_plotlyjs=False, include_mathjax=False).encode())


def deep_lens(layers=48, tokens=1_024) -> Result:
    rng, size = np.random.default_rng(0), layers * tokens
    table = pd.DataFrame(
        {
            "layer": np.repeat(np.arange(layers), tokens),
            "row": np.tile(np.arange(tokens), layers),
            "sequence": 0,
            "position": np.tile(np.arange(tokens), layers),
            "token": np.tile(tokens_of(tokens), layers),
            "next_token": "x",
            "entropy": rng.random(size),
            "kl": rng.random(size),
            "cross_entropy": rng.random(size),
            "rank": 1,
            **{f"top_token_{k}": [f" guess{n}" for n in rng.integers(0, 50_000, size)] for k in range(1, 6)},
            **{f"top_probability_{k}": rng.random(size) for k in range(1, 6)},
        }
    )
    data = xr.Dataset(
        {
            "top_probability": ((), 0.0, {"units": "probability"}),
            "prediction_depth": (("row",), rng.integers(0, layers + 1, tokens)),
        },
        coords={"layer": np.arange(layers), "row": np.arange(tokens)},
    )
    return Result("logit-lens", data, table, SOURCE)


def test_a_large_lens_grid_says_what_it_left_out():
    result = deep_lens()
    figure = lens_grid(result, tokens=5_000)
    subtitle = figure.layout.title.subtitle.text
    assert "cells are too many for text: hover to read it" in subtitle
    assert "hovering shows the top-1 token alone" in subtitle
    assert np.array(figure.data[0].z).shape == (16 * 51, 64)
    assert figure.layout.width < 1_100
    assert page_size(lens_grid(deep_lens(layers=30), tokens=1_024)) < 2e6
    assert page_size(figure) < 4e6
    few = lens_grid(result)
    assert "28 of 1,024 tokens" in few.layout.title.subtitle.text
    assert "top token alone" not in few.layout.title.subtitle.text
    assert few.data[0].text[1][0].startswith("·guess")
    assert page_size(lens_depth(result)) < 10e6
    depth = result.data["prediction_depth"].to_numpy()
    drawn = np.array(lens_depth(result).data[0].z, float).ravel()[:1_024]
    np.testing.assert_array_equal(drawn, np.where(depth == 48, np.nan, depth))


def test_large_maps_of_heads_strips_and_attention():
    rng = np.random.default_rng(0)
    hover = [
        ["<b>layer 11, head 11</b><br>alpha: 0.123<br>share of sequences in which it is a sink: 0.123" * 2] * 64
    ] * 48
    heads = head_grid(rng.random((48, 64)), hover=hover, layers=range(48), title="t", subtitle="s", unit="alpha")
    assert page_size(with_side_panel(heads, {"sink": rng.random(48)}, unit="L2 norm")) < 10e6
    long = strip(rng.random(5_000))
    assert "the first 2,048 of 5,000 tokens" in long.layout.title.subtitle.text
    assert "21 tokens beyond the colours" in long.layout.title.subtitle.text  # 1 % of 2,048
    assert page_size(long) < 10e6
    patterns = np.broadcast_to(rng.random((1, 1_024, 1_024), np.float32), (64, 1_024, 1_024))
    names = [f"47.{head}" for head in range(64)]
    attention = head_attention(patterns, heads=names, tokens=tokens_of(1_024), title="t", subtitle="s")
    subtitle = attention.layout.title.subtitle.text
    assert subtitle == "s; the first 16 of 64 heads; the first 160 of 1,024 tokens"
    assert page_size(attention) < 10e6


def test_large_figures_of_successor_heads():
    rng, tasks = np.random.default_rng(0), [f"task {n}" for n in range(8)]
    by_head = {name: (("layer", "head"), rng.random((48, 64)), {"units": "share"}) for name in ("macro", "null_macro")}
    by_head |= {name: (("layer", "head"), rng.random((48, 64)), {"units": "share"}) for name in ("copying", "p_value")}
    by_head |= {"p_family": by_head["p_value"], "tasks_above": (("layer", "head"), rng.integers(0, 8, (48, 64)))}
    by_task = {name: (("task",), rng.random(8)) for name in ("chance", "first_mlp_score")}
    score = (("task", "layer", "head"), rng.random((8, 48, 64)), {"units": "share"})
    circuit = {"units": "logits", "layer": 1, "head": 2, "task": "numbers"}
    data = xr.Dataset(
        by_head
        | by_task
        | {"score": score, "null_score": score, "tokens": (("task",), np.full(8, 200))}
        | {"circuit": (("member", "written"), rng.random((200, 200)), circuit)}
        | {"member_text": (("member",), tokens_of(200))},
        coords={"layer": np.arange(48), "head": np.arange(64), "task": tasks},
    )
    table = data[["macro"]].to_dataframe().reset_index().sort_values("macro", ascending=False)
    source = {**SOURCE, "settings": {"threshold": 0.5}}
    figures = SuccessorHeads.figures(Result("successor-heads", data, table, source))
    for name, figure in figures.items():
        assert page_size(figure) < 10e6, name
    np.testing.assert_array_equal(figures["ov"].data[1].y, data["macro"].to_numpy().ravel())
    best = int(data["macro"].to_numpy().argmax())
    assert figures["ov"].data[1].customdata[best] == f"L{best // 64}H{best % 64}" == figures["ov"].data[2].text[0]


def test_the_overview_of_a_deep_store(tmp_path):
    layers = {
        f"{kind}.{layer}": np.ones((4, 2)) for kind in ("resid_post", "attn_out", "mlp_out") for layer in range(48)
    }
    figures = planted_store(tmp_path / "deep.acts", [[0, 1, 2, 3]], layers).figures()
    assert figures["sites"].data[0].y == ("resid_post (48)", "attn_out (48)", "mlp_out (48)")
    for trace in figures["norms"].data:
        np.testing.assert_allclose(trace.y, [2**0.5] * 48, rtol=1e-6)
    assert page_size(figures["norms"]) < 10e6


# In a browser

LOOK = """
  while (!document.querySelector("#figure .main-svg")) await new Promise(done => setTimeout(done, 20));
  await new Promise(done => setTimeout(done, 50));
  const plot = document.getElementById("figure");
  return {
    texts: [...document.querySelectorAll("#figure text")].map(text => text.textContent),
    text: document.body.innerText,
    tags: [...new Set([...document.querySelectorAll("*")].map(element => element.localName))],
    links: document.querySelectorAll("a[href^='javascript'], img, b").length,
    scripts: document.scripts.length,
    drawn: document.querySelectorAll("#figure .main-svg").length,
    hacked: window.hacked ?? null,
  };
"""
PICK = """
  await new Promise(done => setTimeout(done, 300));
  const click = element => element.dispatchEvent(new window.MouseEvent("click", {bubbles: true}));
  const plot = document.getElementById("figure");
  const before = plot.data.map(trace => trace.visible);
  click(document.querySelector(".updatemenu-header"));
  await new Promise(done => setTimeout(done, 300));
  click(document.querySelectorAll(".updatemenu-dropdown-button")[1]);
  await new Promise(done => setTimeout(done, 300));
  const small = plot.data.find(trace => trace.meta?.part === "heads");
  const shown = () => plot.data.slice(0, 2).map(trace => trace.visible);
  const pause = () => new Promise(done => setTimeout(done, 200));
  const send = async (kind, head) => {
    plot.emit(kind, {points: [{data: small, x: head * small.meta.width + 1}]});
    await pause();
    return shown();
  };
  const seen = {after: shown(), title: plot.layout.title.text};
  const pointed = [await send("plotly_hover", 0), await send("plotly_unhover", 0), await send("plotly_click", 0),
    await send("plotly_unhover", 0)];
  return {before, pointed, ...seen};
"""


@pytest.fixture(scope="module")
def views(hostile):
    """Every view that shows model text, of a store full of hostile text."""
    results = {
        "lens": LogitLens(top_k=2),
        "sinks": AttentionSinks(length=14, min_visible=2, domain="source", resamples=5),
        "future": FutureLens(epochs=1, horizons=2, top_k=3),
        "erasure": TokenErasure(epochs=1, offsets=(-2, -1, 0), early=0, late=1, resamples=5, spans="word"),
    }
    figures = {f"store-{name}": figure for name, figure in hostile.figures().items()}
    for kind, probe in results.items():
        figures |= {f"{kind}-{name}": figure for name, figure in probe.run(hostile).figures().items()}
    return figures


def test_hostile_text_is_text_in_a_browser(views, tmp_path):

    class Every:
        def figures(self):
            return views

    wb.export(Every(), tmp_path, formats=["html"])
    visits, console = visit([tmp_path / f"{name}.html" for name in views], LOOK)
    # plotly takes the numbers that colour a bar for a colour, once, and says so; it draws them right
    assert [line for line in console if "Invalid color specifier: number" not in line] == []
    for name, page in zip(views, visits, strict=True):
        value = page["value"]
        assert {*page["requests"]} <= {(tmp_path / file).as_uri() for file in ("plotly.min.js", f"{name}.html")}, name
        assert value["drawn"] > 0, name
        assert value["scripts"] == 2, name  # plotly's and the figure's
        assert (value["links"], value["hacked"]) == (0, None), name
        assert not {"iframe", "img", "object", "foreignobject"} & set(value["tags"]), name
        assert "store <b>$x$.acts" in value["text"], name
    texts = dict(zip(views, (" ".join(page["value"]["texts"]) for page in visits), strict=True))
    for name in ("lens-depth", "sinks-attention", "store-tokens", "lens-grid"):
        for token in HOSTILE:
            start = visible(token, 9).rstrip("…")[:8]
            assert start in texts[name], (name, token)
    assert "</script><script>" in texts["sinks-domains"]


PAGES = {
    "export": lambda figure, folder: wb.export(figure, folder, formats=["html"], theme="dark"),
    "to_html": lambda figure, folder: (folder / "pick.html").write_text(figure.to_html(div_id="figure")),
    "write_html": lambda figure, folder: figure.write_html(folder / "pick.html", div_id="figure"),
    "notebook": lambda figure, folder: (folder / "pick.html").write_text(_in_notebook(figure)),
}


def _in_notebook(figure) -> str:
    """The HTML that plotly's notebook renderer saves in a notebook, in a page with plotly's script."""
    html = figure._repr_mimebundle_()["text/html"]
    html = re.sub(r'<script src="https://[^>]*></script>', "", html)  # MathJax
    number = re.search(r'<div id="([^"]+)" class="plotly-graph-div"', html)[1]
    return f"<meta charset=utf-8><script>{get_plotlyjs()}</script>{html.replace(number, 'figure')}"


@pytest.mark.parametrize("written", PAGES)
def test_picking_a_head_shows_it(written, views, tmp_path, monkeypatch):
    monkeypatch.setattr(NotebookRenderer, "activate", lambda renderer: None)  # which shows plotly's script
    monkeypatch.setattr(io.renderers, "default", "notebook")
    (tmp_path / "pick").mkdir()
    PAGES[written](views["sinks-attention"], tmp_path / "pick")
    ((page,), console) = visit([tmp_path / "pick" / "pick.html"], PICK)
    assert console == []
    assert page["value"]["before"] == [True, False, None, None, None]
    assert page["value"]["after"] == [False, True]
    assert page["value"]["pointed"] == [[True, False], [False, True], [True, False], [True, False]]
    assert page["value"]["title"] == views["sinks-attention"].layout.updatemenus[0].buttons[1].args[1]["title.text"]
