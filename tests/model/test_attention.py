"""Attention while the model computes it: the table of functions, and the pattern in blocks."""

import copy
import math
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from capture_example import LENGTHS, N, captured
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from workbench.model.attention import AttentionCall, pattern_blocks, tap_attention
from workbench.model.discovery import find_sites
from workbench.model.forward import run

PADDED = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
RANDOM_MASK = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(2)) > 0.4
RANDOM_MASK |= torch.eye(6, dtype=torch.bool)
BIAS = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(4))


# ---- attention: the table -------------------------------------------------------------------------------


@pytest.fixture(params=["sdpa", "eager", "flash_attention_2"])
def implementation(request):
    return request.param


def test_the_attention_table_is_as_before(llama, implementation):
    """`eager` is not in the table, `sdpa` is in its global part, and a user may have put his own in the local part."""
    module, _ = llama
    local = ALL_ATTENTION_FUNCTIONS._local_mapping

    def function():
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, print)

    before, entry = dict(local), function()
    with tap_attention(implementation, {module: print}):
        assert function() is not entry
        with tap_attention(implementation, {module: print}):
            assert function() is not entry
        assert function() is not entry
    assert (dict(local), function()) == (before, entry)
    with pytest.raises(KeyError), tap_attention(implementation, {module: print}):
        raise KeyError
    assert (dict(local), function()) == (before, entry)
    assert not vars(ALL_ATTENTION_FUNCTIONS).keys() - {"_local_mapping"}


def test_without_layers_asked_the_table_is_not_touched():
    before = ALL_ATTENTION_FUNCTIONS.get("sdpa")
    with tap_attention("sdpa", {}):
        assert ALL_ATTENTION_FUNCTIONS.get("sdpa") is before


def test_taps_nest_and_another_model_passes_through(llama, tiny_models, batch):
    module, _ = llama
    gpt2 = tiny_models["gpt2"]
    with torch.no_grad():
        alone = gpt2(input_ids=batch[0], attention_mask=batch[1]).logits
    calls = {"outer": [], "inner": []}
    attention = [layer.self_attn for layer in module.model.layers]
    with ExitStack() as stack:
        stack.enter_context(tap_attention("sdpa", {attention[0]: calls["outer"].append}))
        stack.enter_context(tap_attention("sdpa", {attention[2]: calls["inner"].append}))
        with torch.no_grad():
            assert torch.equal(gpt2(input_ids=batch[0], attention_mask=batch[1]).logits, alone)
        assert calls == {"outer": [], "inner": []}
        run(module, *batch)
    assert [len(patterns) for patterns in calls.values()] == [1, 1]
    assert calls["outer"][0].query.shape == (2, 4, N, 8)
    assert calls["outer"][0].key.shape == (2, 2, N, 8)


@pytest.mark.parametrize(
    ("options", "is_causal", "expected"),
    [
        ({}, True, {"scaling": 8**-0.5, "causal": True, "softcap": None, "sliding_window": None}),
        ({}, False, {"scaling": 8**-0.5, "causal": False}),
        ({"scaling": 0.3, "is_causal": False}, True, {"scaling": 0.3, "causal": False}),
        ({"scaling": 0.0, "is_causal": True}, False, {"scaling": 0.0, "causal": True}),
        ({"softcap": 2.0, "sliding_window": 5}, True, {"softcap": 2.0, "sliding_window": 5}),
        ({"position_bias": BIAS}, True, {"position_bias": BIAS}),
    ],
)
def test_a_call_is_handed_over_as_it_was_made(options, is_causal, expected, monkeypatch):
    def attend(_module, query, _key, _value, _mask, **passed_on):
        assert passed_on == options
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "made_up", attend)
    module, calls = torch.nn.Module(), []
    module.is_causal = is_causal
    query, key, value = torch.randn(3, 1, 2, 3, 8)
    with tap_attention("made_up", {module: calls.append}):
        output, _ = ALL_ATTENTION_FUNCTIONS["made_up"](module, query, key, value, PADDED, **options)
    (call,) = calls
    assert ALL_ATTENTION_FUNCTIONS["made_up"] is attend
    assert {name: getattr(call, name) for name in expected} == expected
    assert (call.query is query, call.key is key, call.value is value, call.mask is PADDED) == (True,) * 4
    assert call.output is output
    assert call.weights is None


def test_eager_attention_is_tapped_and_gives_its_own_weights(tiny_models, batch):
    module = copy.deepcopy(tiny_models["llama"])
    sdpa = captured(module, find_sites(module).select(["pattern.1", "z.1"]), batch)
    module.set_attn_implementation("eager")
    calls = []
    with tap_attention("eager", {module.model.layers[1].self_attn: calls.append}):
        run(module, *batch)
    (call,) = calls
    blocks = list(pattern_blocks(call, query_rows=2))
    assert [(first, block.shape) for first, block in blocks] == [(0, (2, 4, N, N))]
    for row, n in enumerate(LENGTHS):
        torch.testing.assert_close(blocks[0][1][row, :, :n], sdpa["pattern.1"][row, :n].transpose(0, 1))


