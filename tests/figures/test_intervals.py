"""Intervals of figures: they are drawn, exported with the data, and read out."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from workbench.figures.describe import alt_text, figure_data
from workbench.figures.error_bars import error_bars
from workbench.figures.group_intervals import group_intervals
from workbench.figures.labelled_points import category_points
from workbench.figures.layer_bands import Band, layer_bands
from workbench.figures.layer_panels import Curve, Panel, layer_panels
from workbench.figures.position_bars import position_bars

MEAN, LOW, HIGH = np.array([1.0, 2.0, 4.0]), np.array([0.5, 2.0, 3.0]), np.array([1.5, 3.0, 4.5])


def test_error_bars_end_where_the_interval_ends():
    for axis in ("x", "y"):
        across = "y" if axis == "x" else "x"
        figure = go.Figure(go.Bar({axis: MEAN, across: [0, 1, 2], f"error_{axis}": error_bars(MEAN, LOW, HIGH)}))
        table = figure_data(figure)
        np.testing.assert_allclose(table[["low", "high"]], np.stack([LOW, HIGH], 1))


def test_a_band_is_exported_with_its_line_and_drawn_once():
    bands = [Band("one", MEAN, (LOW, HIGH), "#0072b2"), Band("level", 2.0, (1.0, 3.0), "#d55e00", "dash")]
    figure = layer_bands([*bands, Band("bare", 0.0, None, "#000000")], layers=[3, 4, 6], title="", subtitle="", unit="")
    table = figure_data(figure).set_index("series")
    np.testing.assert_allclose(table.loc["one", ["low", "high"]], np.stack([LOW, HIGH], 1))
    assert table.loc["level", "low"].tolist() == [1, 1, 1]
    assert table.loc["bare", "low"].isna().all()
    assert len(table) == 9  # without the corners of the bands
    assert all(trace.error_y.visible is False for trace in figure.data if trace.error_y.array is not None)
    assert "one from 1 [0.5, 1.5] at 3 to 4 [3, 4.5] at 6; level from 2 [1, 3] at 3" in alt_text(figure)


def test_bands_of_panels_stand_in_their_own_panel():
    none = (np.full(3, np.nan), np.full(3, np.nan))
    panels = [
        Panel("a", [Curve("one", MEAN, "#0072b2")]),
        Panel("b", [Curve("one", MEAN, "#0072b2", ends=(LOW, HIGH))]),
    ]
    panels.append(Panel("c", [Curve("one", MEAN, "#0072b2", ends=none)]))
    figure = layer_panels([panels], layers=[0, 1, 2], title="", subtitle="", unit="")
    table = figure_data(figure).set_index("panel")
    np.testing.assert_allclose(table.loc["b", ["low", "high"]], np.stack([LOW, HIGH], 1))
    assert table.loc[["a", "c"], "low"].isna().all()
    assert [trace.xaxis for trace in figure.data if trace.fill == "toself"] == ["x2"]


def test_points_of_a_group_have_the_intervals_that_it_has():
    ends = {"two": (LOW, HIGH)}
    figure = category_points({"one": MEAN, "two": MEAN}, ["a", "b", "c"], title="", subtitle="", unit="", ends=ends)
    table = figure_data(figure).set_index("series")
    np.testing.assert_allclose(table.loc["two", ["low", "high"]], np.stack([LOW, HIGH], 1))
    assert table.loc["one", "low"].isna().all()


def test_points_are_a_dot_plot_and_name_their_intervals():
    figure = group_intervals(
        {"sink": np.stack([MEAN, LOW, HIGH])}, categories=["a", "b", "c"], hover="", title="", subtitle=""
    )
    assert alt_text(figure) == "Dot plot. sink from 1 [0.5, 1.5] at a to 4 [3, 4.5] at c."


def test_only_positions_with_an_interval_have_an_error_bar():
    bars = {"reliable": np.array([True, True, False]), "names": ("a", "b"), "title": "", "subtitle": "", "unit": "%"}
    table = figure_data(position_bars(MEAN, ends={0: (0.5, 1.5)}, **bars))
    np.testing.assert_allclose(table["low"], [0.5, np.nan, np.nan])
    assert "low" not in figure_data(position_bars(MEAN, **bars))
