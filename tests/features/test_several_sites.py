"""Features of several sites of a row in one folder, and of one head; against float64 NumPy."""

import json
import pickle

import numpy as np
import pytest
import torch
from features_example import extracted
from formats_example import D_IN, D_SAE, T, assert_close, jump, tensors, text
from refusals import refused
from sae_example import encode64, save_sae
from several_sites import MIDS, Z, part_of, stream_store
from warned import warned

import workbench.features.encoding as encoding
from workbench.features.feature_store import open_features
from workbench.features.queries import feature_statistics
from workbench.features.verify_folder import verify
from workbench.io.errors import RequestError
from workbench.sae.input_rows import pack
from workbench.sae.load import load_sae
from workbench.sae.metrics import sae_metrics
from workbench.sae.saved import save_sae as save_autoencoder
from workbench.sae.site import matching_site
from workbench.sae.sparsity import FeatureChoice, MutualChoice, TopK


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stream_store(tmp_path_factory.mktemp("stores") / "x.acts")


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saes") / "clt"
    for layer in (0, 1):
        weights = {f"{name}_{layer}": part for name, part in part_of(layer).items()}
        tensors(folder / f"W_enc_{layer}.safetensors", weights)
    text(folder / "config.yaml", "model_name: demo\nfeature_input_hook: hook_resid_mid\n")
    return load_sae(folder, device="cpu")


def pre_activations(store) -> np.ndarray:
    x = [store[site.name][:].double().numpy() for site in MIDS]
    return np.concatenate([x[i] @ part_of(i)["W_enc"].T + part_of(i)["b_enc"] for i in (0, 1)], 1)


@pytest.fixture(scope="module")
def features(store, sae, tmp_path_factory):
    return extracted(store, sae, out=tmp_path_factory.mktemp("features") / "clt")


def test_features_of_all_layers_have_one_numbering(store, features):
    expected = jump(pre_activations(store), np.tile(T, 2))
    assert_close(features[:].toarray(), expected)
    assert features.record.site == "blocks.0-1.hook_resid_mid"
    assert features.sites.to_dict("list") == {
        "site": ["blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"],
        "layer": [0, 1],
        "first": [0, D_SAE],
        "stop": [D_SAE, 2 * D_SAE],
    }
    assert features.sites_of(D_SAE) == ("blocks.1.hook_resid_mid",)
    assert refused(RequestError, lambda: features.sites_of(2 * D_SAE)).endswith("the SAE has features 0 to 59")
    rows, values = features.rows_of(D_SAE + 3)
    assert list(rows) == list(np.argsort(-expected[:, D_SAE + 3], kind="stable")[: len(rows)])
    assert_close(values, expected[rows, D_SAE + 3])
    assert len(features.top(D_SAE + 3, k=2, where="position > 0")) == 2
    assert list(feature_statistics(features)["active"]) == list((expected > 0).sum(0))
    assert not (verify(features.path)["severity"] == "error").any()
    assert open_features(features.path).sites.equals(features.sites)


def test_an_interrupted_extraction_of_layers_ends_in_the_same_bytes(store, sae, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "SEGMENT_ROWS", 5)  # of both: products of other rows may have other last bits
    whole = extracted(store, sae, out=tmp_path / "whole" / "clt")
    write = encoding.SegmentFolder.write
    written = []

    def fails_at_third(self, span, segment):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(span)
        write(self, span, segment)

    with monkeypatch.context() as patch:
        patch.setattr(encoding.SegmentFolder, "write", fails_at_third)
        with pytest.raises(KeyboardInterrupt):
            extracted(store, sae, out=tmp_path / "clt")
    resumed = extracted(store, sae, out=tmp_path / "clt")
    for name in ("by_row.safetensors", "by_feature.safetensors"):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert extracted(store, sae, out=tmp_path / "clt").path == resumed.path
    layer_sae = sae.parts[1]
    assert "exist and differ: SAE is clt (" in refused(
        RequestError, lambda: extracted(store, layer_sae, out=tmp_path / "clt")
    )


