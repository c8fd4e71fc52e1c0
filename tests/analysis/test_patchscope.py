"""Patchscopes: the identity patch, hooks written by hand at one place and at several, generation, and the control."""

from __future__ import annotations

import inspect

import pytest
import torch
from refusals import refused

import workbench as wb
from workbench.analysis.patchscope import random_states, read_states, target_prompt
from workbench.io.errors import RequestError
from workbench.model.load import Model

TEXT = "the little day was Monday and the day"


@pytest.fixture(scope="module")
def tiny(tiny_models, tiny_tokenizer):
    return Model(tiny_models["llama"], tiny_tokenizer, "tiny-llama")


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("patchscope") / "s"
    return wb.record(tiny, [TEXT, "day"], sites=["resid_post"], out=out, dtype="float32", show_progress=False)


def by_hand(module, ids, layer, positions, state, steps=1):
    """Greedy tokens and ln P of the first step, without cache, with a state at positions of a block's output."""

    def set_state(_module, _arguments, output):
        changed = (output[0] if isinstance(output, tuple) else output).clone()
        changed[:, list(positions)] = state
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    hook = module.model.layers[layer].register_forward_hook(set_state)
    tokens, first = torch.tensor([ids]), None
    try:
        with torch.no_grad():
            for _ in range(steps):
                log = module(tokens, use_cache=False).logits[0, -1].double().log_softmax(-1)
                first = log if first is None else first
                tokens = torch.cat([tokens, log.argmax()[None, None]], 1)
    finally:
        hook.remove()
    return first, tokens[0, len(ids) :].tolist()


def test_a_state_put_where_it_came_from_changes_nothing(tiny, store):
    prompt = target_prompt(tiny, TEXT)
    last = store.where("document = 0 AND is_last")
    with torch.no_grad():
        plain = tiny.module(torch.tensor([prompt.ids])).logits[0, -1].double().log_softmax(-1)
    for layer in range(3):
        logits = read_states(tiny, prompt, f"resid_post.{layer}", last[f"resid_post.{layer}"])
        torch.testing.assert_close(logits[0], plain, atol=1e-6, rtol=0)


def test_every_occurrence_of_the_placeholder_takes_the_state_at_another_layer(tiny, store):
    rows = store.where("token = ' Monday'")
    result = wb.patchscope(
        rows,
        "resid_post.2",
        "the day was the day",
        placeholder=" day",
        into="resid_post.0",
        tokens=(" Monday",),
        top_k=2,
        new_tokens=4,
        model=tiny,
    )
    day = tiny.tokenizer(" day")["input_ids"]
    ids = result.prompt.ids
    assert result.prompt.positions == tuple(n for n, token in enumerate(ids) if [token] == day)
    assert len(result.prompt.positions) == 2
    log, generated = by_hand(tiny.module, ids, 0, result.prompt.positions, rows["resid_post.2"][0], 4)
    line = result.table.iloc[0]
    assert (line["kind"], line["token"], line["row"]) == ("row", " Monday", rows.ids[0])
    assert line["top_probability_1"] == pytest.approx(float(log.exp().max()), abs=1e-6)
    monday = tiny.tokenizer(" Monday")["input_ids"][0]
    assert line["log_probability Monday"] == pytest.approx(float(log[monday]), abs=1e-5)
    assert line["text"] == tiny.tokenizer.decode(generated, skip_special_tokens=True)
    assert result.table["kind"].tolist() == ["row", "random", "none"]


def test_the_control_has_the_norm_of_each_row(store):
    states = store["resid_post", 1][:4]
    drawn = random_states(states, 0)
    torch.testing.assert_close(drawn.norm(dim=1), states.norm(dim=1))
    assert float(torch.nn.functional.cosine_similarity(drawn, states).abs().max()) < 0.7
    assert not torch.equal(drawn, random_states(states, 1))


def test_requests_without_an_answer_are_refused_in_one_line(tiny, store, monkeypatch):
    rows, long = store.where("position = 1"), "day " * 200
    calls = {
        "is not in the prompt": lambda: wb.patchscope(rows, "resid_post.0", placeholder="zebra", model=tiny),
        "none is selected": lambda: wb.patchscope(store.where("position = 99"), "resid_post.0", model=tiny),
        "prompt is empty": lambda: wb.patchscope(rows, "resid_post.0", "", model=tiny),
        "is no single token of this model": lambda: wb.patchscope(rows, "resid_post.0", tokens=("zebra",), model=tiny),
        "has the shape": lambda: wb.patchscope(rows, "resid_post.0", into="z.1", model=tiny),
        "must be rows of a store": lambda: inspect.unwrap(wb.patchscope)(store, "resid_post.0", model=tiny),
        "and the context of model 'tiny-llama' 128": lambda: wb.patchscope(rows, "resid_post.0", long, model=tiny),
        "and 120 new ones": lambda: wb.patchscope(rows, "resid_post.0", new_tokens=120, model=tiny),
        "top_k": lambda: wb.patchscope(rows, "resid_post.0", top_k=0, model=tiny),
    }
    for message, call in calls.items():
        assert message in refused(RequestError, call)
    monkeypatch.setattr(type(rows), "__getitem__", lambda rows, _site: torch.full((len(rows), 32), torch.nan))
    assert "have a NaN or infinite value at resid_post.0" in refused(
        RequestError, lambda: wb.patchscope(rows, "resid_post.0", model=tiny)
    )
    bare = Model(tiny.module, None, "tiny-llama")
    assert "no tokenizer" in refused(RequestError, lambda: target_prompt(bare, "a"))
