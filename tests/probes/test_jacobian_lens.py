"""The Jacobian lens: planted linear networks, brute-force Jacobians of plain Hugging Face, and every setting."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from planted import linear_unembed, planted_store
from refusals import refused
from torch import nn
from warned import warned

import workbench as wb
from workbench.analysis import jacobian
from workbench.analysis.jacobian import affordable_prompts, mean_jacobians
from workbench.analysis.trained_lens import TrainedLens
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import JacobianLens, LogitLens, TunedLens, jacobian_lens
from workbench.testing import ProbeContract

D, VOCAB = 5, 12
SHORT = {"prompts": 2, "length": 10, "skip": 1, "horizons": 3, "top_k": 3}


@pytest.fixture(scope="module")
def tiny(tiny_models, tiny_tokenizer):
    return Model(tiny_models["llama"], tiny_tokenizer, "tiny-llama")


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    ids = np.random.default_rng(0).integers(5, 300, (6, 12)).tolist()
    out = tmp_path_factory.mktemp("jacobian") / "x.acts"
    return wb.record(tiny, ids, sites=["resid_post"], out=out, dtype="float32", show_progress=False)


class TestContract(ProbeContract):
    probe = JacobianLens
    settings = SHORT

    @pytest.fixture
    def store(self, store):
        return store

    @pytest.fixture
    def model(self, tiny):
        return tiny


# Jacobians


def test_planted_linear_blocks_and_uniform_attention(tiny_models):
    """h1 = h0 M1; then every position adds the mean of the visible states times M2: J is known in closed form."""
    module, width, length, skip = copy.deepcopy(tiny_models["gpt2"]), 32, 9, 2
    with torch.no_grad():
        for block in module.transformer.h:
            block.ln_1, block.ln_2, block.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
            for part in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                part.weight.mul_(0.3)
            if block is not module.transformer.h[2]:
                block.attn.c_proj.weight.zero_()
        last = module.transformer.h[2]
        last.attn.c_attn.weight[:, : 2 * width] = 0  # queries and keys: attention is uniform
        last.attn.c_attn.bias[: 2 * width] = 0
        last.mlp.c_proj.weight.zero_()
    ids = [list(range(10, 10 + length)), list(range(30, 30 + length))]
    means = mean_jacobians(Model(module, None, "planted"), ids, skip=skip)
    identity = np.eye(width)
    mlp = module.transformer.h[1].mlp
    first = identity + (mlp.c_fc.weight @ mlp.c_proj.weight).detach().double().numpy()
    attention = (last.attn.c_attn.weight[:, 2 * width :] @ last.attn.c_proj.weight).detach().double().numpy()
    places = range(skip, length - 1)
    share = np.mean([sum(1 / (query + 1) for query in places if query >= key) for key in places])
    second = identity + share * attention
    assert means.layers == (0, 1)
    np.testing.assert_allclose(means.jacobian[1], second.T, atol=1e-5)
    np.testing.assert_allclose(means.jacobian[0], (first @ second).T, atol=1e-5)
    np.testing.assert_allclose(means.split_half, 1, atol=1e-6)  # a linear network has one Jacobian


def brute_force(module, ids, layer, skip):
    """The definition, by torch's own full Jacobian of the blocks after `layer` of plain Hugging Face."""
    body, ids = module.model, torch.tensor([ids])
    with torch.no_grad():
        state = body(ids, output_hidden_states=True).hidden_states[layer + 1]
    place = torch.arange(ids.shape[1])[None]

    def rest(h):
        for block in body.layers[layer + 1 :]:
            h = block(h, position_embeddings=body.rotary_emb(h, place), attention_mask=None, position_ids=place)
            h = h[0] if isinstance(h, tuple) else h
        return h

    full = torch.autograd.functional.jacobian(rest, state, vectorize=True)[
        0, :, :, 0
    ]  # [target, dimension, source, dimension]
    counted = range(skip, ids.shape[1] - 1)
    parts = [sum(full[target, :, source] for target in counted if target >= source) for source in counted]
    return torch.stack(parts).mean(0).detach().numpy()


def test_it_is_the_mean_of_full_jacobians(tiny_models):
    skip = 2
    module = copy.deepcopy(tiny_models["llama"])  # transformers leaves hooks in a model asked for hidden states
    prompts = [[5, 9, 40, 41, 7, 8, 300, 12], [100, 20, 33, 6, 5, 4, 90]]
    means = mean_jacobians(Model(module, None, "x"), prompts, skip=skip)
    for layer in (0, 1):
        by_prompt = [brute_force(module, ids, layer, skip) for ids in prompts]
        np.testing.assert_allclose(means.jacobian[layer], np.mean(by_prompt, 0), atol=2e-5)
        halves = [(part - np.eye(32)).ravel() for part in by_prompt]
        cosine = halves[0] @ halves[1] / np.linalg.norm(halves[0]) / np.linalg.norm(halves[1])
        assert means.split_half[layer] == pytest.approx(cosine, abs=1e-4)
    assert all(part.requires_grad for part in module.parameters())


