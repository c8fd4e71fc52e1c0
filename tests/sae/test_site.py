"""Arrays that an autoencoder reads: other names, a head, a norm, several sites; against float64 NumPy."""

import numpy as np
import pytest
import torch
from formats_example import D_IN, D_SAE, B, C, T, V, W, assert_close, features, jump, relu, tensors, text
from refusals import refused
from sae_example import encode64, save_sae
from several_sites import MIDS, Z, part_of, stream_store
from warned import warned

import workbench as wb
from workbench.io.errors import RequestError
from workbench.sae.load import load_sae
from workbench.sae.metrics import sae_metrics
from workbench.sae.site import matching_site

LAYER = {"W_enc": W.T, "b_enc": B, "W_dec": V, "b_dec": C, "activation_function.threshold": T}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stream_store(tmp_path_factory.mktemp("stores") / "x.acts")


def transcoder(folder, hook):
    tensors(folder / "layer_1.safetensors", LAYER)
    text(folder / "config.yaml", f"model_name: demo\nfeature_input_hook: {hook}\n")
    return load_sae(folder, "layer_1", device="cpu")


def test_hook_mlp_in_is_the_input_of_the_mlp(store, tmp_path):
    array = matching_site(store, transcoder(tmp_path / "x", "hook_mlp_in"))
    assert array.name == "blocks.1.mlp.hook_in"
    sae = transcoder(tmp_path / "y", "mlp.hook_in")
    assert matching_site(store, sae).name == array.name


def test_hook_normalized_is_the_rms_norm_of_the_stream_without_weights(store, tmp_path):
    sae = transcoder(tmp_path, "ln2.hook_normalized")
    array = matching_site(store, sae)
    x = store[MIDS[1].name][:].double().numpy()
    normed = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5)
    assert_close(array[:].numpy(), normed, 1e-5)
    assert_close(array[[3, 1]].numpy(), normed[[3, 1]], 1e-5)
    assert (array.name, array.dtype, array.shape) == ("blocks.1.ln2.hook_normalized", torch.float32, x.shape)
    assert_close(features(sae, array[:].numpy()), jump(normed @ W + B, T))
    assert "made of recorded arrays" in refused(RequestError, lambda: array.view(0))
    message = refused(RequestError, lambda: matching_site(store, sae, "resid_mid.1"))
    assert "was trained on blocks.1.ln2.hook_normalized, but site is blocks.1.hook_resid_mid; leave" in message


def test_hook_normalized_times_the_weights_is_what_the_mlp_of_a_model_reads(tmp_path):
    """Against Hugging Face's module: its norm multiplies what it normalised by its weights."""
    demo_model = wb.load_model("demo")
    sites = ["resid_mid.1", "blocks.1.mlp.hook_in"]
    store = wb.record(demo_model, ["Once upon a time"], sites=sites, out=tmp_path / "x.acts", show_progress=False)
    folder = save_sae(tmp_path / "sae", d_in=store["resid_mid.1"].shape[1], hook_name="blocks.1.ln2.hook_normalized")
    array = matching_site(store, load_sae(folder, device="cpu"))
    weight = demo_model.module.get_submodule("model.layers.1.post_attention_layernorm").weight.detach()
    # stored in 16 bits
    assert_close((array[:] * weight).numpy(), store["blocks.1.mlp.hook_in"][:].float().numpy(), 2e-3)


