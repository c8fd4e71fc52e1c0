"""Attention scores from recorded queries and keys: the model's own scale, soft-cap and window, kept in the manifest."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from refusals import refused

import workbench as wb
from workbench.experiments.architectures.tiny import tiny_model as tiny_of_type
from workbench.io.errors import DataError, RequestError
from workbench.io.parse import to_checked_json
from workbench.model.attention_scores import attention_scores, layer_rule, score_rules
from workbench.model.load import Model

IDS = np.random.default_rng(5).integers(8, 100, 24).tolist()  # more than the window of 16


def record(module, tmp_path, **options):
    model = Model(module, None, "tiny")
    sites = sorted({site for rule in model.site_map.score_rules for site in (rule.queries, rule.keys)})
    return wb.record(model, [IDS], out=tmp_path / "s", sites=sites, dtype="float32", show_progress=False, **options)


def check_patterns(module, store):
    """The softmax of the scores over visible keys is plain Hugging Face's attention."""
    eager = copy.deepcopy(module)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        expected = eager(input_ids=torch.tensor([IDS]), output_attentions=True).attentions
    rules = score_rules(store)
    assert [*rules] == list(range(len(expected)))
    at = torch.arange(len(IDS))
    for layer, weights in enumerate(expected):
        rule = layer_rule(rules, store, layer)
        scores = attention_scores(rule, store[rule.queries][:], store[rule.keys][:])
        hidden = scores.masked_fill(~rule.visible(at[:, None], at), -torch.inf)
        torch.testing.assert_close(hidden.softmax(-1), weights[0], rtol=0, atol=1e-6)


def test_their_softmax_is_the_pattern_of_plain_hugging_face(tiny_model, tmp_path):
    """Shared keys (GQA), rotated and plain queries, a scale, soft-caps and windows that are not the default."""
    module = copy.deepcopy(tiny_model)
    if hasattr(module.config, "query_pre_attn_scalar"):
        for block in module.model.layers:
            block.self_attn.scaling = 3.0**-0.5
    check_patterns(module, record(module, tmp_path))


def test_gemmas_rules_are_those_of_its_config(tiny_models, tmp_path):
    rules = score_rules(record(tiny_models["gemma2"], tmp_path))
    assert [(rule.queries, rule.keys) for rule in rules.values()] == [(f"rot_q.{i}", f"rot_k.{i}") for i in range(3)]
    assert {(rule.scale, rule.softcap, rule.biased) for rule in rules.values()} == {(8**-0.5, 1.0, False)}
    assert [rule.window for rule in rules.values()] == [16, None, 16]
    assert rules[0].visible(20, np.array([3, 4, 5, 20, 21])).tolist() == [False, False, True, True, False]


def test_batches_and_float64_are_kept(tiny_models, tmp_path):
    store = record(tiny_models["gemma2"], tmp_path)
    rule = score_rules(store)[0]
    query, key = store["rot_q.0"][:], store["rot_k.0"][:]
    exact = attention_scores(rule, query[None].double(), key[None].double())
    assert (exact.dtype, exact.shape) == (torch.float64, (1, 4, 24, 24))
    score = exact[0, 3, 7, 2].item()
    assert score == pytest.approx(np.tanh(float(query[7, 3].double() @ key[2, 1].double()) * 8**-0.5), abs=1e-12)


def test_an_older_store_asks_the_model(tiny_models, tmp_path):
    store = record(tiny_models["gemma2"], tmp_path)
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["model"]["score_rules"] = None
    (store.path / "manifest.json").write_text(to_checked_json(manifest))
    old = wb.open_store(store.path)
    assert "model is not given, and 'tiny'" in refused(RequestError, lambda: score_rules(old))
    assert score_rules(old, Model(tiny_models["gemma2"], None, "tiny")) == score_rules(store)
    assert "is not the one" in refused(
        RequestError, lambda: score_rules(old, Model(tiny_models["gpt2"], None, "other"))
    )


def test_scores_that_are_more_than_queries_and_keys_are_refused(tiny_models, tmp_path):
    bloom = Model(tiny_of_type("bloom"), None, "bloom")
    store = wb.record(bloom, [IDS], out=tmp_path / "b", sites=["resid_post.0"], show_progress=False)
    text = refused(RequestError, lambda: layer_rule(score_rules(store), store, 0))
    assert text.startswith("layer 0: BloomForCausalLM has no attention there whose scores are products")
    store = wb.record(Model(tiny_models["llama"], None, "t"), [IDS], out=tmp_path / "l", show_progress=False)
    assert "rot_q.0 is not recorded" in refused(RequestError, lambda: layer_rule(score_rules(store), store, 0))


def test_a_bias_by_position_is_noticed(tmp_path):
    """Nothing in queries and keys shows the bias, so the scores of the layer are refused."""
    module = tiny_of_type("llama")

    def biased(_module, arguments, settings):
        mask = torch.zeros(settings["hidden_states"].shape[1], settings["hidden_states"].shape[1])
        at = torch.arange(len(mask))
        mask = torch.where(at <= at[:, None], (at - at[:, None]) / 4.0, torch.finfo(torch.float32).min)
        return arguments, settings | {"attention_mask": mask[None, None]}

    attention = module.model.layers[0].self_attn
    attention.register_forward_pre_hook(biased, with_kwargs=True)
    rules = Model(module, None, "alibi").site_map.score_rules
    assert [rule.biased for rule in rules][:2] == [True, False]


def test_a_damaged_rule_is_refused(tiny_models, tmp_path):
    store = record(tiny_models["llama"], tmp_path)
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["model"]["score_rules"][0]["window"] = 0
    (store.path / "manifest.json").write_text(to_checked_json(manifest))
    assert "window of layer 0 is 0; at least 1" in refused(DataError, lambda: wb.open_store(store.path))
