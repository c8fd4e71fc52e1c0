"""The atlas of heads: numbers of the probes, reasons for missing ones, inert text, sorting by the keyboard."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from browser import chromium
from html_example import Markup
from refusals import refused
from sink_example import plant, previous, rows_of, sink_head, uniform

import workbench as wb
from workbench.analysis.head_measures import MEASURES
from workbench.cli.main import main
from workbench.io.errors import RequestError
from workbench.probes import ActiveDormant, DirectLogitAttribution, HiddenSinks, InductionHeads, SuccessorHeads

N = 24
HOSTILE = "<img src=x onerror=alert(1)></script><b>$x$</b>"


@pytest.fixture(scope="module")
def demo_store(tmp_path_factory):
    sites = ["embed", "pattern", "v", "z", "attn_out", "resid_pre.0", "resid_post"]
    options = {"max_rows": 400, "context": 32, "show_progress": False}
    return wb.record("demo", wb.demo_corpus()[:20], sites=sites, out=tmp_path_factory.mktemp("atlas") / "s", **options)


@pytest.fixture(scope="module")
def atlas(demo_store):
    return wb.head_atlas(demo_store, domain="domain", device="cpu", show_progress=False)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A store of attention alone, of a model that cannot be loaded."""
    heads = [sink_head(N, 0.9), uniform(N), previous(N)]
    store = plant(
        tmp_path_factory.mktemp("atlas") / "p", [N] * 2, {"attn_received.0": _received(heads)}, documents=[0, 1]
    )
    return wb.head_atlas(store, model=None, show_progress=False)


def _received(heads):
    pattern = rows_of(heads)  # [query, head, key]
    alpha = pattern.sum(0).T / np.arange(N, 0, -1)[:, None]
    return np.concatenate([alpha, alpha])


# ---- numbers --------------------------------------------------------------------------------------------


def test_a_column_holds_what_its_probe_measures(demo_store, atlas):
    table = atlas.table
    assert len(table) == 32
    assert table["name"].tolist()[:9] == [*(f"L0H{head}" for head in range(8)), "L1H0"]
    settings = {"resamples": 5, "device": "cpu"}
    model = wb.load_model("demo", device="cpu")
    sinks = ActiveDormant(length=32, domain="domain", **settings).run(demo_store, model=model)
    induction = InductionHeads(ablated=0, **settings).run(demo_store, model=model)
    expected = {
        name: sinks.data[of] for name, of in (("sink", "sink_attention"), ("drain", "drain"), ("active", "active"))
    }
    expected |= {name: induction.data[name] for name in ("induction", "excess", "previous", "copying")}
    expected["hidden_sink"] = HiddenSinks(length=32, resamples=5).run(demo_store).data["share_fixed"]
    heads = SuccessorHeads(permutations=5, row_limit=20, device="cpu").run(demo_store, model=model)
    expected["successor"] = heads.data["macro"]
    for name, values in expected.items():
        np.testing.assert_allclose(table[name], values.to_numpy().ravel(), atol=1e-9, err_msg=name)
    terms = DirectLogitAttribution(parts="heads", detail=0, resamples=5).run(demo_store, model=model).table
    part = terms.loc[(terms["layer"] == 2) & (terms["index"] == 3) & (terms["kind"] == "head"), "absolute"].item()
    assert table.loc[table["name"] == "L2H3", "dla_share"].item() == pytest.approx(part / terms["absolute"].sum())
    assert not {*atlas.missing} - {"domain_gap"}
    assert {*table.columns} >= {measure.name for measure in MEASURES if measure.name != "domain_gap"}


def test_a_measure_that_cannot_be_computed_has_its_reason(planted):
    table = planted.table
    assert table.columns.tolist() == ["name", "layer", "head", "sink", "active", "hidden_sink"]
    assert table["active"].tolist() == [0, 1, 1]
    missing = planted.missing
    assert "is not the one that the store" in missing["successor"]
    assert "pattern.0 is not recorded" in missing["induction"]
    assert "v.0 is not recorded" in missing["value_overlap"]
    assert missing["domain_gap"] == "no domain was named (domain=, --domain)"
    assert "drain not computed: neither v nor v_norm was recorded" in missing["drain"]
    assert "not measured: " in planted._repr_html_()


