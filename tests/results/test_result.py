"""Tests of results: a saved result is read unchanged, other files are not overwritten, damage is named."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from plotly.offline import get_plotlyjs

import workbench as wb
from workbench.io.errors import DataError, RequestError
from workbench.io.files import remove
from workbench.model.load import Model
from workbench.probes import AttentionSinks, LogitLens
from workbench.results.result import SCRIPT, Result, load_result, provenance, refuse_other

FILES = ("data.nc", "result.json", "table.parquet")


@pytest.fixture(scope="module")
def store(tiny_models, tiny_tokenizer, tmp_path_factory):
    model = Model(tiny_models["llama"], tiny_tokenizer, "tiny <b>&</b>")
    texts = ["Once upon a time <script> $x$", "the little day"]
    return wb.record(model, texts, out=tmp_path_factory.mktemp("result") / "t.acts", show_progress=False)


@pytest.fixture(scope="module")
def result(store):
    return LogitLens(top_k=2).run(store)


@pytest.fixture
def saved(result, tmp_path):
    return result.save(tmp_path / "lens")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(kind, call) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


# Round trip


def test_what_is_read_is_what_was_saved(result, saved):
    again = load_result(saved)
    assert again.probe == "logit-lens"
    xr.testing.assert_identical(again.data, result.data)  # axes, coordinates, values, units
    pd.testing.assert_frame_equal(again.table, result.table)
    assert again.provenance == result.provenance
    assert repr(again) == repr(result)
    for name, figure in result.figures().items():
        assert again.figure(name).to_json() == figure.to_json()


def test_the_folder_holds_open_formats(result, saved):
    assert sorted(contents(saved)) == [
        "data.nc",
        "figures/by_layer.html",
        "figures/depth.html",
        "figures/grid.html",
        "figures/plotly.min.js",
        "result.json",
        "table.parquet",
    ]
    assert pd.read_parquet(saved / "table.parquet")["entropy"].tolist() == result.table["entropy"].tolist()
    with xr.open_dataset(saved / "data.nc", engine="scipy") as data:
        assert data["entropy"].attrs["units"] == "nats"
    record = json.loads((saved / "result.json").read_text())
    assert (record["format"], record["version"], record["probe"]) == ("workbench.result", 2, "logit-lens")


def test_provenance_says_what_made_it(result, store):
    assert dict(result.provenance) == {
        "model": "tiny <b>&</b>",
        "model_fingerprint": store.manifest.model.fingerprint,
        "store": "t.acts",
        "store_fingerprint": store.manifest.fingerprint,
        "rows": store.rows,
        "texts": "2 documents, 2 sequences of at most 256 tokens",
        "sites": "resid_post",
        "settings": {
            "site": "resid_post",
            "where": None,
            "top_k": 2,
            "detail": 10_000,
            "allow_nonfinite": False,
            "layers": None,
            "device": "cpu",
        },
        "probe_class": "workbench.probes.logit_lens:LogitLens",
        "workbench": "0.1.0",
    }
    chosen = dataclasses.replace(store.manifest, recording={"context": 64, "keep": [0]})
    described = provenance(Mock(manifest=chosen, rows=1, sites=store.sites, path=store.path), LogitLens())
    assert described["texts"] == "2 documents, 2 sequences of at most 64 tokens; rows chosen by keep=[0]"
    assert provenance(store, LogitLens(top_k=3))["settings"]["top_k"] == 3


def test_repr(result, store):
    assert repr(result) == (
        f"Result('logit-lens' of tiny <b>&</b>, layer 3, row {store.rows}, top 2; {3 * store.rows} table rows)"
    )


def test_the_same_result_is_the_same_bytes(result, saved, store, tmp_path):
    first = contents(saved)
    assert contents(LogitLens(top_k=2).run(store).save(tmp_path / "again")) == first
    assert contents(load_result(saved).save(tmp_path / "loaded")) == first
    assert contents(LogitLens(top_k=1).run(store).save(tmp_path / "other")) != first


def test_a_result_without_rows_in_detail(store, tmp_path):
    result = LogitLens(detail=0).run(store)
    again = load_result(result.save(tmp_path / "lens"))
    xr.testing.assert_identical(again.data, result.data)
    assert list(again.figures()) == ["by_layer"]
    assert again.table.columns.tolist() == result.table.columns.tolist()


# Figures


def test_figures_by_name(result):
    assert list(result.figures()) == ["grid", "by_layer", "depth"]
    assert result.figure().to_json() == result.figure("grid").to_json()
    assert result.figure("by_layer").to_json() != result.figure("grid").to_json()
    assert refusal(RequestError, lambda: result.figure("gird")) == "figure 'gird' is none of grid, by_layer, depth"


def test_saved_figures_ask_nothing_of_the_network(saved):
    for page in saved.glob("figures/*.html"):
        text = page.read_text()
        assert re.findall(r"https?:|//cdn|@import|<link|<iframe|<img", text) == []
        assert re.findall(r'\ssrc="([^"]*)"', text) == ["plotly.min.js"]
    assert (saved / "figures" / "plotly.min.js").stat().st_size > 1e6


def test_results_of_a_folder_share_plotlys_script_and_can_be_moved_alone(result, saved, tmp_path):
    second, third = (result.save(tmp_path / name) for name in ("second", "third"))
    result.save(saved)  # again
    scripts = [folder / SCRIPT for folder in (saved, second, third)]
    assert len({script.stat().st_ino for script in scripts}) == 1
    assert not list(tmp_path.rglob("*.partial"))
    moved = second.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    remove(saved)
    for folder in (moved, third):
        assert load_result(folder).probe == "logit-lens"
        assert (folder / SCRIPT).read_text() == get_plotlyjs()


def test_without_hard_links_every_result_has_the_script(result, tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.results.result.os.link", Mock(side_effect=OSError("no links here")))
    first, second = (result.save(tmp_path / name) for name in ("first", "second"))
    assert (first / SCRIPT).read_bytes() == (second / SCRIPT).read_bytes() == get_plotlyjs().encode()


def test_saved_pictures_of_heads_react_to_the_pointer(tmp_path):
    model = wb.load_model("demo", device="cpu")
    store = wb.record(model, ["Once upon a time"] * 4, sites=["pattern"], out=tmp_path / "x.acts", show_progress=False)
    folder = AttentionSinks(length=4, min_visible=2, resamples=20).run(store).save(tmp_path / "sinks")
    pages = {page.stem: page.read_text() for page in folder.glob("figures/*.html")}
    watched = 'watchHeads(document.getElementById("attention"))'
    assert [name for name, page in pages.items() if watched in page] == ["attention"]


def test_saved_figures_hold_what_the_figure_holds(result, saved):
    text = (saved / "figures" / "grid.html").read_text()
    drawn, _ = json.JSONDecoder().raw_decode(text[re.search(r'Plotly.newPlot\(\s*"grid",\s*', text).end() :])
    assert drawn == json.loads(result.figure("grid").to_json())["data"]


# Where it may be saved


def test_the_same_result_is_replaced(result, saved):
    (saved / "figures" / "old.html").touch()
    (saved / "data.nc").write_bytes(b"damaged")
    assert result.save(str(saved)) == saved
    assert not (saved / "figures" / "old.html").exists()
    xr.testing.assert_identical(load_result(saved).data, result.data)
    assert [path.name for path in saved.parent.iterdir()] == ["lens"]


def test_new_and_empty_folders(result, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert load_result(result.save(tmp_path / "empty")).probe == "logit-lens"
    assert load_result(result.save(tmp_path / "a" / "b" / "c")).probe == "logit-lens"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert result.save(".") == Path(".")
    assert (tmp_path / "here" / "result.json").is_file()


def test_a_link_stays_a_link(result, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for _ in range(2):
        result.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load_result(tmp_path / "target").probe == "logit-lens"


def test_leftovers_of_an_interrupted_save_are_no_obstacle(result, tmp_path):
    """Another process may still write them: they are left alone, and the new result has a name of its own."""
    (tmp_path / ".lens.partial").mkdir()
    (tmp_path / ".lens.partial" / "data.nc").touch()
    load_result(result.save(tmp_path / "lens"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lens.partial", "lens"]


def test_files_of_others_in_the_folder_are_kept(result, saved):
    (saved / "notes.txt").write_text("mine")
    (saved / "figures" / "mine.svg").write_text("mine")
    result.save(saved)
    assert (saved / "notes.txt").read_text() == (saved / "figures" / "mine.svg").read_text() == "mine"
    xr.testing.assert_identical(load_result(saved).data, result.data)


def test_a_result_saved_before_variables_had_a_meaning(result, tmp_path):
    """It has units alone; figures and headline are the same."""
    data = result.data.copy()
    for variable in data.variables.values():
        variable.attrs = {name: value for name, value in variable.attrs.items() if name == "units"}
    again = load_result(dataclasses.replace(result, data=data).save(tmp_path / "old"))
    assert "long_name" not in again.data["entropy"].attrs
    assert again.headline() == result.headline()
    for name, figure in result.figures().items():
        assert again.figure(name).to_json() == figure.to_json()


def test_a_save_that_fails_leaves_the_old_result(result, saved, monkeypatch):
    before = contents(saved)
    monkeypatch.setattr(LogitLens, "figures", staticmethod(lambda _result: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        result.save(saved)
    assert contents(saved) == before


def test_what_is_no_result_is_not_overwritten(result, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        assert refusal(RequestError, lambda path=path: result.save(path)) == (
            f"out {str(path)!r} exists and is not a result; choose another folder"
        )
    (tmp_path / "result.json").write_text(
        '{"format": "somebody else\'s", "version": 1, "probe": "p", "provenance": {}}'
    )
    refusal(RequestError, lambda: result.save(tmp_path))
    for damaged in ("{", "[]", '{"format": "workbench.result"}'):
        (tmp_path / "result.json").write_text(damaged)
        refusal(RequestError, lambda: result.save(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_another_result_is_not_overwritten(result, saved, store, tmp_path):
    before = contents(saved)
    variants = [
        LogitLens(top_k=1).run(store),
        dataclasses.replace(result, provenance={**result.provenance, "model_fingerprint": "0"}),
        dataclasses.replace(result, provenance={**result.provenance, "store_fingerprint": "0"}),
        dataclasses.replace(result, probe="other"),
    ]
    for variant in variants:
        assert refusal(RequestError, lambda variant=variant: variant.save(saved)) == (
            f"out {str(saved)!r} holds another result of logit-lens; choose another folder or remove it"
        )
    assert contents(saved) == before
    refuse_other(saved, result.probe, result.provenance)
    refuse_other(tmp_path / "nothing there", "other", {})


# What is read


def test_no_result_there(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        assert refusal(RequestError, lambda path=path: load_result(path)) == (
            f"result {str(path)!r}: no result.json there; give a folder that `workbench probe --out` wrote"
        )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.95])
def test_a_truncated_file(saved, name, keep):
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(whole[: int(keep * len(whole))])
    text = refusal(DataError, lambda: load_result(saved))
    assert str(saved) in text
    assert name in text
    assert text.endswith("; run the probe again")


@pytest.mark.parametrize("name", ["data.nc", "table.parquet"])
def test_a_missing_file(saved, name):
    (saved / name).unlink()
    assert refusal(DataError, lambda: load_result(saved)).startswith(f"{saved / name} cannot be read: No such file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "format is 'x', expected 'workbench.result'"),
        ({"probe": None}, "result.json lacks one of format, version, probe, provenance"),
        ({"provenance": []}, "result.json lacks one of format, version, probe, provenance"),
    ],
)
def test_a_record_of_something_else(saved, change, message):
    record = json.loads((saved / "result.json").read_text())
    (saved / "result.json").write_text(json.dumps(record | change))
    assert refusal(DataError, lambda: load_result(saved)) == (
        f"result {str(saved)!r} is damaged: {message}; run the probe again"
    )


def test_a_newer_format(saved):
    record = json.loads((saved / "result.json").read_text())
    (saved / "result.json").write_text(json.dumps(record | {"version": 3}))
    assert refusal(RequestError, lambda: load_result(saved)) == (
        f"result {str(saved)!r} has format version 3; upgrade the workbench"
    )


# Probes of others


@dataclasses.dataclass(frozen=True)
class Mean:
    """A probe that somebody else might publish."""

    name = "mean"

    @staticmethod
    def figures(result):
        import plotly.graph_objects as go

        return {"values": go.Figure(go.Scatter(y=result.data["mean"].to_numpy()))}


def test_a_probe_of_somebody_elses(store, tmp_path):
    data = xr.Dataset({"mean": (("d_model",), np.arange(3, dtype=np.float32), {"units": "1"})})
    table = pd.DataFrame({"token": ["é", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), None]})
    result = Result("mean", data, table, provenance(store, Mean()))
    again = load_result(result.save(tmp_path / "mean"))
    xr.testing.assert_identical(again.data, data)
    pd.testing.assert_frame_equal(again.table, table)
    assert (tmp_path / "mean" / "figures" / "values.html").is_file()


def test_a_probe_that_is_not_installed(result):
    unknown = dataclasses.replace(result, probe="logit-len", provenance={**result.provenance, "probe_class": None})
    assert refusal(RequestError, unknown.figures).startswith(
        "probe 'logit-len' is not installed; nearest: logit-lens, "
    )
    renamed = dataclasses.replace(result, probe="logit-len")
    assert "logit_lens:LogitLens is not here (it is not a probe named 'logit-len')" in refusal(
        RequestError, renamed.figures
    )