# ---- attention: the pattern -----------------------------------------------------------------------------


def made_up_call(**changes):
    """6 queries of 4 heads over 2 key heads, two sequences, nothing masked but the future."""
    generator = torch.Generator().manual_seed(11)
    tensors = {
        "query": torch.randn(2, 4, 6, 8, generator=generator),
        "key": torch.randn(2, 2, 6, 8, generator=generator),
        "value": torch.randn(2, 2, 6, 8, generator=generator),
        "output": torch.randn(2, 6, 4, 8, generator=generator),
    }
    rest = {"weights": None, "mask": None, "scaling": 0.7, "causal": True, "softcap": None}
    return AttentionCall(**{**tensors, **rest, "position_bias": None, "sliding_window": None, **changes})


def whole(call, query_rows=256):
    return torch.cat([block for _, block in pattern_blocks(call, query_rows)], dim=2)


def brute_force(call, visible):
    """The pattern, one cell after the other in float64; `visible(batch, query, key)` says who sees what."""
    query, key = call.query.double().numpy(), call.key.double().numpy()
    batch, heads, n, _ = query.shape
    pattern = np.zeros((batch, heads, n, n))
    for b, h, i in np.ndindex(batch, heads, n):
        row = {}
        for j in range(n):
            if visible(b, i, j):
                score = float(query[b, h, i] @ key[b, h // 2, j]) * call.scaling
                if call.softcap is not None:
                    score = call.softcap * math.tanh(score / call.softcap)
                if call.position_bias is not None:
                    score += float(call.position_bias[0, h, i, j])
                row[j] = math.exp(score)
        for j, weight in row.items():
            pattern[b, h, i, j] = weight / sum(row.values())
    return pattern


def causal(_b, i, j):
    return j <= i


CASES = {
    "causal": ({}, causal),
    "not causal": ({"causal": False}, lambda _b, _i, _j: True),
    "soft-cap": ({"softcap": 1.5}, causal),
    "position bias": ({"position_bias": BIAS}, causal),
    "soft-cap, then position bias": ({"softcap": 1.5, "position_bias": BIAS}, causal),
    "boolean mask": ({"mask": RANDOM_MASK}, lambda b, i, j: RANDOM_MASK[b, 0, i, j]),
    "boolean mask of one row": ({"mask": RANDOM_MASK[:, :, 5:]}, lambda b, _i, j: RANDOM_MASK[b, 0, 5, j]),
    "boolean mask with room for more keys": (
        {"mask": torch.nn.functional.pad(RANDOM_MASK, (0, 3), value=True)},
        lambda b, i, j: RANDOM_MASK[b, 0, i, j],
    ),
    "additive mask": (
        {"mask": torch.zeros(RANDOM_MASK.shape).masked_fill(~RANDOM_MASK, torch.finfo(torch.float32).min)},
        lambda b, i, j: RANDOM_MASK[b, 0, i, j],
    ),
    "flash attention's padding": ({"mask": PADDED}, lambda b, i, j: j <= i and PADDED[b, j]),
    "flash attention's window": (
        {"mask": PADDED, "sliding_window": 3},
        lambda b, i, j: i - 3 < j <= i and PADDED[b, j],
    ),
    "flash attention's padding, not causal": (
        {"mask": PADDED, "causal": False},
        lambda b, _i, j: PADDED[b, j],
    ),
    "no mask, so no window": ({"sliding_window": 3}, causal),
}


@pytest.mark.parametrize("case", CASES)
def test_the_pattern_is_the_softmax_over_what_is_seen(case):
    changes, visible = CASES[case]
    call = made_up_call(**changes)
    real = np.ones((2, 1, 6, 1), bool)
    if call.mask is PADDED:  # a query that is padding sees what it will
        real = PADDED.bool().numpy()[:, None, :, None]
    np.testing.assert_allclose(np.where(real, whole(call), 0), np.where(real, brute_force(call, visible), 0), atol=1e-6)


@pytest.mark.parametrize("query_rows", [1, 4, 5, 6])
@pytest.mark.parametrize("case", CASES)
def test_pieces_of_a_pattern_are_the_pattern(case, query_rows):
    call = made_up_call(**CASES[case][0])
    firsts = [first for first, _ in pattern_blocks(call, query_rows)]
    assert firsts == list(range(0, 6, query_rows))
    torch.testing.assert_close(whole(call, query_rows), whole(call), rtol=0, atol=1e-6)


def test_a_pattern_is_float32_whatever_the_model_computes_in():
    half = {name: getattr(made_up_call(), name).bfloat16() for name in ("query", "key", "value", "output")}
    pattern = whole(made_up_call(**half))
    assert pattern.dtype == torch.float32
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 6), rtol=0, atol=1e-6)


def test_a_callers_weights_are_the_pattern():
    weights = torch.rand(2, 4, 6, 6).half()
    assert torch.equal(whole(made_up_call(weights=weights), query_rows=2), weights.float())
