"""Captions and alternative texts of figures."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pytest

from workbench.figures.describe import alt_text, caption


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("a0 (1 - a0)", "a0 (1 - a0)."),
        ("k tokens", "k tokens."),
        ("p(x) by layer", "p(x) by layer."),
        ("resid_post 3", "resid_post 3."),
        ("a sink", "A sink."),
        ("top-1 accuracy.", "Top-1 accuracy."),
        ("été 2", "Été 2."),
        ("Does the model repeat the token?", "Does the model repeat the token?"),
        ("and more…", "And more…"),
    ],
)
def test_a_caption_keeps_symbols_and_has_no_second_mark(title, expected):
    assert caption(go.Figure().update_layout(title={"text": title})) == expected


def test_alternative_text_of_colours():
    bar = {"title": {"text": "logits"}}
    heat = go.Figure(go.Heatmap(z=[[0.5, np.nan], [-2, 3]], x=["a", "b"], y=[4, 7], colorbar=bar))
    assert alt_text(heat) == (
        "Heat map. 2 rows: 4 to 7, 2 columns: a to b. 3 values (logits) from -2 at 7, a to 3 at 7, b."
    )
    assert alt_text(go.Figure(go.Heatmap(z=[[1.0, np.nan, 1]], y=["one"]))) == (
        "Heat map. 1 row: one, 3 columns: 0 to 2. 2 values, all 1."
    )
    marker = {"color": [0.1, 0.9], "colorbar": {"title": {"text": "share"}}}
    points = go.Figure(go.Scatter(x=[1, 2], y=[3, 4], mode="markers", marker=marker)).update_xaxes(title="head")
    assert alt_text(points) == "Dot plot of head. 2 values (share) from 0.1 at 3, head 1 to 0.9 at 4, head 2."