def test_a_store_without_anything_about_heads_is_refused(tmp_path):
    store = plant(tmp_path / "s", [N], {"resid_norm.0": np.ones(N)})
    assert "no measure of heads could be computed" in refused(
        RequestError, lambda: wb.head_atlas(store, show_progress=False)
    )


def test_repeats_of_another_model_are_refused(demo_store, tmp_path):
    foreign = plant(tmp_path / "s", [N], {"resid_norm.0": np.ones(N)})
    assert "repeats: " in refused(RequestError, lambda: wb.head_atlas(demo_store, repeats=foreign, show_progress=False))


# ---- figure and page ------------------------------------------------------------------------------------


def test_the_figure_has_a_panel_for_each_measure(atlas):
    figure = atlas.figure()
    assert len(figure.data) == len(atlas.measured.measures)
    sink = atlas.table["sink"].to_numpy().reshape(4, 8)
    np.testing.assert_allclose(np.asarray(figure.data[0].z, float), sink)


def test_text_of_a_model_is_inert(planted, tmp_path):
    measured = replace(planted.measured, model=HOSTILE, missing={"induction": HOSTILE}, headlines={"x": HOSTILE})
    page = Markup(replace(planted, measured=measured).write(tmp_path / "atlas.html").read_text())
    assert not {"img", "b"} & {tag for tag, _ in page.elements}
    assert page.text.count(HOSTILE) >= 3
    policy = next(attributes for tag, attributes in page.elements if tag == "meta" and "http-equiv" in attributes)
    assert "default-src 'none'" in str(policy["content"])
    assert "<img" not in replace(planted, measured=measured)._repr_html_()


def test_the_keyboard_sorts_the_table(planted, tmp_path):
    path = planted.write(tmp_path / "atlas.html")
    with chromium() as page:
        page.open(path.as_uri())
        names = "[...document.querySelectorAll('.atlas tbody th')].map(one => one.textContent)"
        assert page.run(names) == ["L0H0", "L0H1", "L0H2"]
        page.run("document.querySelectorAll('.atlas thead button')[2].focus()")  # active
        page.key("Enter", 13, text="\r")
        assert page.run(names) == ["L0H1", "L0H2", "L0H0"]
        assert page.run("document.querySelectorAll('.atlas thead th')[2].ariaSort") == "descending"
        assert page.run("document.getElementById('order').textContent") == "Sorted by active, descending."
        page.key("Enter", 13, text="\r")
        assert page.run(names) == ["L0H0", "L0H1", "L0H2"]
        assert page.complaints == []
        assert page.requests == [path.as_uri()]


def test_a_printed_atlas_has_whole_names_and_every_column(atlas, tmp_path):
    path = atlas.write(tmp_path / "atlas.html")
    printed = "[...document.querySelectorAll('.atlas:not([hidden])')]"
    with chromium() as page:
        page.size(680, 900)
        page.open(path.as_uri())
        page.ask("Emulation.setEmulatedMedia", media="print")
        page.run(
            "document.querySelectorAll('.atlas thead button').forEach((part) => { part.textContent += 'x'.repeat(9) })"
        )
        page.run("dispatchEvent(new Event('beforeprint'))")
        assert page.run(f"{printed}.length") > 1
        headings = f"{printed}.flatMap((part) => [...part.tHead.rows[0].cells].slice(1))"
        assert page.run(f"{headings}.length") == len(atlas.measured.measures)
        assert page.run(f"Math.max(...{headings}.map((part) => part.getBoundingClientRect().right))") <= 680
        heights = page.run(f"{printed}.flatMap((part) => [...part.tBodies[0].rows].map((row) => row.offsetHeight))")
        assert max(heights) < 25  # one line


def test_the_command_line_writes_page_and_table(demo_store, tmp_path, capsys):
    out, table = tmp_path / "atlas.html", tmp_path / "heads.csv"
    with pytest.raises(SystemExit) as ended:
        main(["atlas", str(demo_store.path), "--out", str(out), "--table", str(table), "--device", "cpu"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "not measured  domain_gap: no domain was named (domain=, --domain)" in printed
    assert f"atlas  {out}" in printed
    assert pd.read_csv(table)["name"].tolist()[-1] == "L3H7"
    assert Markup(out.read_text()).text.count("L3H7") >= 1
