"""Two stores side by side: distances against float64 NumPy, probes against themselves, refusals that name both."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from command_line import refused as refused_by_cli
from command_line import run
from planted import linear_unembed, planted_store
from refusals import refused

import workbench as wb
from workbench.analysis import comparison
from workbench.analysis.comparison import row_distances, side_by_side
from workbench.io.errors import RequestError
from workbench.probes import LogitLens
from workbench.results.result import Result

DOCUMENTS = [[1, 2, 3, 4], [2, 2, 1], [3, 1, 4, 1, 5], [4, 4], [5, 1, 2]]
ROWS, WIDTH = sum(map(len, DOCUMENTS)), 6


def arrays(seed, noise=0.0, layers=2):
    base, extra = np.random.default_rng(0), np.random.default_rng(seed)
    shape = (ROWS, WIDTH)
    return {
        f"resid_post.{i}": (base.normal(size=shape) + noise * extra.normal(size=shape)).astype(np.float32)
        for i in range(layers)
    }


@pytest.fixture
def pair(tmp_path):
    """Two stores of one shape whose activations differ, and their arrays."""
    unembed = linear_unembed(np.random.default_rng(9).normal(size=(7, WIDTH)))
    values = arrays(1), arrays(2, noise=0.5)
    stores = [
        planted_store(tmp_path / name, DOCUMENTS, part, unembed)
        for name, part in zip(("a.acts", "b.acts"), values, strict=True)
    ]
    return *stores, *values


def test_cosine_and_relative_error_are_means_over_rows(pair):
    a, b, x, y = pair
    table = wb.compare(a, b, probes=()).sites.set_index("site")
    assert list(table.index) == ["resid_post.0", "resid_post.1"]
    for name, line in table.iterrows():
        first, second = x[name].astype(np.float64), y[name].astype(np.float64)
        lengths = np.linalg.norm(first, axis=1)
        cosine = (first * second).sum(1) / lengths / np.linalg.norm(second, axis=1)
        error = np.linalg.norm(first - second, axis=1) / lengths
        expected = {"cosine": cosine.mean(), "relative_error": error.mean(), "largest_error": error.max()}
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=1e-12)
        assert (line["rows"], line["skipped"], line["kind"]) == (ROWS, 0, "resid_post")
        for key in ("cosine", "relative_error"):
            assert line[f"{key}_low"] < line[key] < line[f"{key}_high"]
    assert table["layer"].tolist() == [0, 1]


def test_intervals_are_of_documents(pair, tmp_path):
    """A document whose rows are as one moves the mean as a whole: its interval is wider than one over rows would be."""
    _, _, x, _ = pair
    flipped = {name: part * np.repeat([1, 1, -1, 1, 1], list(map(len, DOCUMENTS)))[:, None] for name, part in x.items()}
    stores = [planted_store(tmp_path / n, DOCUMENTS, part) for n, part in (("x.acts", x), ("f.acts", flipped))]
    line = wb.compare(*stores, sites=["resid_post.0"], probes=()).sites.iloc[0]
    lengths = np.array(list(map(len, DOCUMENTS)))
    draws = np.random.default_rng(5).integers(0, 5, (20_000, 5))  # the same bootstrap, written out
    sums = (lengths * np.array([1, 1, -1, 1, 1]))[draws].sum(1) / lengths[draws].sum(1)
    assert line["cosine"] == pytest.approx((ROWS - 2 * 5) / ROWS)
    assert (line["cosine_low"], line["cosine_high"]) == pytest.approx(np.quantile(sums, [0.025, 0.975]), abs=0.08)


def test_a_store_beside_itself_is_no_distance_away(pair):
    a, *_ = pair
    comparison = wb.compare(a, a, probes=("logit-lens",))
    np.testing.assert_allclose(comparison.sites["cosine"], 1, rtol=1e-15)
    assert comparison.sites[["relative_error", "relative_error_high", "largest_error"]].to_numpy().max() == 0
    assert comparison.probes["difference"].abs().max() == 0


def test_dtypes_differ_by_their_rounding(tmp_path):
    model = wb.load_model("demo", device="cpu")
    texts = wb.demo_corpus()[:3]
    stores = [
        wb.record(
            model, texts, out=tmp_path / dtype, dtype=dtype, sites=["resid_post.1"], max_rows=150, show_progress=False
        )
        for dtype in ("float32", "bfloat16", "float16")
    ]
    errors = [wb.compare(stores[0], store, probes=()).sites.iloc[0]["largest_error"] for store in stores]
    assert errors[0] == 0
    assert 2**-12 < errors[1] <= 2**-8  # half a unit in the last place: 8 and 11 bits
    assert 2**-15 < errors[2] <= 2**-11


def test_rows_without_direction_or_number_are_skipped_and_counted():
    a = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [torch.inf, 0.0], [3.0, 4.0]])
    b = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [3.0, 4.0]])
    distances = row_distances(a, b)
    assert np.isnan(distances).all(1).tolist() == [False, True, True, True, False]
    np.testing.assert_allclose(distances[[0, 4]], [[0, 5**0.5], [1, 0]])


def test_stores_with_nonfinite_values_are_refused_or_their_rows_skipped(tmp_path):
    """Of layer 1 everything is infinite in the second store, of layer 0 one row; a value of the first is clipped."""
    x, y = arrays(1), arrays(1)
    x["resid_post.0"][7, 0] = 1e6
    y["resid_post.0"][3, 2], y["resid_post.1"][:] = np.nan, np.inf
    a, b = (
        planted_store(tmp_path / name, DOCUMENTS, part, dtype="float16")
        for name, part in (("a.acts", x), ("b.acts", y))
    )
    text = refused(RequestError, lambda: wb.compare(a, b, probes=()))
    assert text.startswith("resid_post.0 has 1 NaN or infinite values in 1 of the 17 rows")
    assert "has resid_post.1" in text
    sites = wb.compare(a, b, probes=(), allow_nonfinite=True).sites.set_index("site")
    assert sites["skipped"].tolist() == [1, ROWS]
    assert sites["rows"].tolist() == [ROWS - 1, 0]
    assert sites["clipped"].tolist() == [1, 0]
    assert np.isnan(sites["cosine"]["resid_post.1"])


def test_heads_are_one_row():
    a, b = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    np.testing.assert_array_equal(row_distances(a, b), row_distances(a.flatten(1), b.flatten(1)))


def test_blocks_and_groups_of_any_size_give_the_same(pair, monkeypatch):
    a, b, *_ = pair
    whole = wb.compare(a, b, probes=()).sites
    monkeypatch.setattr(comparison, "_BLOCK_BYTES", 8 * WIDTH * 2)
    monkeypatch.setattr(comparison, "_GROUPS", 7)
    pd.testing.assert_frame_equal(wb.compare(a, b, probes=()).sites, whole, rtol=1e-12)


def test_sites_may_be_chosen_by_name_or_kind(pair, tmp_path):
    a, b, *_ = pair
    for sites, known in ((["resid_post"], 2), (["resid_post.1"], 1), (["blocks.1.hook_resid_post"], 1)):
        assert len(wb.compare(a, b, sites=sites, probes=()).sites) == known


# ---- probes ---------------------------------------------------------------------------------------------


def test_probes_stand_side_by_side_with_what_each_says_alone(pair):
    a, b, *_ = pair
    table = wb.compare(a, b, probes=("logit-lens",)).probes
    results = [LogitLens().run(store) for store in (a, b)]
    line = table[(table["measure"] == "mean entropy") & (table["at"] == "layer 0")].iloc[0]
    for side, result in zip("ab", results, strict=True):
        assert line[side] == pytest.approx(float(result.data["mean_entropy"][0]), rel=1e-5)
        assert line[f"{side}_low"] < line[side] < line[f"{side}_high"]
    assert line["difference"] == pytest.approx(line["b"] - line["a"])
    assert line["difference_low"] < line["difference"] < line["difference_high"]
    assert (line["probe"], line["units"]) == ("logit-lens", "nats")


def result_of(variables):
    return Result("made-up", xr.Dataset(variables, coords={"layer": [0, 1]}), pd.DataFrame(), {"model": "m"})


def test_a_probes_own_intervals_are_kept_at_coordinates_both_have():
    def variables(shift):
        return {
            "score": ("layer", np.array([0.1, 0.2]) + shift, {"units": "share"}),
            "score_low": ("layer", np.array([0.0, 0.1]) + shift),
            "score_high": ("layer", np.array([0.3, np.nan]) + shift),
            "alone": ("layer", np.zeros(2)),  # no interval, no row: not compared
        }

    first, second = result_of(variables(0.0)), result_of(variables(0.5))
    second = Result(second.probe, second.data.sel(layer=[1]), second.table, second.provenance)
    (line,) = side_by_side(first, second, np.zeros(0, int))
    assert (line["measure"], line["at"], line["units"]) == ("score", "layer 1", "share")
    values = [line[name] for name in ("a", "a_low", "b", "b_low", "difference")]
    assert values == pytest.approx([0.2, 0.1, 0.7, 0.6, 0.5])


def test_a_paired_difference_is_tighter_than_its_sides():
    """Rows that vary much, and differ by 1 everywhere: the difference is certain."""
    values = np.random.default_rng(0).normal(size=(2, 40))
    coords = {"layer": [0, 1], "row": np.arange(40)}
    first, second = (
        Result("made-up", xr.Dataset({"x": (("layer", "row"), part)}, coords=coords), pd.DataFrame(), {})
        for part in (values, values + 1)
    )
    for line in side_by_side(first, second, np.arange(40) // 4):
        assert line["difference_low"] == pytest.approx(1) == pytest.approx(line["difference_high"])
        assert line["a_high"] - line["a_low"] > 0.1


def test_probes_that_the_sites_do_not_permit_are_named(pair):
    a, b, *_ = pair
    comparison = wb.compare(a, b, sites=["resid_post.0"], probes=("attention-sinks", "logit-lens"))
    assert list(comparison.not_run) == ["attention-sinks"]
    assert comparison.not_run["attention-sinks"].startswith("a.acts: attn_received.0 is not recorded")
    assert set(comparison.probes["probe"]) == {"logit-lens"}
    assert refused(RequestError, lambda: wb.compare(a, b, probes=("logit-lans",))).startswith(
        "probe 'logit-lans' is not installed; nearest: logit-lens"
    )


# ---- what cannot be compared ----------------------------------------------------------------------------


def test_other_tokens_sites_and_widths_are_refused_naming_both(pair, tmp_path):
    a, b, x, _ = pair
    fewer = planted_store(tmp_path / "fewer.acts", DOCUMENTS[:4], {name: part[:14] for name, part in x.items()})
    documents = [[9, *DOCUMENTS[0][1:]], *DOCUMENTS[1:]]
    tokens = planted_store(tmp_path / "tokens.acts", documents, x)
    joined = planted_store(tmp_path / "joined.acts", [DOCUMENTS[0] + DOCUMENTS[1], *DOCUMENTS[2:]], x)
    deeper = planted_store(tmp_path / "deeper.acts", DOCUMENTS, arrays(1, layers=3))
    wider = planted_store(
        tmp_path / "wider.acts", DOCUMENTS, {name: np.hstack([part, part]) for name, part in x.items()}
    )
    cases = [
        (fewer, "a.acts and fewer.acts hold different tokens: 17 and 14 rows; record both from the same texts"),
        (tokens, "a.acts and tokens.acts hold different tokens: row 0 has token_id 1 and 9; record both"),
        (joined, "a.acts and joined.acts hold different tokens: row 4 has sequence 1 and 0; record both"),
        (
            deeper,
            "a.acts and deeper.acts hold different sites: deeper.acts has 1: resid_post.2, which a.acts lacks; "
            "name the sites to compare in sites=",
        ),
        (wider, "a.acts and wider.acts hold resid_post.0 of different widths: d_model 6 and d_model 12; their rows"),
    ]
    for store, text in cases:
        assert refused(RequestError, lambda store=store: wb.compare(a, store, probes=())).startswith(text)
    assert len(wb.compare(a, deeper, sites=["resid_post.0", "resid_post.1"], probes=()).sites) == 2
    assert refused(RequestError, lambda: wb.compare(a, deeper, sites=["resid_post"], probes=())) == (
        "site 'resid_post': deeper.acts has 1: resid_post.2, which a.acts lacks; name the sites that both have"
    )
    assert refused(RequestError, lambda: wb.compare(a, b, sites=["resid_past.0"], probes=())).startswith(
        f"site 'resid_past.0' is not recorded in {a.path}; nearest: resid_post.0"
    )


# ---- what is written ------------------------------------------------------------------------------------


def test_the_command_prints_and_writes_both_tables(pair, tmp_path):
    a, b, *_ = pair
    out = tmp_path / "compared"
    code, out_text, err = run("compare", a.path, b.path, "--probes", "logit-lens", "tuned-lens", "--out", out)
    assert (code, err) == (0, "")
    assert out_text.splitlines()[0].split()[:3] == ["site", "kind", "layer"]
    assert "logit-lens" in out_text
    comparison = wb.compare(a, b, probes=("logit-lens",))
    pd.testing.assert_frame_equal(pd.read_csv(out / "sites.csv"), comparison.sites)
    title = "Cosine similarity of activations of the same tokens in two stores"
    assert (out / "cosine.html").read_text().count(title) == 1
    assert out_text.endswith(f"tables  {out}\n")
    code, out_text, err = run("compare", a.path, b.path, "--probes")
    assert (code, err, len(out_text.splitlines())) == (0, "", 4)
    assert out_text.splitlines()[3].startswith("models  ")
    again = refused_by_cli("compare", a.path, b.path, "--probes", "--out", out).splitlines()
    assert again == [f"--out {str(out)!r} exists and is not empty; choose another folder"]


def test_a_wrong_path_is_told_in_one_line(pair, tmp_path):
    assert refused_by_cli("compare", pair[0].path, tmp_path / "no.acts").startswith("no store at ")


def test_the_figure_has_a_line_for_each_kind(pair):
    a, b, *_ = pair
    figure = wb.compare(a, b, probes=()).figure()
    assert [trace.name for trace in figure.data] == ["resid_post"]
    assert figure.data[0].x.tolist() == [0, 1]
