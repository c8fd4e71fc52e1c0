"""The model a store was recorded from: found by its name, taken when given, refused when it is another."""

from __future__ import annotations

import copy

import pytest
import torch
from refusals import refused

import workbench as wb
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.model.reload import recorded_model


def record(model, out):
    texts = [[5, 6, 7]] if model.tokenizer is None else ["Once upon a time"]
    return wb.record(model, texts, out=out, sites=("resid_post.0",), show_progress=False)


@pytest.fixture(scope="module")
def tiny(tiny_models, tmp_path_factory):
    """(model, store): a name that nothing can be loaded by."""
    model = Model(tiny_models["llama"], None, "tiny-llama")
    return model, record(model, tmp_path_factory.mktemp("origin") / "acts")


@pytest.fixture(scope="module")
def demo_store(tmp_path_factory):
    return record(wb.load_model("demo", device="cpu"), tmp_path_factory.mktemp("demo") / "acts")


def test_the_name_in_the_store_is_enough(demo_store):
    reloaded = recorded_model(demo_store, device="cpu")
    assert (reloaded.name, reloaded.fingerprint()) == ("demo", demo_store.manifest.model.fingerprint)
    assert reloaded.tokenizer is not None


def test_a_model_that_is_given_is_taken_as_it_is(tiny):
    model, store = tiny
    assert recorded_model(store, model) is model


def test_a_directory(tiny, tmp_path):
    model, store = tiny
    model.module.save_pretrained(tmp_path / "there")
    reloaded = recorded_model(store, str(tmp_path / "there"), device="cpu")
    assert reloaded.fingerprint() == model.fingerprint()
    assert reloaded.module is not model.module


def test_device(demo_store):
    assert recorded_model(demo_store, device="cpu").device == torch.device("cpu")
    assert "device 'toaster' cannot be used" in refused(
        RequestError, lambda: recorded_model(demo_store, device="toaster")
    )


def test_weights_of_the_recorded_precision(tiny_models, tmp_path):
    """A directory in float32 of a recording in bfloat16 is loaded in bfloat16."""
    tiny_models["llama"].save_pretrained(tmp_path / "there")
    store = record(wb.load_model(tmp_path / "there", device="cpu", dtype="bfloat16"), tmp_path / "acts")
    reloaded = recorded_model(store, str(tmp_path / "there"), device="cpu")
    assert reloaded.dtype == torch.bfloat16


def test_a_name_that_cannot_be_loaded(tiny):
    _, store = tiny
    message = refused(RequestError, lambda: recorded_model(store))
    assert message.startswith(
        "model is not given, and 'tiny-llama', which the store names, cannot be loaded; "
        "give model=, the directory it was recorded from (model 'tiny-llama' "
    )


def test_other_weights_are_refused(tiny):
    model, store = tiny
    shifted = copy.deepcopy(model.module)
    with torch.no_grad():
        shifted.model.norm.weight[0] += 1e-6
    changed = Model(shifted, None, "other").fingerprint()
    assert refused(RequestError, lambda: recorded_model(store, Model(shifted, None, "other"))) == (
        "model 'other' is not the one that the store 'acts' was recorded from ('tiny-llama', LlamaForCausalLM): its "
        f"weights are other ones ({changed[:12]}, not {model.fingerprint()[:12]}); give the model as it was recorded"
    )
    message = refused(RequestError, lambda: recorded_model(store, "demo", device="cpu"))
    assert message.startswith("model 'demo' is not the one that the store")
