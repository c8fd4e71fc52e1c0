"""Over-squashing: the closed form of uniform attention, planted rollouts, made-up inputs, and every setting."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from planted import linear_unembed, planted_store
from refusals import refused
from torch import nn

import workbench as wb
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import OverSquashing
from workbench.probes.over_squashing import spacing, uniform_rollout
from workbench.testing import ProbeContract

WORDS = (" day", " time")
SHORT = {"tokens": WORDS, "separator": " to", "draws": 2, "longest": 16, "rollout": 5}


def record(model, path, sites=("resid_post.0",), **options):
    texts = ["Once upon a time the little day was Monday", "the day was to the time and the day"]
    return wb.record(model, texts, sites=list(sites), out=path, context=12, show_progress=False, **options)


@pytest.fixture(scope="module")
def tiny(tiny_models, tiny_tokenizer):
    return Model(tiny_models["llama"], tiny_tokenizer, "tiny-llama")


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return record(tiny, tmp_path_factory.mktemp("squash") / "x.acts", ["pattern"], bos="always")


class TestContract(ProbeContract):
    probe = OverSquashing
    settings = SHORT

    @pytest.fixture
    def store(self, store):
        return store

    @pytest.fixture
    def model(self, tiny):
        return tiny


def test_uniform_attention_without_positions_is_the_closed_form(tiny_models, tiny_tokenizer, tmp_path):
    """x = (a, b, b, ...): y_n = b + (a + (n - 1) b) / n, so that the distance is |a - b| / (n (n + 1))."""
    module, width = copy.deepcopy(tiny_models["gpt2"]), 32
    body = module.transformer
    with torch.no_grad():
        body.wpe.weight.zero_()
        body.ln_f = nn.Identity()
        for number, block in enumerate(body.h):
            block.ln_1 = nn.Identity()
            block.mlp.c_proj.weight.zero_()
            block.mlp.c_proj.bias.zero_()
            block.attn.c_attn.weight.zero_()
            block.attn.c_attn.bias.zero_()
            block.attn.c_proj.bias.zero_()
            block.attn.c_attn.weight[:, 2 * width :] = torch.eye(width)
            block.attn.c_proj.weight.copy_(torch.eye(width) if number == 0 else torch.zeros(width, width))
    model = Model(module, tiny_tokenizer, "uniform")
    store = record(model, tmp_path / "x", bos="always")
    settings = {**SHORT, "kinds": ("constant",), "draws": 1, "longest": 64}
    result = OverSquashing(**settings).run(store, model=model)
    first, b = (
        body.wte.weight[token_id].detach().double().numpy()
        for token_id in (0, tiny_tokenizer(WORDS[0])["input_ids"][0])
    )
    assert list(store.manifest.tokens_added["prefix"]) == [0]
    exact = result.data.sel(dtype="float32", kind="constant")
    for length in (4, 8, 16, 64):
        expected = np.abs(first - b) / (length * (length + 1))
        at_length = exact.sel(length=length)
        np.testing.assert_allclose(at_length["distance_l2"], np.linalg.norm(expected), rtol=0.02, atol=1e-6)
        assert float(at_length["final_inf"]) == pytest.approx(expected.max(), rel=0.02)
        y = b + (first + (length - 1) * b) / length
        np.testing.assert_allclose(at_length["relative"], np.linalg.norm(expected) / np.linalg.norm(y), rtol=0.02)
    coarse = result.data.sel(dtype="bfloat16", kind="constant")
    assert coarse["below_floor"].to_numpy().tolist()[-2:] == [1, 1]
    assert float(exact["below_floor"].sum()) == 0
    assert float(coarse["final_inf"].sel(length=64)) <= float(coarse["floor"].sel(length=64))
    assert float(coarse["floor"].sel(length=64)) == 2.0 ** (np.floor(np.log2(np.abs(y).max())) - 7)
    assert "in bfloat16: for constant inputs from " in result.headline()


def test_the_spacing_of_a_type_is_the_distance_of_its_neighbours():
    sizes = torch.tensor([1.0, 1.5, 3.7, 0.3, 100.0])
    for dtype in (torch.bfloat16, torch.float32):
        x = sizes.to(dtype)
        bits = x.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
        after = (bits + 1).view(dtype)
        assert spacing(x.float(), dtype).tolist() == (after.double() - x.double()).tolist()


def test_a_rollout_of_uniform_patterns(tmp_path):
    """The digits of METHODS2, 3.3; heads are averaged before layers are multiplied."""
    expected = [0.3043, 0.1619, 0.1124, 0.0855, 0.0682, 0.0560, 0.0468, 0.0396, 0.0338, 0.0915]
    np.testing.assert_allclose(uniform_rollout(10, 4), expected, atol=5e-5)
    from workbench.probes.over_squashing import _patterns, _rollout

    n = 10
    uniform = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    apart = np.stack([2 * uniform - np.diag(np.ones(n)), np.diag(np.ones(n))], 1)  # two heads, uniform on average
    sites = {f"pattern.{layer}": np.tile(apart, (2, 1, 1)) for layer in range(4)}
    store = planted_store(tmp_path / "s", [list(range(n))] * 2, sites, linear_unembed(np.eye(n, 3)))
    patterns, rows = _patterns(store, n)
    np.testing.assert_allclose(_rollout(store, patterns, rows), expected, atol=5e-5)
    assert _patterns(store, n + 1)[0] == []


def test_made_up_inputs(store, tiny, monkeypatch):
    inputs = []
    from workbench.probes import over_squashing

    original = over_squashing._last_states
    monkeypatch.setattr(
        over_squashing, "_last_states", lambda *parts: inputs.append(parts[2].tolist()) or original(*parts)
    )
    ids = [tiny.tokenizer(word)["input_ids"][0] for word in (*WORDS, " to")]
    OverSquashing(**{**SHORT, "longest": 8, "dtypes": ("float32",)}).run(store, model=tiny)
    first, second = inputs[2:4]  # constant, 8 tokens
    assert first == [[0] + [ids[0]] * 7, [0] + [ids[1]] * 7]
    assert second == [row + row[-1:] for row in first]
    for row in inputs[6]:
        assert row[0] == 0
        assert set(row[1:]) <= set(ids[:2])
    a, b, c = ids
    assert inputs[-2] == [[0, a, c, a, a, c, a, a], [0, b, c, b, b, c, b, b]]
    assert inputs[-1] == [[0, a, c, a, a, c, a, a, a], [0, b, c, b, b, c, b, b, b]]


def test_settings_matter(store, tiny):
    def run(**more):
        return OverSquashing(**{**SHORT, **more}).run(store, model=tiny)

    plain = run().data
    assert plain.sizes["length"] == 3
    assert float(plain["rollout"].sum()) == pytest.approx(1, abs=2e-3)  # float16
    assert run(kinds=("random",), dtypes=("float32",)).data.sizes["kind"] == 1
    assert not np.array_equal(run(seed=1).data["distance_l2"], plain["distance_l2"])
    assert not np.array_equal(run(separator=" and").data["distance_l2"], plain["distance_l2"])
    assert not np.array_equal(run(draws=1).data["distance_l2"], plain["distance_l2"])
    longer = run(rollout=40)
    assert "rollout" not in longer.data
    assert "sequences of 40 tokens" in longer.headline()
    frequent = run(tokens=(), separator="zebra").headline()
    assert "separates" in frequent


def test_refusals_say_what_to_do(store, tiny):
    def run(**more):
        return OverSquashing(**{**SHORT, **more}).run(store, model=tiny)

    assert "'Qx' is no single token" in refused(RequestError, lambda: run(tokens=("Qx", " day")))
    assert "name two or more" in refused(RequestError, lambda: run(tokens=(" day",)))
    for setting in ({"kinds": ("odd",)}, {"dtypes": ()}, {"longest": 3}, {"draws": 0}, {"rollout": 1}):
        refused(RequestError, lambda setting=setting: OverSquashing(**setting))