def test_rules_over_all_rows_choose_among_the_features_of_all_layers(store, sae, tmp_path):
    pre = np.maximum(pre_activations(store), 0)
    mutual = extracted(store, sae, out=tmp_path / "mutual", sparsity=MutualChoice(3))[:].toarray()
    threshold = np.sort(pre.ravel())[-3 * len(pre)]
    assert_close(mutual, np.where(pre >= threshold, pre, 0))
    by_feature = extracted(store, sae, out=tmp_path / "feature", sparsity=FeatureChoice(4))[:].toarray()
    assert ((by_feature > 0).sum(0) <= 4 * len(pre) // pre.shape[1]).all()
    assert refused(RequestError, lambda: extracted(store, sae, out=tmp_path / "k", sparsity=TopK(3))).endswith(
        "and TopK would choose among all; use MutualChoice or FeatureChoice"
    )


def test_what_several_layers_cannot_do_is_refused(store, sae, features):
    from workbench.features.promoted import promoted_tokens

    assert refused(RequestError, lambda: sae_metrics(store, sae)).startswith("SAE 'clt' is a cross_layer_transcoder")
    assert refused(RequestError, lambda: promoted_tokens(features, sae, 3)).endswith("its decoders are not read")
    assert refused(RequestError, lambda: sae.decode(torch.zeros(1, sae.d_sae))).endswith("sites; decode one layer")


def test_a_set_of_transcoders_knows_its_decoders(tmp_path):
    from workbench.sae.decoder import decoder_directions, nearest_features

    decoders = np.random.default_rng(2).normal(size=(2, D_SAE, D_IN)).astype(np.float32)
    for layer in (0, 1):
        weights = {"W_dec": decoders[layer]} | {k: v for k, v in part_of(layer).items() if k != "threshold"}
        tensors(tmp_path / "set" / f"layer_{layer}.safetensors", weights)
    sae = load_sae(tmp_path / "set", device="cpu")
    assert (sae.architecture, sae.sites) == ("layers_of_transcoder", ())
    assert_close(decoder_directions(sae, [3, D_SAE + 3]).numpy(), decoders[:, 3])
    assert_close(decoder_directions(sae).numpy(), decoders.reshape(-1, D_IN))
    unit = decoders.reshape(-1, D_IN) / np.linalg.norm(decoders.reshape(-1, D_IN), axis=1, keepdims=True)
    cosine = unit @ unit[D_SAE + 3]
    cosine[D_SAE + 3] = -2
    assert nearest_features(sae, D_SAE + 3, 1)["feature"][0] == cosine.argmax()
    again = save_autoencoder(sae, tmp_path / "sent").load("cpu")  # as it is sent to other processes
    assert (again.fingerprint(), again.name) == (sae.fingerprint(), sae.name)
    assert [part.name for part in again.parts] == [part.name for part in sae.parts]


def test_arrays_made_of_recorded_ones_are_read_alike_in_another_process(store, sae, tmp_path):
    head = load_sae(save_sae(tmp_path / "x", d_in=4, hook_name=Z.name, hook_head_index=1), device="cpu")
    for encoder in (sae, head):
        array = matching_site(store, encoder)
        again = pickle.loads(pickle.dumps(pack(array))).open()
        assert (again.name, again.shape) == (array.name, array.shape)
        assert torch.equal(again[[5, 2]], array[[5, 2]])


def test_rows_with_fewer_than_k_positive_features_are_counted(store, tmp_path):
    """circuit-tracer's TopK has no ReLU, so it keeps negative activations where fewer than k are positive."""
    for layer, shift in ((0, 0), (1, -1e4)):
        weights = part_of(layer) | {"W_dec": np.zeros((D_SAE, D_IN)), "k": np.array(3)}
        weights["b_enc"] = weights["b_enc"] + shift
        tensors(tmp_path / f"layer_{layer}.safetensors", {k: v for k, v in weights.items() if k != "threshold"})
    text(tmp_path / "config.yaml", "model_name: demo\nfeature_input_hook: hook_resid_mid\nactivation: topk\n")
    with warned(r"^28 of 28 rows have fewer than 3 activations of '.*/blocks.1.hook_resid_mid' above 0; its lib"):
        features = extracted(store, load_sae(tmp_path, device="cpu"), out=tmp_path / "features")
    assert (np.diff(features[:].indptr) <= 3).all()


def test_features_of_one_head(store, tmp_path):
    folder = save_sae(tmp_path / "sae", d_in=4, hook_name=Z.name, hook_head_index=1, model_name="demo")
    features = extracted(store, load_sae(folder, device="cpu"), out=tmp_path / "features")
    assert_close(features[:].toarray(), encode64(folder, store[Z.name][:][:, 1].float().numpy()))
    assert features.record.site == Z.name
    metrics = sae_metrics(store, load_sae(folder, device="cpu"))
    assert 0 < metrics.l0 < 20
    assert metrics.rows == int((~store.tokens["is_special"].to_numpy(zero_copy_only=False)).sum())


def test_features_of_version_1_read_one_site(store, sae, features, tmp_path):
    """Their record has no checksum and does not name the features of each site."""
    record = json.loads((features.path / "features.json").read_text())
    record = {name: value for name, value in record.items() if name not in ("checksum", "reads")} | {"version": 1}
    for file in features.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "features.json").write_text(json.dumps(record))
    assert open_features(tmp_path, store).sites["stop"].tolist() == [2 * D_SAE]
