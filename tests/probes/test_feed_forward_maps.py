"""Feed-forward maps: integrated gradients of METHODS2 5, completeness on tiny models, planted blocks, every setting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from granite_example import granite_of
from refusals import refused
from scipy.stats import spearmanr
from transformers import Olmo2Config, Olmo2ForCausalLM

import workbench as wb
from workbench.analysis.feed_forward import (
    Affine,
    BlockParts,
    FrozenNorm,
    block_parts,
    contributions,
    elementwise_parts,
    gated_parts,
    slope,
)
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import FeedForwardMaps
from workbench.probes.feed_forward_maps import spearman
from workbench.testing import ProbeContract

gelu, silu = torch.nn.functional.gelu, torch.nn.functional.silu
SITES = ["pattern", "v", "resid_pre.0", "resid_post"]
SHORT = {"length": 11, "first": 4, "row_limit": 2, "resamples": 20}


@pytest.fixture(scope="module")
def tiny(tiny_models):
    return Model(tiny_models["llama"], None, "tiny-llama")


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return record(tiny, tmp_path_factory.mktemp("maps") / "x.acts")


def record(model, path):
    ids = np.random.default_rng(0).integers(5, 300, (3, 14)).tolist()
    return wb.record(model, ids, sites=SITES, out=path, dtype="float32", show_progress=False)


class TestContract(ProbeContract):
    probe = FeedForwardMaps
    settings = SHORT

    @pytest.fixture
    def store(self, store):
        return store

    @pytest.fixture
    def model(self, tiny):
        return tiny


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_integrated_gradients_of_activations():
    parts_of_one = elementwise_parts(gelu, column(2, -1))[:, 0].tolist()
    assert parts_of_one == pytest.approx([1.682689, -0.841345], abs=5e-7)
    assert sum(parts_of_one) == pytest.approx(float(gelu(torch.tensor(1.0, dtype=torch.float64))))
    parts_of_one = gated_parts(silu, column(2, -1), column(1, 1))[:, 0].tolist()
    assert parts_of_one == pytest.approx([1.935906, -0.473789], abs=5e-7)
    assert sum(parts_of_one) == pytest.approx(1.462117, abs=5e-7)
    opposite = elementwise_parts(gelu, column(2, -2))[:, 0].tolist()  # s = 0: u phi'(0)
    assert opposite == pytest.approx([1.0, -1.0])
    assert float(slope(silu, column(0.0))) == pytest.approx(0.5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "granite", "olmo2"])
def test_contributions_add_up_to_what_the_model_computes(tiny_models, family, tmp_path):
    """Biases, layer norms, gates, shared values, norms behind both parts, multipliers of the residual stream."""
    module = tiny_models["llama" if family in ("granite", "olmo2") else family]
    if family == "granite":
        module = granite_of(module)
    elif family == "olmo2":
        module = Olmo2ForCausalLM(Olmo2Config(**{**module.config.to_dict(), "architectures": None})).eval()
    model = Model(module, None, family)
    result = FeedForwardMaps(**SHORT).run(record(model, tmp_path / "x"), model=model)
    assert result.data.sizes["layer"] == 3
    assert float(result.data["completeness_error"].max()) < 1e-5


D, N, M = 4, 6, 8
DRAW = np.random.default_rng(0)


def random(*shape):
    return torch.tensor(DRAW.normal(size=shape))


def parts(**more):
    none = FrozenNorm("none", 0.0, torch.ones(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64))
    out = Affine(random(M, D), random(D))
    block = BlockParts(
        Affine(random(4, D), random(D)), None, none, Affine(random(D, M), random(M)), None, out, None, gelu
    )
    return replace(block, **more)


def inputs():
    pattern = torch.tensor(np.tril(DRAW.random((N, 2, N)).transpose(1, 0, 2))).permute(1, 0, 2)
    return random(N, D), pattern / pattern.sum(-1, keepdim=True), random(N, 1, 2)


def test_a_part_that_writes_nothing_changes_no_map():
    zero = Affine(torch.zeros(M, D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64))
    maps = contributions(parts(out=zero), *inputs())
    assert not maps.feed_forward.any()
    np.testing.assert_array_equal(maps.attention, maps.block)


def test_a_linear_part_is_its_matrix():
    block, (x, pattern, values) = parts(activation=lambda u: u), inputs()
    maps = contributions(block, x, pattern, values)
    heads = block.attend.weight.reshape(2, 2, D).numpy()
    for i in range(N):
        for j in range(N):
            r = sum(float(pattern[i, h, j]) * values[j, 0].numpy() @ heads[h] for h in range(2))
            r = r + (x[i].numpy() if i == j else 0)
            assert maps.attention[i, j] == pytest.approx(np.linalg.norm(r))
            written = r @ (block.gate.weight @ block.out.weight).numpy()
            assert maps.feed_forward[i, j] == pytest.approx(np.linalg.norm(written))
            assert maps.block[i, j] == pytest.approx(np.linalg.norm(r + written))


def test_attention_to_itself_gives_a_diagonal_map():
    x, _, values = inputs()
    identity = torch.eye(N, dtype=torch.float64)[:, None].repeat(1, 2, 1)
    maps = contributions(parts(), x, identity, values)
    for part in (maps.attention, maps.feed_forward, maps.block):
        square = part[:, :N]
        assert (np.diag(square) > 0).all()
        assert not (square - np.diag(np.diag(square))).any()


def test_rows_at_a_time_do_not_matter(monkeypatch):
    from workbench.analysis import feed_forward

    block, arguments = parts(), inputs()
    whole = contributions(block, *arguments)
    monkeypatch.setattr(feed_forward, "_BLOCK_BYTES", 1)
    again = contributions(block, *arguments)
    np.testing.assert_allclose(again.block, whole.block, rtol=1e-12)


def test_changes_are_spearmans_over_rows(store, tiny):
    a, b = DRAW.normal(size=(2, 20)).round(1)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert np.isnan(spearman(a, 0 * b))
    data = FeedForwardMaps(**{**SHORT, "row_limit": 1}).run(store, model=tiny).data
    for layer in range(3):
        maps = data["map"].sel(layer=layer).to_numpy()
        for stage, name in ((1, "change_ff"), (2, "change_ff_residual")):
            rows = [1 - spearmanr(maps[0, i, : i + 1], maps[stage, i, : i + 1]).statistic for i in range(4, 11)]
            assert float(data[name].sel(layer=layer)) == pytest.approx(np.mean(rows), abs=1e-6)
    assert abs(float(data["change_shuffled"].mean()) - 1) < 0.4


def test_settings_matter(store, tiny):
    def run(**more):
        return FeedForwardMaps(**{**SHORT, **more}).run(store, model=tiny).data

    plain = run()
    assert int(plain["sequences"]) == 2
    assert int(run(row_limit=9)["sequences"]) == 3
    assert int(run(where="document = 1")["sequences"]) == 1
    assert run(layers=(-1,))["layer"].values.tolist() == [2]
    assert run(length=12).sizes["key"] == 12
    assert not np.array_equal(run(first=6)["change_ff"], plain["change_ff"])
    assert not np.array_equal(run(seed=1)["change_shuffled"], plain["change_shuffled"])


def test_refusals_say_what_to_do(store, tiny, tiny_models, tiny_stores):
    assert "miss what was recorded" in refused(
        RequestError, lambda: FeedForwardMaps(**{**SHORT, "tolerance": 1e-12}).run(store, model=tiny)
    )
    assert "pattern" in refused(RequestError, lambda: FeedForwardMaps(**SHORT).run(tiny_stores["llama"], model=tiny))
    parallel = Model(tiny_models["gpt_neox"], None, "parallel")
    assert "no block with one feed-forward part after attention" in refused(RequestError, lambda: block_parts(parallel))
    for setting in ({"length": 8}, {"first": 1}, {"row_limit": 0}, {"tolerance": 0.0}):
        refused(RequestError, lambda setting=setting: FeedForwardMaps(**setting))
