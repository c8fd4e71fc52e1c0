"""Results that version 0.1.0 saved open unchanged: settings, table, data, figures, headline.

tests/data/results-v1 was written before the package became one tree, from recordings of the embedded model.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import workbench as wb

SAVED = Path(__file__).parents[1] / "data" / "results-v1"
FIGURES = {
    "attention-sinks": {"sinks", "positions", "norms"},
    "logit-lens": {"grid", "by_layer", "depth"},
    "token-erasure": {"accuracy"},
}


@pytest.mark.parametrize("probe", FIGURES)
def test_a_result_saved_before_opens_with_its_figures(probe):
    result = wb.load_result(SAVED / probe)
    assert result.probe == probe
    assert result.provenance["workbench"] == "0.1.0"
    assert set(result.figures()) == FIGURES[probe]
    assert all(figure.data for figure in result.figures().values())


@pytest.mark.parametrize(
    ("probe", "numbers"),
    [("attention-sinks", ["10.8 %", "0.47"]), ("logit-lens", ["9.35", "1.10"]), ("token-erasure", ["79", "17"])],
)
def test_its_headline_has_the_same_numbers(probe, numbers):
    headline = wb.load_result(SAVED / probe).headline()
    assert [number for number in numbers if number not in headline] == []


@pytest.mark.parametrize("probe", FIGURES)
def test_saving_it_again_keeps_every_value(probe, tmp_path):
    before = wb.load_result(SAVED / probe)
    before.save(tmp_path / probe)
    again = wb.load_result(tmp_path / probe)
    assert again.provenance == before.provenance
    assert again.table.equals(before.table)
    assert again.data.identical(before.data)