def test_one_prompt_has_no_halves_and_batches_do_not_matter(tiny, monkeypatch):
    ids = [[5, 9, 40, 41, 7, 8]]
    whole = mean_jacobians(tiny, ids, skip=1)
    assert np.isnan(whole.split_half).all()
    monkeypatch.setattr(jacobian, "_TOKENS", 30)  # 5 dimensions at a time, the last time 2
    torch.testing.assert_close(mean_jacobians(tiny, ids, skip=1).jacobian, whole.jacobian, atol=1e-6, rtol=1e-5)
    assert affordable_prompts(tiny, 128) == 100
    monkeypatch.setattr(jacobian, "_CPU_WORK", 1.0)
    assert affordable_prompts(tiny, 128) == 1


def test_a_model_of_one_block_has_no_jacobian(tiny):
    module = copy.deepcopy(tiny.module)
    del module.model.layers[1:]
    module.config.num_hidden_layers = 1
    message = refused(RequestError, lambda: mean_jacobians(Model(module, tiny.tokenizer, "one"), [[5, 9, 40]], skip=0))
    assert message == "model 'one' has one block; a Jacobian lens leads from earlier blocks to the last one"


# Readings


def by_hand(weight, store, documents=(), fingerprint=None, **more):
    record = store.manifest.model
    layers, size = weight.shape[:2]
    made_of = {"method": "jacobian lens", "documents": list(documents), "prompts": 4, "split_half": [0.9] * layers}
    made_of |= {"store_fingerprint": fingerprint or store.manifest.fingerprint, **more}
    shape = (record.name, record.fingerprint, record.n_layers)
    return TrainedLens("resid_post", tuple(range(layers)), weight, torch.zeros(layers, size), *shape, made_of)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A store whose last states are J h of block 0, and the lens with that J; the logit lens is wrong."""
    draw = np.random.default_rng(1)
    jacobian, first = draw.normal(size=(D, D)), draw.normal(size=(120, D))
    sites = {"resid_post.0": first, "resid_post.1": first @ jacobian.T}
    ids = draw.integers(0, VOCAB, (12, 10)).tolist()
    path = tmp_path_factory.mktemp("planted") / "x.acts"
    store = planted_store(path, ids, sites, linear_unembed(draw.normal(size=(VOCAB, D))))
    return store, by_hand(torch.tensor(jacobian - np.eye(D), dtype=torch.float32)[None], store), jacobian


def test_a_planted_map_is_undone(planted):
    store, lens, jacobian = planted
    data = JacobianLens().read(lens, store).data
    assert float(data["mean_kl"][0]) < 1e-5
    plain = LogitLens().run(store).data
    assert float(data["logit_mean_kl"][0]) == pytest.approx(float(plain["mean_kl"][0]))
    assert float(data["logit_mean_kl"][0]) > 0.5
    assert float(data["identity"][0]) == pytest.approx(np.trace(jacobian) / np.linalg.norm(jacobian) / D**0.5)
    assert float(data["identity"][1]) == 1
    np.testing.assert_allclose(data["split_half"], [0.9, np.nan])
    assert int(data["prompts"]) == 4


def test_recall_counts_later_tokens_in_the_top(planted):
    store, lens, _ = planted
    result = JacobianLens(top_k=2, horizons=3).read(lens, store)
    table, plain = result.table, LogitLens(top_k=2).run(store).table
    ids = store.tokens["token_id"].to_numpy().reshape(12, 10)
    for name, lines in (("recall", table), ("logit_recall", plain)):
        for layer in (0, 1):
            top = lines.loc[lines["layer"] == layer, ["top_token_1", "top_token_2"]].to_numpy().reshape(12, 10, 2)
            for horizon in (1, 2, 3):
                hits = [
                    f"[{ids[text, at + horizon]}]" in top[text, at] for text in range(12) for at in range(10 - horizon)
                ]
                assert float(result.data[name].sel(layer=layer, horizon=horizon)) == pytest.approx(np.mean(hits))
    shuffled = result.data["recall_shuffled"].to_numpy()
    assert np.abs(shuffled - 2 / VOCAB).max() < 0.1  # uniform tokens
    assert JacobianLens(top_k=2, horizons=3, seed=1).read(lens, store).data["recall_shuffled"].to_numpy().tolist() != (
        shuffled.tolist()
    )


def test_directions_are_rows_of_the_unembedding_times_the_jacobian(planted):
    store, lens, jacobian = planted

    from workbench.model.unembed import load_unembed

    weight = load_unembed(store.path).weight.double().numpy()
    direction = lens.direction(store, 3, 0)
    np.testing.assert_allclose(direction.vector, weight[3] @ jacobian, atol=1e-5)
    assert (direction.site, direction.made_of["token_id"]) == ("resid_post.0", 3)
    np.testing.assert_allclose(lens.direction(store, 3, -1).vector, weight[3], atol=1e-6)
    assert "no single token" in refused(RequestError, lambda: lens.direction(store, "Monday", 0))


def test_settings_choose_what_is_read(planted):
    store, lens, _ = planted
    assert int(lens.read(store, where="document < 3").data["rows"]) == 30
    reading = lens.read(store, row_limit=25)
    assert int(reading.data["rows"]) == 20  # whole sequences
    assert "20 of 120 tokens read" in reading.headline()
    assert int(lens.read(store, row_limit=4).data["rows"]) == 4
    assert lens.read(store, detail=15).data.sizes["row"] == 15
    assert lens.read(store, layers=(0,)).data["layer"].values.tolist() == [0]
    fitted = by_hand(lens.weight, store, documents=range(11))
    assert JacobianLens().read(fitted, store, fitted=False).table["document"].unique().tolist() == [11]
    all_documents = by_hand(lens.weight, store, documents=range(12))
    assert "there are no others" in JacobianLens().read(all_documents, store, fitted=False).headline()
    few = by_hand(lens.weight, store, split_half=[0.3])
    assert "differ (least cosine 0.30): fit more prompts" in few.read(store).headline()
    of_one_prompt = by_hand(lens.weight, store, split_half=[None], prompts=1)
    assert "J is of 1 prompt: how well it is determined is unknown" in of_one_prompt.read(store).headline()


# Fitting


def test_a_lens_is_fitted_once_and_kept_in_the_store(store, tiny, monkeypatch, tmp_path):
    probe = JacobianLens(**{**SHORT, "seed": 3})
    fitted = probe.fit(store, model=tiny)
    first = probe.run(store, model=tiny)
    monkeypatch.setattr(jacobian_lens, "mean_jacobians", None)  # would fail
    again = JacobianLens(**{**SHORT, "seed": 3, "top_k": 2}).run(store)
    np.testing.assert_array_equal(again.data["kl"], first.data["kl"])
    np.testing.assert_array_equal(fitted.read(store, **SHORT).data["kl"].sel(row=first.data["row"]), first.data["kl"])
    assert not set(fitted.made_of["documents"]) & set(first.table["document"])
    assert len(fitted.made_of["documents"]) == fitted.made_of["prompts"] == 2
    assert fitted.made_of["tokens"] == 20
    wb.pack(store, tmp_path / "copy")
    JacobianLens(**{**SHORT, "seed": 3}).run(wb.open_store(tmp_path / "copy"))
    monkeypatch.undo()
    named = JacobianLens(**SHORT, lens=str(tmp_path / "lens"), device="cpu")
    result = named.run(store, model=tiny)
    assert wb.load_lens(tmp_path / "lens").made_of["method"] == "jacobian lens"
    np.testing.assert_array_equal(named.run(store).data["kl"], result.data["kl"])


def test_every_setting_of_the_fit_counts(store, tiny):
    def lens(**more):
        return JacobianLens(**{**SHORT, **more}).fit(store, model=tiny)

    plain = lens()
    for more in ({"prompts": 1}, {"length": 6}, {"skip": 3}, {"seed": 5}, {"where": "document > 3"}):
        assert not torch.equal(lens(**more).weight, plain.weight), more
    assert set(lens(where="document > 3", prompts=9).made_of["documents"]) < {4, 5}


def test_refusals_say_what_to_do(store, tiny, planted, tmp_path):
    assert "no selected sequence has 18 tokens, of which the first 16 are skipped" in refused(
        RequestError, lambda: JacobianLens().fit(store, model=tiny)
    )
    tuned = TunedLens(epochs=1).fit(planted[0]).save(tmp_path / "tuned")
    assert "is no Jacobian lens" in refused(RequestError, lambda: JacobianLens(lens=str(tuned)).run(planted[0]))
    for setting in ({"length": 10, "skip": 10}, {"prompts": 0}, {"site": "resid_pre"}, {"horizons": 0}):
        refused(RequestError, lambda setting=setting: JacobianLens(**setting))


def test_a_store_that_cannot_be_written_keeps_no_lens(store, tiny, monkeypatch):
    def full(self, folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(TrainedLens, "save", full)
    with warned("the lens is not kept"):
        JacobianLens(**{**SHORT, "seed": 9}).run(store, model=tiny)
    assert "cannot be written: Permission denied" in refused(
        RequestError, lambda: JacobianLens(**SHORT, lens="elsewhere").run(store, model=tiny)
    )
