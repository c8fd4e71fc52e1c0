"""Conventions of all figures and headlines of probes: grey controls, scales by the data, ticks, counts, signs of 0."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import workbench
from workbench.analysis.erasure_figures import vocabulary_bars
from workbench.demo.run import _label_bars
from workbench.figures.colour_limits import colour_limits
from workbench.figures.log_axis import log_axis
from workbench.figures.theme import CATEGORIES, NEUTRAL
from workbench.io.counted import counted
from workbench.probes import fiber_bundle
from workbench.probes.fiber_bundle import FiberBundle
from workbench.probes.named_heads import HeadAblation
from workbench.probes.vocabulary_keys import VocabularyKeys
from workbench.results.result import Result

PROBES = Path(fiber_bundle.__file__).parent
SOURCES = [*sorted(PROBES.glob("*.py")), *sorted((Path(workbench.__file__).parent / "analysis").glob("*.py"))]


def result_of(probe: str, data: xr.Dataset, table: pd.DataFrame | None = None, **settings: object) -> Result:
    provenance = {"model": "tiny", "settings": settings}
    return Result(probe, data, pd.DataFrame() if table is None else table, provenance)


def test_counts_agree_with_their_nouns():
    assert [counted(number, "document") for number in (0, 1, 2, 1234)] == [
        "0 documents",
        "1 document",
        "2 documents",
        "1,234 documents",
    ]
    assert [counted(number, "query") for number in (1, 2)] == ["1 query", "2 queries"]
    assert counted(np.int64(1), "held-out token") == "1 held-out token"
    assert counted(xr.DataArray(3), "day") == "3 days"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_numbers_in_texts_have_no_negative_zero(path):
    """`-0.00` is a rounded value just below 0: every number of fixed digits in an f-string has the option z."""
    formats = [
        "".join(part.value for part in node.format_spec.values if isinstance(part, ast.Constant))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FormattedValue) and isinstance(node.format_spec, ast.JoinedStr)
    ]
    assert [form for form in formats if re.fullmatch(r"[+ -]?,?\.\d+f", form)] == []


def test_colours_end_at_the_largest_value():
    values = np.array([[0.1, np.nan], [0.53, -0.7]])
    assert colour_limits(values) == (0, 0.53)
    assert colour_limits(values, np.array([0.6])) == (0, 0.6)
    assert colour_limits(values, signed=True) == (-0.7, 0.7)
    for nothing in (np.zeros(2), np.full(2, np.nan), np.array([np.inf]), np.zeros(0)):
        assert colour_limits(nothing) == (0, 1)
    assert colour_limits(np.zeros(2), signed=True) == (-1, 1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1e-4, 10.0], {"dtick": 1, "exponentformat": "power"}),
        ([5.0, 60.0], {"dtick": "D2", "tickformat": "~r"}),
        ([10.0, 40.0], {"dtick": "D1", "tickformat": "~r"}),
        ([1e-5, 1e-3], {"dtick": "D2", "tickformat": ".0e"}),
        ([np.nan, 0.0, -1.0], {"dtick": "D2", "tickformat": "~r"}),
    ],
)
def test_ticks_of_logarithmic_axes_have_whole_values(values, expected):
    assert log_axis(np.array(values)) == {"type": "log", **expected}


def test_every_logarithmic_axis_of_a_probe_has_such_ticks():
    """Of plotly's own ticks, those between powers of 10 are single digits: "2" for 20."""
    for path in SOURCES:
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not re.search(r'type="log"', line) or "dtick" in line, (path.name, line)


def test_clouds_have_one_colour_and_their_controls_are_grey():
    draw, axes = np.random.default_rng(0), ("cloud", "token")
    names = ("small", "large", "dimension", "p")
    data = xr.Dataset(
        {name: (axes, draw.uniform(1, 9, (4, 20))) for name in names} | {"points": 100, "neighbours": 9},
        {"cloud": list(fiber_bundle.CLOUDS), "token": range(20), "text": ("token", [f"t{n}" for n in range(20)])},
    )
    colours: dict[str, set[str]] = {}
    for figure in FiberBundle.figures(result_of("fiber-bundle", data)).values():
        for trace in figure.data:
            style = trace.marker if trace.mode == "markers" else trace.line
            colours.setdefault(str(trace.name).rpartition(" (")[0], set()).add(style.color)
    assert colours["embedding"] == {CATEGORIES[0]}
    assert colours["unit rows"] == {CATEGORIES[1]}
    assert colours["gaussian"] == colours["unit gaussian"] == {NEUTRAL}


def test_random_heads_are_grey_and_groups_keep_their_colour():
    names = [
        f"{name}{kind}{end}"
        for name in ("loss", "accuracy")
        for kind in ("", "_random")
        for end in ("", "_low", "_high")
    ]
    data = xr.Dataset(
        {name: (("heads", "group"), np.full((1, 2), 0.1)) for name in names},
        {"heads": ["L1H0"], "group": ["repeats", "other"]},
    )
    for figure in HeadAblation.figures(result_of("head-ablation", data, controls_drawn=1)).values():
        colours = {trace.name: trace.marker.color for trace in figure.data}
        assert colours["repeats, random heads"] == colours["other, random heads"] == NEUTRAL
        assert colours["repeats, named heads"] == CATEGORIES[0]
        assert colours["other, named heads"] == CATEGORIES[1]
        assert "1 draw of" in figure.layout.title.subtitle.text


def test_random_keys_and_permuted_clusters_are_grey_and_dashed():
    ranks = np.arange(2, 21)
    values = {name: ("rank", np.linspace(0, 1, 19)) for name in ("share_main", "share_permuted", "cosine")}
    data = xr.Dataset(values | {"cosine_random": 0.1, "rows": 5, "clusters": 2}, {"rank": ranks})
    for figure in VocabularyKeys.figures(result_of("vocabulary-keys", data, seeds=1)).values():
        curve, control = figure.data
        assert curve.line.color == CATEGORIES[0]
        assert (control.line.color, control.line.dash) == (NEUTRAL, "dash")


def test_spans_are_named_in_prose():
    table = pd.DataFrame({"text": ["a b"], "tokens": [2], "psi": [0.5], "is_span": [True]})
    data = xr.Dataset(attrs={"spans": "labelled spans of 'word'"})
    subtitle = vocabulary_bars(result_of("token-erasure", data, table)).layout.title.subtitle.text
    assert "labelled spans of" in subtitle
    assert "·" not in subtitle
    assert "1 of 1 span of several tokens" in subtitle


def test_scores_of_labels_are_drawn_over_their_range():
    scores = {"f1": [0.97, 0.99], "precision": [0.96, 1.0], "recall": [0.98, 0.98]}
    figure = _label_bars(pd.DataFrame({"label": ["a", "b"], "feature": [1, 2], **scores}))
    low, high = figure.layout.xaxis.range
    assert 0.95 < low < 0.96
    assert 1 < high < 1.01
