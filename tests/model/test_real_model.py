"""Published facts of a real model, SmolLM2-135M-Instruct: recorded as any other, it shows what the literature says."""

from __future__ import annotations

import numpy as np
import pytest

import workbench as wb
from workbench.probes import AttentionSinks, LogitLens

PROMPT = "The capital of France is"
TEXT = (
    "The lighthouse stood at the end of a narrow strip of land, and every evening the keeper climbed its stairs to "
    "light the lamp. Ships passed far out at sea, their crews grateful for the signal that kept them away from the "
    "rocks. In winter, storms shook the old walls, yet the lamp was never dark, for the keeper knew how much depended "
    "on it."
)


@pytest.fixture(scope="module")
def model(smollm2):
    return wb.load_model(smollm2, device="cpu")


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    sites = ["resid_post.0", "resid_post.10:28:4", "resid_post.29", "attn_received"]
    out = tmp_path_factory.mktemp("smollm2") / "a.acts"
    return wb.record(model, [PROMPT, TEXT], sites=sites, context=64, dtype="float32", out=out, show_progress=False)


def test_it_has_the_published_shape(model):
    config = model.module.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (30, 576, 9)
    assert model.module.get_input_embeddings().weight.shape == (49_152, 576)


def test_a_massive_activation_lies_in_dimension_507_at_the_first_position(store):
    first = store.where("position = 0")
    for layer in (14, 18, 22, 26):
        states = np.abs(np.asarray(store["resid_post", layer][first]))
        assert (states.argmax(1) == 507).all()
        assert states.max() > 10_000
        later_states = np.asarray(store["resid_post", layer][store.where("position > 0")])
        assert np.linalg.norm(states, axis=1).min() > 20 * np.median(np.linalg.norm(later_states, axis=1))
    assert np.abs(np.asarray(store["resid_post", 0][first])).max() < 1_000


def test_the_strongest_sink_is_head_8_of_layer_18(store):
    result = AttentionSinks(length=64).run(store)
    strongest = result.table.sort_values("alpha", ascending=False).iloc[0]
    assert (strongest["layer"], strongest["head"]) == (18, 8)
    assert strongest["alpha"] > 0.9


def test_the_capital_of_france_is_paris(store):
    result = LogitLens(where="document = 0", top_k=1).run(store)
    last = result.table[result.table["layer"] == 29].iloc[-1]
    assert (last["token"], last["top_token_1"]) == (" is", " Paris")
