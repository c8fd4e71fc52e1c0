"""The demo on another model than the embedded one, with three probes; `make demo` runs all."""

import pytest
from refusals import refused

import workbench as wb
from workbench.demo import run
from workbench.io.errors import RequestError


@pytest.fixture
def three_probes(monkeypatch):
    monkeypatch.setattr(run, "installed_probes", lambda: ("logit-lens", "activation-patching", "steering"))


def test_another_model_is_recorded_on_the_corpus_without_features(stories260k, three_probes, tmp_path):
    lines = []
    report = run.demo(tmp_path, model=stories260k, rows=200, print_line=lines.append)
    store = wb.open_store(tmp_path / "demo.acts")
    assert store.rows == 200
    assert "domain" in store.tokens.column_names
    lens = wb.load_result(tmp_path / "results" / "logit-lens")
    assert lens.data.sizes["layer"] == store.manifest.model.n_layers
    assert [line.split()[0] for line in lines] == [*["recorded"] * 4, "logit-lens", "activation-patching", "report"]
    assert lines[-2].split(maxsplit=1)[1].startswith("not run: ")  # no pair of prompts fits its 512 tokens
    assert "sparse features" not in report.read_text()


def test_a_number_of_rows_below_one_is_refused(stories260k, three_probes, tmp_path):
    message = refused(RequestError, lambda: run.demo(tmp_path, model=stories260k, rows=0))
    assert "max_rows" in message
