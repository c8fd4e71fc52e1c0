"""The store of a probe, given by its path, and what is neither."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refusals import refused

import workbench as wb
from workbench.model.reload import recorded_model
from workbench.model.stored_rows import opened_donors
from workbench.probes import LogitLens, UnderTrainedTokens
from workbench.store.reader import opened


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    model = wb.load_model("demo", device="cpu")
    out = tmp_path_factory.mktemp("stores") / "s.acts"
    return wb.record(model, ["the little day"], out=out, show_progress=False)


def test_a_path_is_opened(store):
    expected = LogitLens().run(store)
    for path in (str(store.path), Path(store.path)):
        assert LogitLens().run(path).data.identical(expected.data)
    assert UnderTrainedTokens(tested=0).run(str(store.path)).provenance["store"] == "s.acts"


def test_functions_that_read_a_store_take_its_path(store):
    model, path = wb.load_model("demo", device="cpu"), str(store.path)
    assert recorded_model(path, model) is model
    assert wb.compare(path, path, probes=()).sites.equals(wb.compare(store, store, probes=()).sites)
    assert wb.to_hf_dataset(path, "resid_post.0", ()).num_rows == store.rows
    sae = wb.load_sae("demo", device="cpu")
    assert wb.sae_metrics(path, sae, rows="row > 0").rows == store.rows - 1
    assert wb.extract_features(path, sae, show_progress=False).store.path == store.path
    states = []
    for of in (path, store):
        with wb.intervene(model, wb.Mean("resid_post.0", of)), torch.no_grad():
            states.append(model.module(torch.tensor([[3, 4]])).logits)
    assert torch.equal(*states)


def test_an_open_store_is_read_as_it_is(store):
    """It has a path itself; the store there may be another by now, or a temporary one without a second handle."""
    changed = wb.Store(store.path, replace(store.manifest, model=replace(store.manifest.model, name="renamed")))
    assert opened(changed) is changed
    assert opened_donors(changed) is changed
    assert LogitLens().run(changed).provenance["model"] == "renamed"


def test_a_path_without_a_store_and_what_is_no_path_are_refused_in_a_line(store, tmp_path):
    lens, tokens = LogitLens(), UnderTrainedTokens(tested=0)
    model = wb.load_model("demo", device="cpu")
    assert refused(wb.RequestError, lambda: lens.run(tmp_path / "x.acts")).startswith("no store at ")
    assert refused(wb.RequestError, lambda: tokens.run("demo")).endswith("; a model is given by wb.load_model('demo')")
    expected = "store must be a store (wb.open_store) or its path, not "
    for value in (None, 3, model, store.tokens, b"x", [store]):
        assert refused(wb.RequestError, lambda value=value: lens.run(value)).startswith(expected)
    assert lens.run(store=store).probe == "logit-lens"
