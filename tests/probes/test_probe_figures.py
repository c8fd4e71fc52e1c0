"""Every figure of every probe: the numbers of its result, read through `to_dict()`; and print that fits, on the
embedded model."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from functools import reduce
from operator import getitem

import numpy as np
import pytest
import scipy.stats
from browser import draw_for_print, overlapping, print_pdf, text_boxes

import workbench as wb
from workbench.analysis.erasure_figures import implicit_vocabulary
from workbench.embedded import demo_corpus
from workbench.figures.describe import figure_data
from workbench.figures.paper import to_paper
from workbench.probes import (
    AttentionSinks,
    DirectLogitAttribution,
    FutureLens,
    FuturePrompts,
    LogitLens,
    SuccessorHeads,
    TokenErasure,
    TunedLens,
)
from workbench.results.bootstrap import clustered_means

PROBES = (
    LogitLens(),
    TunedLens(epochs=1),
    AttentionSinks(domain="domain", resamples=50, length=48, epsilon=0.2),
    FutureLens(epochs=1, horizons=2),
    FuturePrompts(prompts=('Now: "',), horizons=2, prompt_tokens=2, row_limit=10, training_rows=16, epochs=1),
    TokenErasure(epochs=1, offsets=(-2, -1, 0), late=3, resamples=50),
    SuccessorHeads(permutations=50, row_limit=100),
    DirectLogitAttribution(parts="heads", resamples=50),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    sites = ("embed", "resid_pre.0", "attn_out", "mlp_out", "resid_post", "z", "pattern")
    return wb.record(
        wb.load_model("demo"),
        demo_corpus()[::6],
        sites=sites,
        context=64,
        max_rows=1500,
        out=tmp_path_factory.mktemp("all") / "demo.acts",
        show_progress=False,
    )


@pytest.fixture(scope="module")
def results(store):
    return {probe.name: probe.run(store) for probe in PROBES}


def decoded(value):
    """A part of `to_dict()`, which holds arrays as base64."""
    if isinstance(value, dict) and "bdata" in value:
        flat = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
        return flat.reshape([int(n) for n in str(value["shape"]).split(",")]) if "shape" in value else flat
    return value


def banded(data, name):
    """The band of a curve over layers and the curve, as they are drawn, a single value at each layer; a single document
    has no interval."""
    ends = (data[f"{name}{end}"].to_numpy() for end in ("", "_low", "_high"))
    middle, low, high = (end if end.ndim else np.full(data.sizes["layer"], end) for end in ends)
    if np.isnan(low).all():
        return [{"y": middle}]
    return [{"y": [*high, *low[::-1]]}, {"y": middle, "error_y.array": high - middle}]


def lens(result):
    data, first = result.data, result.table["sequence"].iloc[0]
    rows = np.sort(result.table["row"][result.table["sequence"] == first].unique())
    means = [part for name in ("entropy", "kl", "cross_entropy") for part in banded(data, f"mean_{name}")]
    settled = np.append(data["layer"].astype(float), np.nan)[data["prediction_depth"].sel(row=rows)]
    grid = data["top_probability"].sel(row=rows[:28], top=1)
    return {"grid": grid, "depth": settled}, means


def logit_lens(result):
    figures, means = lens(result)
    return {**figures, "by_layer": means}


def tuned_lens(result):
    figures, means = lens(result)
    by_layer = [part for name in ("mean_kl", "logit_mean_kl") for part in banded(result.data, name)]
    return {**figures, "by_layer": by_layer, "losses": means}


def attention_sinks(result):
    data = result.data
    norms = [data["residual_norm_sink"], data["residual_norm_others"]]
    best = result.table.nlargest(12, "gap")
    domains = [
        {
            "y": best[f"attention_{name}"],
            "error_y.array": [
                float((data["attention_high"] - data["attention"]).sel(domain=name, layer=layer, head=head))
                for layer, head in zip(best["layer"], best["head"], strict=True)
            ],
        }
        for name in data["domain"].to_numpy()
    ]
    causal = np.tril(np.ones((48, 48), bool))
    attention = [{"z": np.where(causal, pattern, np.nan)} for pattern in data["example_pattern"]]
    attention += [{"z": np.where(causal, np.nan, 1)}, {}, {}]  # masked keys, those of the small pictures, and these
    above = (data["sink_k_high"] - data["sink_k"]).to_numpy()
    norm_bands = [part for kind in ("sink", "others") for part in banded(data, f"residual_norm_{kind}")]
    return {
        "sinks": [{"z": data["alpha"].sel(position=0)}, *({"x": norm} for norm in norms)],
        "positions": [
            {"y": data["sink_k"][part], "error_y.array": above[part]} for part in (slice(41), slice(41, None))
        ],
        "norms": norm_bands,
        "domains": domains,
        "attention": attention,
    }


def wilson_end(share, number) -> float:
    """The upper end by scipy, which takes counts."""
    if not number:
        return np.nan
    level = 2 * scipy.stats.norm.cdf(1.96) - 1
    return scipy.stats.binomtest(round(share * number), int(number)).proportion_ci(level, method="wilson").high


def future_lens(result):
    data, precision, calibration, gain = result.data, [], [{"x": [0, 1], "y": [0, 1]}], []
    for method in data["method"].to_numpy():
        for horizon in data["horizon"].to_numpy():
            precision += banded(data.sel({"method": method, "horizon": horizon, "k": 1}), "precision")
            precision += banded(data.sel(horizon=horizon), "bigram_precision")
            middle, low, high = (
                data[f"gain{end}"].sel({"method": method, "horizon": horizon}).to_numpy()
                for end in ("", "_low", "_high")
            )
            gain.append({"y": [*high, *low[::-1]]})
            gain.append({"y": middle, "error_y.array": high - middle, "error_y.arrayminus": middle - low})
    for at in range(data.sizes["horizon"]):
        best = data.isel(horizon=at, method=int(data["best_method"][at])).sel(layer=int(data["best_layer"][at]))
        share, number = best["calibration"].to_numpy(), best["calibration_rows"].to_numpy()
        ends = [wilson_end(*proportion) for proportion in zip(share, number, strict=True)]
        calibration.append({"y": share, "error_y.array": ends - share})
    rows = np.flatnonzero(data["sequence"] == data["sequence"][0])[:28]
    view = np.where(data["top_id"] < 0, np.nan, data["top_probability"])[:, rows]
    return {"precision": precision, "gain": gain, "calibration": calibration, "view": view}


def future_prompts(result):
    data, precision, ranks = result.data, [], []
    for regime in data["regime"].to_numpy():
        for horizon in data["horizon"].to_numpy():
            part = data.sel(regime=regime, horizon=horizon)
            for prompt in data["prompt"].to_numpy():
                precision += banded(part.sel(prompt=prompt, k=1), "precision")
                precision.append({"y": part["zero_precision"].sel(prompt=prompt)})
            precision += banded(part, "bigram_precision")
            best = part.isel(prompt=int(part["best_prompt"])).sel(layer=int(part["best_layer"]))
            ranks.append({"y": best["precision"], "error_y.array": best["precision_high"] - best["precision"]})
    return {"precision": precision, "ranks": ranks}


def token_erasure(result):
    data, table = result.data, result.table
    curves = [
        {"x": data["layer"], "y": data["accuracy"].sel(offset=offset, group=group)}
        for offset in (-2, -1, 0)
        for group in ("last", "control")
    ]
    best = implicit_vocabulary(table).head(40)
    first = table[table["sequence"] == table["sequence"].iloc[0]].head(40)
    return {
        "accuracy": curves,
        "vocabulary": [{"x": best["psi"][best["is_span"]]}, {"x": best["psi"][~best["is_span"]]}],
        "segments": [{"x": first["tokens"], "marker.color": first["psi"]}],
    }


def successor_heads(result):
    data = result.data
    order = result.table.head(3)
    heads = [data["score"].sel(layer=line.layer, head=line.head) for line in order.itertuples()]
    best = order.iloc[0]
    null = data["null_score"].sel(layer=best["layer"], head=best["head"])
    levels = [null, data["chance"], data["first_mlp_score"]]
    copying, macro = data["copying"].to_numpy().ravel(), data["macro"].to_numpy().ravel()
    return {
        "scores": [{"z": data["macro"]}],
        "tasks": [{"y": part} for part in [*heads, *levels]],
        "circuit": [{"z": data["circuit"]}],
        "ov": [
            {"x": copying, "y": data["null_macro"].to_numpy().ravel()},
            {"x": copying, "y": macro},
            {"x": [copying[macro.argmax()]], "y": [macro.max()]},
        ],
    }


@pytest.mark.parametrize(
    "expected",
    [logit_lens, tuned_lens, attention_sinks, future_lens, future_prompts, token_erasure, successor_heads],
    ids=lambda function: function.__name__.replace("_", "-"),
)
def test_figures_hold_what_their_result_holds(results, expected):
    result = results[expected.__name__.replace("_", "-")]
    figures, expected_traces = result.figures(), expected(result)
    assert figures.keys() == expected_traces.keys()
    for name, traces in expected_traces.items():
        if not isinstance(traces, list):  # cells of tokens, in the order of the table
            cell_values = figure_data(figures[name])["value"].to_numpy()
            traces = np.asarray(traces, float).ravel()
            keep = slice(None) if len(cell_values) == len(traces) else ~np.isnan(cell_values)
            traces = traces if len(cell_values) == len(traces) else traces[~np.isnan(traces)]
            np.testing.assert_allclose(cell_values[keep], traces, rtol=1e-6, err_msg=name)
            continue
        drawn = figures[name].to_dict()["data"]
        assert len(drawn) == len(traces), name
        for trace, parts in zip(drawn, traces, strict=True):
            for path, values in parts.items():
                numbers = np.asarray(decoded(reduce(getitem, path.split("."), trace)), float)
                np.testing.assert_allclose(numbers, np.asarray(values, float), rtol=1e-6, err_msg=f"{name} {path}")


def test_means_of_a_lens_have_intervals_over_documents(results, store):
    """Those of the rows that the result keeps, which are all rows here, by resampling documents row by row."""
    data = results["logit-lens"].data
    document = store.tokens["document"].to_numpy()[data["row"].to_numpy()]
    for name in ("entropy", "kl", "cross_entropy"):
        for layer in data["layer"].to_numpy():
            at = data.sel(layer=layer)
            _, drawn = clustered_means(at[name].to_numpy().astype(float)[:, None], document)
            number = len(np.unique(document))
            tail = scipy.stats.norm.cdf(-np.sqrt(number / (number - 1)) * scipy.stats.t.ppf(0.975, number - 1))
            expected = np.nanquantile(drawn, [tail, 1 - tail])  # expanded for few documents, Hesterberg 2015
            ends = [float(at[f"mean_{name}_{end}"]) for end in ("low", "high")]
            np.testing.assert_allclose(ends, expected, rtol=1e-5)


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_results_of_earlier_versions_draw_without_intervals(results, probe):
    """Earlier results lack the intervals that were added since: none is drawn, and the values are the same."""
    result = results[probe.name]
    added = ("mean_", "logit_mean_", "precision", "bigram_precision", "sink_k", "residual_norm")
    names = [name for name in map(str, result.data) if name.endswith(("_low", "_high")) and name.startswith(added)]
    earlier = replace(result, data=result.data.drop_vars(names))
    for name, figure in earlier.figures().items():
        if names and name in ("by_layer", "losses", "norms", "precision", "ranks"):
            curves = [trace for trace in result.figures()[name].data if not trace.meta]
            assert len(figure.data) == len(curves), name  # the same without bands
            for trace, curve in zip(figure.data, curves, strict=True):
                assert trace.error_y.array is None, name
                np.testing.assert_array_equal(trace.y, curve.y)


def test_every_figure_of_every_probe_fits_a_column_of_print(results, tmp_path):
    """No text is cut or lies on another, and every font of a PDF of them all is in it."""
    figures = {
        f"{probe}-{name}": figure for probe, result in results.items() for name, figure in result.figures().items()
    }
    drawings = draw_for_print([to_paper(figure)[0] for figure in figures.values()], tmp_path)
    for name, texts in zip(figures, text_boxes(drawings, tmp_path), strict=True):
        assert len(texts) > 5
        assert [text for text in texts if min(text[1:5]) < -0.5] == [], name
        assert overlapping(texts) == [], name
    pdf = print_pdf(tmp_path / "drawings.html")
    fonts = re.findall(rb"/FontName /([\w+-]+)", pdf)
    assert len(re.findall(rb"/FontFile", pdf)) == len(fonts) > 0
