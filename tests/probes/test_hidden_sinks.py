"""Hidden sinks: the planted prompt of the paper's rule, both thresholds, late columns, tokens that are found."""

from __future__ import annotations

import numpy as np
import pytest
from planted import planted_store
from refusals import refused
from scipy.stats import binom, norm, t
from sink_example import plant, rows_of, sink_head, uniform

from workbench.figures.describe import figure_data
from workbench.io.errors import RequestError
from workbench.probes import HiddenSinks
from workbench.testing import ProbeContract

N = 16


def run(store, **settings):
    return HiddenSinks(**{"length": N, "resamples": 20, **settings}).run(store)


def prompt():
    """Ten tokens: rows 0 to 3 pay all to key 0; later ones .3 to key 0, .5 to key 4, the rest evenly."""
    pattern = np.zeros((10, 10))
    pattern[:4, 0] = 1
    for i in range(4, 10):
        keys = [k for k in range(i + 1) if k not in (0, 4)]
        pattern[i, 0], pattern[i, 4] = 0.3, 0.5
        pattern[i, keys] = 0.2 / len(keys)
    return pattern


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    heads = [sink_head(N, 0.9), sink_head(N, 0.8, 3), uniform(N), np.eye(N)]
    sites = {"pattern.0": rows_of(heads, heads, heads)}
    return plant(tmp_path_factory.mktemp("hidden") / "s", [N] * 3, sites, documents=[0, 1, 2])


class TestContract(ProbeContract):
    probe = HiddenSinks
    settings = {"length": N, "resamples": 20}  # noqa: RUF012

    @pytest.fixture
    def store(self, planted):
        return planted


# ---- planted heads --------------------------------------------------------------------------------------


def test_the_papers_prompt_has_one_by_the_codes_threshold_and_none_by_the_papers(tmp_path):
    store = plant(tmp_path / "s", [10], {"pattern.0": rows_of([prompt()])})
    settings = {"length": 10, "min_visible": 6}
    data = run(store, threshold="0.1", **settings).data
    assert (data["share"].item(), data["share_fixed"].item(), data["share_relative"].item()) == (1, 1, 0)
    assert data["position_share"].to_numpy().tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert data["mass"].item() == pytest.approx(0.5)
    assert run(store, **settings).data["share"].item() == 0  # alpha of key 4 is 0.5 = 5/N, and not above it
    assert run(store, threshold="4.9/N", **settings).data["share"].item() == 1
    assert run(store, threshold="0.1", length=10, min_visible=7).data["share"].item() == 0


def test_only_the_head_with_a_later_sink_has_one(planted):
    data = run(planted).data.isel(layer=0)
    assert data["share"].to_numpy().tolist() == [0, 1, 0, 0]
    assert data["heads_share"].item() == 0.25
    assert data["position_share"].to_numpy()[3] == 0.25
    assert data["share_late"].to_numpy().tolist() == [0, 0, 0, 1]  # the diagonal: its last keys have few queries
    assert run(planted, min_visible=1).data["share"].to_numpy().tolist() == [[0, 1, 0, 1]]
    assert "1 of 4 heads with 5/N" in run(planted).headline()


def test_a_threshold_that_a_uniform_head_exceeds_is_noted(tmp_path):
    long = 300
    store = plant(tmp_path / "s", [long], {"pattern.0": rows_of([uniform(long)])})
    result = run(store, length=long)
    alpha = [np.mean([1 / (i + 1) for i in range(k, long)]) for k in range(long)]
    expected = sum(alpha[k] > 5 / long for k in range(1, long - 7))
    assert expected > 0
    assert int(result.data["uniform_positions"]) == expected
    assert result.data["share"].item() == 1
    assert f"a head that attends uniformly has {expected} hidden sinks" in result.headline()
    assert run(store, length=long, threshold="0.1").data["uniform_positions"].item() == 0


def test_the_tokens_at_hidden_sinks_are_counted(tmp_path):
    """Token 5 stands at position 3 of both sequences, and once elsewhere."""
    ids = np.random.default_rng(0).integers(10, 30, (2, N))
    ids[:, 3], ids[0, 6] = 5, 5
    sites = {"pattern.0": rows_of([sink_head(N, 0.8, 3), uniform(N)], [sink_head(N, 0.8, 3), uniform(N)])}
    result = run(planted_store(tmp_path / "s", ids.tolist(), sites))
    first = result.table.iloc[0]
    assert (first["token"], first["token_id"], first["occurrences"], first["detections"]) == ("t5", 5, 3, 2)
    assert first["rate"] == pytest.approx(2 / 6)
    assert first["lift"] == pytest.approx((2 / 3) / (2 / 16))
    assert int(result.data["token"][0]) == 5
    assert float(result.data["class_share"].sum()) == pytest.approx(1)
    assert '"t5"' in result.headline()


# ---- intervals ------------------------------------------------------------------------------------------


def test_intervals_are_those_of_drawn_documents(tmp_path):
    """A document has the sink or not: its share of drawn documents is binomial, and the level Student's."""
    number, having = 20, 8
    heads = [[sink_head(N, 0.8, 3)] if document < having else [uniform(N)] for document in range(number)]
    ids = [[5 if at in (3, 4) else 10 + at for at in range(N)] for _ in range(number)]
    path = tmp_path / "s"
    store = planted_store(path, ids, {"pattern.0": rows_of(*heads)})
    result = run(store, resamples=4000)
    data = result.data
    tail = norm.cdf(-np.sqrt(number / (number - 1)) * t.ppf(0.975, number - 1))
    low, high = binom.ppf([tail, 1 - tail], number, having / number) / number
    for name in ("heads_share", "position_share", "token_rate"):
        scale, at = 1.0, {}
        if name == "position_share":
            at = {"position": 3}
        if name == "token_rate":
            at, scale = {"token": 0}, 0.5  # the token stands at two positions, the sink on one of them
        ends = [float(data[f"{name}{end}"].isel(at)) for end in ("", "_low", "_high")]
        assert ends[0] == pytest.approx(scale * having / number)
        assert ends[1:] == pytest.approx([scale * low, scale * high], abs=scale / number + 1e-9)
    assert data["position_share_high"].to_numpy()[5] == 0
    figures = result.figures()
    drawn = figure_data(figures["positions"]).set_index("x").loc[3]
    assert (drawn["low"], drawn["high"]) == pytest.approx(100 * ends_of(data, "position_share", 3))
    drawn = figure_data(figures["tokens"]).iloc[0]
    assert (drawn["low"], drawn["high"]) == pytest.approx(100 * ends_of(data, "token_rate", 0))
    assert ", 95 % CI [" in figures["heads"].layout.title.text


def ends_of(data, name, at):
    return np.array([data[f"{name}_{end}"].to_numpy()[at] for end in ("low", "high")])


def test_a_single_document_has_no_interval_and_its_figures_no_bars(tmp_path):
    store = plant(tmp_path / "s", [N] * 2, {"pattern.0": rows_of(*[[sink_head(N, 0.8, 3)]] * 2)}, documents=[0, 0])
    result = run(store)
    assert result.data[["heads_share_low", "position_share_low", "token_rate_low"]].isnull().all().to_array().all()
    assert all("low" not in figure_data(figure) for figure in result.figures().values())


# ---- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", ["5N", "0", "1.5", "20/N", "", "-1", "x"])
def test_thresholds_that_are_none_are_refused(threshold):
    text = refused(RequestError, lambda: HiddenSinks(threshold=threshold, length=N))
    assert text == f"threshold must be a number between 0 and 1, or one such as 5/N, not {threshold!r}"
