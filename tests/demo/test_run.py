"""The demo on another model than the embedded one, with three probes; `make demo` runs all."""

import pytest
from refusals import refused
from transformers import MambaConfig, MambaForCausalLM

import workbench as wb
from workbench.demo import run
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import LogitLens


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


def test_an_interrupted_run_keeps_the_results_that_it_has(stories260k, three_probes, monkeypatch, tmp_path):
    ran = []

    class Counted(LogitLens):
        def run(self, store, *, model=None):
            ran.append(self.top_k)
            return super().run(store, model=model)

    find = run.find_probe
    monkeypatch.setattr(run, "find_probe", lambda name: Counted if name == "logit-lens" else find(name))

    def demo(rows=100):
        return run.demo(tmp_path, model=stories260k, rows=rows, print_line=lambda _line: None)

    report = demo()
    report.unlink()  # as if the run had been stopped
    assert demo() == report
    assert len(ran) == 1
    assert "logit-lens" in report.read_text()
    demo()  # a finished run is made anew
    assert len(ran) == 2
    report.unlink()
    monkeypatch.setattr(run, "SETTINGS", {"logit-lens": {"top_k": 3}})
    demo()
    assert ran[2:] == [3]


def test_a_number_of_rows_below_one_is_refused(stories260k, three_probes, tmp_path):
    message = refused(RequestError, lambda: run.demo(tmp_path, model=stories260k, rows=0))
    assert "max_rows" in message


def test_sites_that_a_model_lacks_are_left_out(monkeypatch, tmp_path):
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = Model(MambaForCausalLM(config).eval(), None, "mamba")
    monkeypatch.setattr(run, "record", lambda _model, _texts, *, sites, out, **_: (out.name, sites))
    stores = dict(run.record_stores(model, tmp_path, (), 10))
    assert "resid_post" in stores["demo.acts"]
    for sites in stores.values():
        assert model.site_map.select(sites)
        assert not any(site.startswith(("attn", "pattern")) for site in sites)
