"""Attention scores computed from recorded queries and keys, against those of eager attention itself."""

from __future__ import annotations

import copy

import pytest
import torch
from refusals import refused

import workbench as wb
from workbench.experiments.architectures.tiny import tiny_model
from workbench.io.errors import RequestError

TEXTS = [[3 + i % 40 for i in range(24)], [4, 16, 64, 256]]  # longer than Gemma's window of 16
SITES = {
    "gpt2": ("q", "k"),
    "llama": ("rot_q", "rot_k"),
    "gpt_neox": ("rot_q", "rot_k"),
    "gemma2": ("rot_q", "rot_k"),
}


def eager_scores(module, ids, monkeypatch):
    """Input of every softmax over keys in one eager pass, by layer: masked scores (head, query, key)."""
    module = copy.deepcopy(module)
    module.config._attn_implementation = "eager"
    softmax, inputs = torch.nn.functional.softmax, []

    def noted(scores, *arguments, **options):
        if scores.ndim == 4:
            inputs.append(scores[0].detach().float().clone())
        return softmax(scores, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "softmax", noted)
    with torch.inference_mode():
        module(input_ids=torch.tensor([ids]), use_cache=False)
    monkeypatch.undo()
    return inputs


@pytest.mark.parametrize("family", SITES)
def test_scores_are_those_of_eager_attention(family, tiny_models, tmp_path, monkeypatch):
    model = wb.load_model(tiny_models[family])
    sites = [*SITES[family], "pattern"]
    store = wb.record(model, TEXTS, sites=sites, dtype="float32", context=24, out=tmp_path / "a", show_progress=False)
    first = store.where("sequence = 0")
    expected = eager_scores(model.module, TEXTS[0], monkeypatch)
    assert len(expected) == 3
    for layer in range(3):
        array = wb.attn_scores(store, layer)
        assert array.axes == ("row", "head", "key")
        assert array.shape == (28, 4, 24)
        scores = array[first].transpose(0, 1)
        visible = scores > -torch.inf
        assert torch.equal(visible, expected[layer] > -1e30)
        torch.testing.assert_close(scores[visible], expected[layer][visible], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(array[:].softmax(-1), store["pattern", layer][:], rtol=1e-4, atol=1e-6)
        mixed = [27, 0, 11, 25]
        torch.testing.assert_close(array[mixed], array[:][mixed])
    if family == "gemma2":
        hidden = [(wb.attn_scores(store, layer)[first][23, 0] == -torch.inf).sum() for layer in range(3)]
        assert sorted(int(count) for count in hidden) in ([0, 8, 8], [0, 0, 8])  # a window of 16 in every other layer


def test_what_has_no_scores_is_refused(tiny_models, tmp_path):
    model = wb.load_model(tiny_models["llama"])
    store = wb.record(model, TEXTS, sites=["rot_q.1"], context=24, out=tmp_path / "a", show_progress=False)
    assert "rot_k.1 is not recorded" in refused(RequestError, lambda: wb.attn_scores(store, 1))
    chosen = wb.record(
        model, TEXTS, sites=["rot_q", "rot_k"], keep="last", context=24, out=tmp_path / "b", show_progress=False
    )
    assert "needs whole sequences" in refused(RequestError, lambda: wb.attn_scores(chosen, 1))


def test_layers_that_attend_within_chunks_have_no_rule():
    """In Llama 4 the mask alone tells which keys a query sees; the last of the four layers attends to all."""
    rules = wb.load_model(tiny_model("llama4_text")).site_map.score_rules
    assert [rule.layer for rule in rules] == [3]
