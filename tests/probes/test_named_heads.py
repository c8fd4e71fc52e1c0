"""Head ablation: a planted circuit whose heads are known, groups of tokens, and heads that a saved result ranks."""

from __future__ import annotations

import numpy as np
import pytest
from planted_circuit import END, NAMES, planted_circuit
from refusals import refused

import workbench as wb
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import AttentionSinks, HeadAblation
from workbench.testing import ProbeContract

IDS = [[7, name, END, name, 8, 9, 8, 9, name] for name in NAMES]


@pytest.fixture(scope="module")
def circuit():
    return Model(planted_circuit(), None, "circuit")


@pytest.fixture(scope="module")
def circuit_store(circuit, tmp_path_factory):
    texts = [{"input_ids": ids, "domain": "ab"[n % 2]} for n, ids in enumerate(IDS)]
    out = tmp_path_factory.mktemp("ablation") / "s"
    return wb.record(circuit, texts, sites=["pattern"], out=out, show_progress=False)


class TestContract(ProbeContract):
    probe = HeadAblation
    settings = {"heads": ("L0H1", "L1H2"), "resamples": 20, "controls_drawn": 1}  # noqa: RUF012

    @pytest.fixture
    def store(self, circuit_store):
        return circuit_store

    @pytest.fixture
    def model(self, circuit):
        return circuit


def test_the_heads_of_the_circuit_are_needed_at_its_answer_and_others_nowhere(circuit, circuit_store):
    probe = HeadAblation(heads=("L0H1", "L0H2"), ablation="zero", groups="all", where=f"token_id = {END}", resamples=20)
    result = probe.run(circuit_store, model=circuit)
    data = result.data.sel(group="all")
    assert data["accuracy"].to_numpy().tolist() == [-1, -1, 0]  # both, L0H1, L0H2
    assert float(data["loss"].sel(heads="L0H2")) == 0
    assert float(data["accuracy_random"].sel(heads="L0H1")) == 0
    assert float(data["accuracy_difference"].sel(heads="L0H1")) == -1
    assert float(data["plain_accuracy"]) == 1
    assert "accuracy 100 to 0 %" in result.headline()


def test_repeats_are_tokens_that_followed_an_earlier_occurrence(circuit, circuit_store):
    probe = HeadAblation(heads=("L1H1",), where=None, resamples=2, controls_drawn=1)
    groups = probe._groups(circuit_store, np.arange(circuit_store.rows))
    expected = [9 * n + at for n in range(4) for at in (6,)]  # 8 9 8 9: the second 8, after which 9 comes again
    assert groups["repeats"].tolist() == expected
    assert len(groups["other"]) == circuit_store.rows - len(expected)


def test_groups_of_a_column_and_heads_of_a_saved_result(circuit, circuit_store, tmp_path):
    sinks = AttentionSinks(length=8, resamples=2).run(circuit_store)
    settings = {"ranked_by": str(sinks.save(tmp_path / "sinks")), "top": 2, "groups": "column", "column": "domain"}
    result = HeadAblation(resamples=2, controls_drawn=1, **settings).run(circuit_store, model=circuit)
    best = [f"L{layer}H{head}" for layer, head in sinks.table[["layer", "head"]].head(2).to_numpy()]
    assert result.data["heads"].to_numpy().tolist() == ["all", *best]
    assert result.data["group"].to_numpy().tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "none is named"),
        ({"heads": ("5.1",)}, "'5.1' is no head"),
        ({"heads": ("L0H9",)}, "head of layer 0 must be"),
        ({"heads": ("L0H1",), "groups": "column", "column": "topic"}, "column 'topic' is not in"),
        ({"heads": ("L0H1",), "groups": "column"}, "name a column"),
        ({"heads": ("L0H1",), "where": "position = 1"}, "no measured token is of 'repeats'"),
    ],
)
def test_requests_without_an_answer_are_refused(circuit, circuit_store, settings, message):
    assert message in refused(RequestError, lambda: HeadAblation(**settings).run(circuit_store, model=circuit))