@pytest.mark.parametrize("folded", [True, False, None])
def test_hook_normalized_of_a_layer_norm_needs_to_know_whether_weights_were_folded(folded, tmp_path):
    store = stream_store(tmp_path / "x.acts", norm="layer")
    loading = {} if folded is None else {"model_from_pretrained_kwargs": {"fold_ln": folded}}
    folder = save_sae(tmp_path / "sae", d_in=D_IN, hook_name="blocks.1.ln2.hook_normalized", **loading)
    sae = load_sae(folder, device="cpu")
    if folded is None:
        message = refused(RequestError, lambda: matching_site(store, sae))
        assert "has LayerNorms, and the SAE's files do not record fold_ln" in message
        return
    x = store[MIDS[1].name][:].double().numpy()
    centred = x - x.mean(1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    expected = normed if folded else store["blocks.1.ln2.hook_out"][:].numpy()
    array = matching_site(store, sae)
    assert_close(array[:].numpy(), expected, 1e-5)
    assert array.name == "blocks.1.ln2.hook_normalized"


def test_an_sae_of_one_head_reads_that_head(store, tmp_path):
    d_head = Z.shape[1]
    folders = [
        save_sae(tmp_path / str(head), d_in=d_head, hook_name=Z.name, hook_head_index=head, model_name="demo")
        for head in range(2)
    ]
    saes = [load_sae(folder, device="cpu") for folder in folders]
    for head, sae in enumerate(saes):
        array = matching_site(store, sae)
        rows = store[Z.name][:][:, head].float()
        assert torch.equal(array[:].float(), rows)
        assert_close(features(sae, array[:].float().numpy()), encode64(folders[head], rows.numpy()))
    assert saes[0].fingerprint() != saes[1].fingerprint()  # the same weights, another head
    beyond = load_sae(save_sae(tmp_path / "9", d_in=d_head, hook_name=Z.name, hook_head_index=9), device="cpu")
    assert refused(RequestError, lambda: matching_site(store, beyond)) == (
        f"head 9 of {Z.short} does not exist: a row has the axes head 2, d_head {d_head}"
    )
    assert refused(RequestError, lambda: matching_site(store, saes[0], "resid_mid.1")).startswith(
        "head 0 of resid_mid.1 does not exist"
    )


def cross_layer(folder, layers=(0, 1), hook="hook_resid_mid", **more):
    for layer in layers:
        weights = part_of(layer)
        tensors(folder / f"W_enc_{layer}.safetensors", {f"{name}_{layer}": part for name, part in weights.items()})
        tensors(folder / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": np.zeros((2, 2))})
    text(folder / "config.yaml", f"model_name: demo\nmodel_kind: cross_layer_transcoder\nfeature_input_hook: {hook}\n")
    return load_sae(folder, device="cpu", **more)


def test_a_cross_layer_transcoder_reads_a_site_of_each_layer(store, tmp_path):
    sae = cross_layer(tmp_path / "clt")
    array = matching_site(store, sae)
    x = torch.stack([store[site.name][:].float() for site in MIDS], 1)
    assert torch.equal(array[:].float(), x)
    assert (array.name, array.axes, sae.name) == ("blocks.0-1.hook_resid_mid", ("row", "site", "d_model"), "clt")
    expected = [
        jump(x[:, layer].double().numpy() @ part_of(layer)["W_enc"].T + part_of(layer)["b_enc"], T) for layer in (0, 1)
    ]
    assert_close(features(sae, array[:].float().numpy()), np.concatenate(expected, 1))
    assert (sae.d_sae, sae.n_sites, sae.architecture) == (2 * D_SAE, 2, "cross_layer_transcoder")
    assert repr(sae) == "Sae('clt', cross_layer_transcoder, 16 -> 60, blocks.0-1.hook_resid_mid, cpu)"
    layer_1 = load_sae(tmp_path / "clt", "W_enc_1", device="cpu")
    assert_close(features(layer_1, x[:, 1].numpy()), expected[1])
    assert sae.parts[1].fingerprint() == layer_1.fingerprint()


def test_a_layer_that_is_missing_between_others_is_named(tmp_path):
    """The ids of all later features would be those of other features in the whole set."""
    for layer in (2, 3, 6):
        tensors(tmp_path / "set" / f"layer_{layer}.safetensors", LAYER)
    with warned("SAE 'set' has no file of layer 4, 5; the ids of its features count the layers that are there"):
        assert load_sae(tmp_path / "set", device="cpu").d_sae == 3 * D_SAE


def test_what_layers_of_several_sites_cannot_do_is_refused(store, tmp_path):
    for layer in (0, 1):
        tensors(tmp_path / "set" / f"layer_{layer}.safetensors", LAYER)
    text(tmp_path / "set" / "config.yaml", "model_name: demo\nfeature_input_hook: hook_resid_mid\n")
    sae = load_sae(tmp_path / "set", device="cpu")
    made = wb.extract_features(store, sae, out=tmp_path / "features", show_progress=False)
    message = "SAE 'set' reads several sites of a row; extract the features of one layer"
    assert refused(RequestError, lambda: wb.feature_contributions(made, sae, 0)) == message
    message = (
        "SAE 'set' is a transcoder: it reads one site, writes another, so its features cannot be changed at one row"
    )
    assert refused(RequestError, lambda: wb.feature_effect(made, sae, 0)) == message


def test_layers_in_another_order_are_named(store, tmp_path):
    sae = cross_layer(tmp_path / "clt")
    assert refused(RequestError, lambda: matching_site(store, sae, "resid_mid.0")) == (
        "site: SAE 'clt' reads 2 sites at once; give as many, not 1"
    )
    message = refused(RequestError, lambda: matching_site(store, sae, ["resid_mid.1", "resid_mid.0"]))
    assert message.startswith("SAE 'clt' was trained on blocks.0.hook_resid_mid, but site is blocks.1.hook_resid_mid")
    array = matching_site(store, sae, "resid_mid.1, resid_mid.0", force=True)
    assert array.name == "blocks.1_0.hook_resid_mid"
    assert torch.equal(array[2:4][:, 0], store[MIDS[1].name][2:4])


def test_gemma_scope_2_crosscoders_have_features_of_each_layer(store, tmp_path):
    folder = tmp_path / "gemma-scope-2-1b-pt" / "crosscoder" / "layer_1_7_width_65k_l0_medium"
    for index in (0, 1):
        weights = part_of(index)
        stored = {"w_enc": weights["W_enc"].T, "b_enc": weights["b_enc"], "threshold": weights["threshold"]}
        stored |= {"w_dec": np.zeros((D_SAE, 2, D_IN)), "b_dec": C}
        tensors(folder / f"params_layer_{index}.safetensors", stored)
    sae = load_sae(folder, device="cpu")
    assert sae.sites == ("blocks.1.hook_resid_post", "blocks.7.hook_resid_post")
    x = np.random.default_rng(0).normal(size=(20, 2, D_IN)).astype(np.float32)
    expected = [jump(x[:, layer] @ part_of(layer)["W_enc"].T + part_of(layer)["b_enc"], T) for layer in (0, 1)]
    assert_close(features(sae, x), np.concatenate(expected, 1))


def test_a_crosscoder_reads_its_sites_together(store, tmp_path):
    W2, V2 = np.random.default_rng(5).normal(size=(2, 2, D_IN, D_SAE))
    weights = {"encoder.weight": W2, "encoder.bias": B, "decoder.weight": V2.transpose(0, 2, 1)}
    weights["decoder.bias"] = np.stack([C, -C])
    tensors(tmp_path / "x" / "ae.safetensors", weights)
    text(tmp_path / "x" / "config.json", {"trainer": {"dict_class": "CrossCoder", "dict_size": D_SAE}})
    sae = load_sae(tmp_path / "x", device="cpu")
    assert refused(RequestError, lambda: matching_site(store, sae)) == (
        "site: the files of SAE 'x' do not record its site; give site=, a list of 2 names"
    )
    array = matching_site(store, sae, ["resid_mid.0", "resid_mid.1"])
    x = array[:].double().numpy()
    latents = relu(np.einsum("rld,ldf->rf", x, W2) + B)
    assert_close(features(sae, array[:].float().numpy()), latents)
    decoded = sae.decode(torch.from_numpy(np.float32(latents))).numpy().reshape(-1, 2, D_IN)
    assert_close(decoded, np.einsum("rf,ldf->rld", latents, V2) + np.stack([C, -C]), 1e-3)
    metrics = sae_metrics(store, sae, ["resid_mid.0", "resid_mid.1"], rows="position > 2")
    x, latents = (part[store.where("position > 2").ids] for part in (x.reshape(len(x), -1), latents))
    error = x - (latents @ V2.transpose(2, 0, 1).reshape(D_SAE, -1) + np.concatenate([C, -C]))
    explained = 1 - (error**2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert metrics.explained_variance == pytest.approx(explained, rel=1e-4)
    assert refused(RequestError, lambda: matching_site(store, sae, ["resid_mid.0", "z.1"], force=True)).endswith(
        "cannot be read side by side: their rows have other shapes"
    )
