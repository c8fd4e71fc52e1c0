"""Loading of autoencoders and their metadata, against NumPy."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from refusals import refused
from sae_example import ARCHITECTURES, edit_config, encode64, save_sae, set_weights
from safetensors.numpy import load_file, save_file
from warned import warned

from workbench import embedded
from workbench.io.errors import DataError, RequestError
from workbench.sae.load import load_sae

X = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32) + 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_sae_loads_unchanged(architecture, tmp_path):
    from sae_lens import SAE

    about = {"hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2-small", "context_size": 64}
    folder = save_sae(tmp_path / "one", architecture, dtype="bfloat16", **about)
    sae = load_sae(folder, device="cpu")
    inference = "jumprelu" if architecture == "batchtopk" else architecture
    assert (sae.name, sae.d_in, sae.d_sae, sae.architecture) == ("one", 8, 20, inference)
    assert (sae.site, sae.model_name, sae.context_size) == tuple(about.values())
    assert repr(sae) == f"Sae('one', {inference}, 8 -> 20, blocks.3.hook_resid_post, cpu)"
    assert (sae.module.training, sae.W_dec.dtype, sae.W_dec.shape) == (False, torch.float32, (20, 8))
    plain = SAE.load_from_disk(folder, dtype="float32")
    with torch.no_grad():
        expected = plain.encode(torch.from_numpy(X))
        reconstructed = plain.decode(expected)
    assert torch.equal(sae.encode(torch.from_numpy(X)), expected)
    assert torch.equal(sae.decode(expected), reconstructed)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("standard", {"apply_b_dec_to_input": False}),
        ("standard", {"normalize_activations": "layer_norm"}),
        ("topk", {"k": 5}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
    ],
)
def test_settings_that_change_the_mathematics_are_applied(architecture, settings, tmp_path):
    plain, changed = (save_sae(tmp_path / name, architecture) for name in ("plain", "changed"))
    edit_config(changed, **settings)
    sae = load_sae(changed, device="cpu")
    encoded = sae.encode(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(encoded, encode64(changed, X), rtol=1e-4, atol=1e-4)
    assert not np.allclose(encoded, encode64(plain, X), atol=1e-2)
    assert sae.fingerprint() != load_sae(plain, device="cpu").fingerprint()


def test_layer_norm_is_undone_by_decode(tmp_path):
    sae = load_sae(save_sae(tmp_path / "one", normalize_activations="layer_norm"), device="cpu")
    weights = load_file(tmp_path / "one" / "sae_weights.safetensors")
    decoded = sae.decode(sae.encode(torch.from_numpy(X))).numpy()
    spread = X.std(1, ddof=1, keepdims=True)
    expected = (encode64(tmp_path / "one", X) @ weights["W_dec"] + weights["b_dec"]) * spread + X.mean(1, keepdims=True)
    np.testing.assert_allclose(decoded, expected, rtol=1e-4, atol=1e-3)


def test_heads_and_reconstructions_are_flattened(tmp_path):
    folder = save_sae(tmp_path / "one", reshape_activations="hook_z", hook_name="blocks.0.attn.hook_z")
    sae = load_sae(folder, device="cpu")
    heads = torch.from_numpy(X).reshape(30, 2, 4)
    np.testing.assert_allclose(sae.encode(heads).numpy(), encode64(folder, X), rtol=1e-4, atol=1e-4)
    assert torch.equal(sae.encode(heads), sae.encode(torch.from_numpy(X)))
    assert sae.decode(sae.encode(heads)).shape == (30, 8)
    assert torch.equal(sae.encode(heads.half()), sae.encode(heads.half().float()))


def test_metadata_missing_from_the_files_is_none(tmp_path):
    sae = load_sae(save_sae(tmp_path / "one"), device="cpu")
    assert (sae.site, sae.model_name, sae.context_size) == (None, None, None)
    assert repr(sae) == "Sae('one', standard, 8 -> 20, cpu)"


def test_metadata_without_a_version_is_kept(tmp_path):
    """SAELens takes such a file for one from before version 6, and would drop its metadata."""
    folder = save_sae(tmp_path / "one", "topk")
    edit_config(folder, metadata={"hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2-small"})
    sae = load_sae(folder, device="cpu")
    assert (sae.site, sae.model_name) == ("blocks.3.hook_resid_post", "gpt2-small")
    assert sae.fingerprint() == load_sae(save_sae(tmp_path / "two", "topk"), device="cpu").fingerprint()
    x = torch.from_numpy(X)
    assert torch.equal(sae.encode(x), load_sae(tmp_path / "two", device="cpu").encode(x))


def test_files_from_before_saelens_6_are_read(tmp_path):
    """They had all settings on one level, under other names."""
    folder = save_sae(tmp_path / "old")
    old = {"hook_point": "blocks.2.hook_resid_pre", "model_name": "gpt2-small", "activation_fn_str": "relu"}
    edit_config(folder, remove=("metadata", "architecture"), l1_coefficient=1e-3, **old)
    sae = load_sae(folder, device="cpu")
    assert (sae.site, sae.model_name) == ("blocks.2.hook_resid_pre", "gpt2-small")
    np.testing.assert_allclose(
        sae.encode(torch.from_numpy(X)).numpy(), encode64(save_sae(tmp_path / "n"), X), atol=1e-4
    )


def test_the_fingerprint_depends_on_the_mathematics_alone(tmp_path):
    first = load_sae(save_sae(tmp_path / "one", "topk"), device="cpu").fingerprint()
    second_folder = save_sae(tmp_path / "two", "topk", hook_name="blocks.0.hook_resid_post", model_name="demo")
    assert load_sae(second_folder, device="cpu").fingerprint() == first
    of_another_seed = load_sae(save_sae(tmp_path / "three", "topk", seed=1), device="cpu").fingerprint()
    b_dec = load_file(second_folder / "sae_weights.safetensors")["b_dec"]
    b_dec[3] += 1e-6
    changed = load_sae(set_weights(second_folder, b_dec=b_dec), device="cpu").fingerprint()
    assert len({first, of_another_seed, changed}) == 3


def test_sae_id_chooses_a_folder_of_several(tmp_path):
    for name in ("layer_0", "layer_1"):
        save_sae(tmp_path / "all" / name, seed=len(name), hook_name=f"blocks.{name[-1]}.hook_resid_post")
    assert load_sae(tmp_path / "all", "layer_1", device="cpu").site == "blocks.1.hook_resid_post"
    assert load_sae(str(tmp_path / "all"), "layer_0", device="cpu").name == "layer_0"
    place = str(tmp_path / "all")
    assert refused(RequestError, lambda: load_sae(place)) == (
        f"SAE {place!r} contains several; choose one with sae_id: layer_0, layer_1"
    )
    assert refused(RequestError, lambda: load_sae(place, "layer_7")) == (
        f"sae_id 'layer_7': no such folder in {place!r}; nearest: layer_1, layer_0"
    )


def test_missing_paths_are_refused_before_saelens_is_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sae_lens", None)
    save_sae_folder = tmp_path / "gelu-sae"
    save_sae_folder.mkdir()
    assert refused(RequestError, lambda: load_sae(str(tmp_path / "gelu-seä"), device="cpu")) == (
        f"SAE {str(tmp_path / 'gelu-seä')!r}: no such directory; nearest: gelu-sae"
    )
    assert refused(RequestError, lambda: load_sae(tmp_path / "zzz")).endswith("zzz': no such directory")
    assert refused(RequestError, lambda: load_sae("")) == "name is an empty text; give a path"
    os.mkfifo(tmp_path / "pipe")
    assert "is neither a folder nor a file" in refused(RequestError, lambda: load_sae(tmp_path / "pipe"))
    (save_sae_folder / "readme").touch()
    assert refused(RequestError, lambda: load_sae(save_sae_folder)) == (
        f"SAE {str(save_sae_folder)!r} is a directory without cfg.json; it contains readme"
    )
    assert refused(RequestError, lambda: load_sae(save_sae_folder / "readme")) == (
        f"SAE {str(save_sae_folder / 'readme')!r} is a file; give the folder that contains cfg.json and sae_weights."
        "safetensors"
    )
    assert refused(RequestError, lambda: load_sae(save_sae_folder, device="abacus")).startswith(
        "device 'abacus' cannot"
    )


def test_damaged_and_misspelt_files_are_refused(tmp_path):
    folder = save_sae(tmp_path / "one", "topk")

    def text(kind=DataError, **changes) -> str:
        copied = shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        return refused(kind, lambda: load_sae(edit_config(copied, **changes), device="cpu")).removeprefix(
            str(copied / "cfg.json")
        )

    assert text(d_sae="20") == ": d_sae is '20', expected a whole number above 0"
    assert text(remove=("k",)) == ": k is missing and SAELens would use 100; add it"
    assert text(remove=("d_in",)) == ": d_in is None, expected a whole number above 0"
    unknown = ": SAELens would ignore 'rescale_act_by_decoder_norm', unknown for a topk SAE"
    assert text(rescale_act_by_decoder_norm=True) == f"{unknown}; nearest: rescale_acts_by_decoder_norm"
    assert text(RequestError, architecture="topq").startswith(
        ": SAELens has no inference class for architecture 'topq';"
    )
    assert text(RequestError, architecture="batchtopk").endswith("; save it with save_inference_model")
    assert "cfg.json and sae_weights.safetensors do not fit: " in text(d_sae=21)
    assert text(normalize_activations="batch").startswith(": normalize_activations is 'batch', expected 'none' or")
    weights, config = folder / "sae_weights.safetensors", folder / "cfg.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    assert refused(DataError, lambda: load_sae(folder)).startswith(f"{weights} is damaged (")
    weights.unlink()
    assert refused(DataError, lambda: load_sae(folder)).startswith(f"{weights} is missing or damaged: ")
    config.write_text("{")
    assert refused(DataError, lambda: load_sae(folder)).startswith(f"{config} is not JSON (")
    config.write_text("[]")
    assert refused(DataError, lambda: load_sae(folder)) == f"{config}: expected an object, found []"


@pytest.mark.parametrize("way", ["expected_average_only_in", "covariance_whitening"])
def test_a_normalisation_without_constants_warns(way, tmp_path):
    folder = save_sae(tmp_path / "one", normalize_activations=way)
    with warned(rf"^SAE 'one' was trained with {way}, whose constants are not in its"):
        load_sae(folder, device="cpu")


def test_settings_of_a_release_that_saelens_ignores_are_named(tmp_path, monkeypatch):
    """`cfg.json` is read as it is on the hub; SAELens drops what it does not know before anybody sees it."""
    import huggingface_hub
    from sae_lens.loading import pretrained_sae_loaders

    folder = save_sae(tmp_path / "one", model_name="gpt2-small")
    edit_config(folder, rescale_act=True, apply_b_dec_to_input=True)

    def downloaded(repo_id, filename, **_options):
        if (folder / filename.rsplit("/", 1)[-1]).exists():
            return str(folder / filename.rsplit("/", 1)[-1])
        raise huggingface_hub.errors.EntryNotFoundError("none")

    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", downloaded)
    with warned(r"^SAE gpt2-small-res-jb/blocks.3.hook_resid_pre: SAELens ignores rescale_act of its cfg.json"):
        load_sae("gpt2-small-res-jb", "blocks.3.hook_resid_pre", device="cpu")


def test_features_scaled_by_the_decoder_reconstruct_as_they_did(tmp_path):
    """SAELens 3 to 5: scaling_factor multiplies what is decoded, not what `encode` returns."""
    factor = np.linspace(0.5, 2, 20).astype(np.float32)
    folder = set_weights(save_sae(tmp_path / "old"), scaling_factor=factor)
    weights = load_file(folder / "sae_weights.safetensors")
    edit_config(folder, remove=("metadata",), finetuning_scaling_factor=True)
    sae = load_sae(folder, device="cpu")
    latents = encode64(folder, X)
    np.testing.assert_allclose(sae.encode(torch.from_numpy(X)).numpy(), latents, rtol=1e-4, atol=1e-4)
    expected = latents * factor @ weights["W_dec"] + weights["b_dec"]
    decoded = sae.decode(torch.from_numpy(np.float32(latents))).numpy()
    np.testing.assert_allclose(decoded, expected, rtol=1e-3, atol=1e-3)
    edit_config(folder, finetuning_scaling_factor=False)
    assert "but finetuning_scaling_factor is not true" in refused(RequestError, lambda: load_sae(folder))
    set_weights(folder, scaling_factor=np.ones(20))
    assert load_sae(folder, device="cpu").d_sae == 20


@pytest.mark.parametrize("way", ["expected_average_only_in", "covariance_whitening"])
def test_constants_of_a_checkpoint_are_applied(way, tmp_path):
    folder = save_sae(tmp_path / "one", normalize_activations=way)
    number = np.random.default_rng(4).normal(size=(9, 8))
    matrix, mean = number[:8] + 3 * np.eye(8), number[8]
    scaler = {"scaling_factor": 1.7} if way == "expected_average_only_in" else {"scaling_factor": None}
    (folder / "activation_scaler.json").write_text(json.dumps(scaler))
    parts = {"mean": mean, "matrix": matrix, "inverse_matrix": np.linalg.inv(matrix)}
    save_file(parts, folder / "activation_whitening.safetensors")
    sae = load_sae(folder, device="cpu")
    x = X * 1.7 if "average" in way else (X - mean) @ matrix
    np.testing.assert_allclose(sae.encode(torch.from_numpy(X)).numpy(), encode64(folder, x), rtol=1e-3, atol=1e-3)


def test_a_release_is_downloaded_only_if_it_exists(tmp_path, monkeypatch):
    from sae_lens import SAE

    folder, requests = save_sae(tmp_path / "one"), []

    def fetched(release, sae_id, *, converter, **options):
        requests.append((release, sae_id, options))
        return SAE.load_from_disk(folder)

    monkeypatch.setattr(SAE, "from_pretrained", fetched)
    monkeypatch.chdir(tmp_path)
    sae = load_sae("gpt2-small-res-jb", "blocks.3.hook_resid_pre", device="cpu")
    assert sae.name == "gpt2-small-res-jb/blocks.3.hook_resid_pre"
    assert requests == [("gpt2-small-res-jb", "blocks.3.hook_resid_pre", {"device": "cpu", "dtype": "float32"})]
    text = refused(RequestError, lambda: load_sae("gpt2-small-res-jp", "blocks.3.hook_resid_pre"))
    assert text.startswith(
        "SAE 'gpt2-small-res-jp' is neither a directory here nor a release listed by SAELens; nearest: gpt2"
    )
    text = refused(RequestError, lambda: load_sae("gpt2-small-res-jb", "blocks.33.hook_resid_pre"))
    assert text.startswith(
        "sae_id 'blocks.33.hook_resid_pre' is not one of the 13 ids of release 'gpt2-small-res-jb'; nearest: "
    )
    text = refused(RequestError, lambda: load_sae("gpt2-small-res-jb"))
    assert text == (
        "sae_id None is not one of the 13 ids of release 'gpt2-small-res-jb'; it has blocks.0.hook_resid_pre, "
        "blocks.1.hook_resid_pre, blocks.2.hook_resid_pre, ..."
    )
    assert len(requests) == 1

    def offline(*_arguments, **_options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(SAE, "from_pretrained", offline)
    text = refused(RequestError, lambda: load_sae("gpt2-small-res-jb", "blocks.3.hook_resid_pre"))
    assert text == "SAE gpt2-small-res-jb/blocks.3.hook_resid_pre could not be downloaded or read: no route to the hub"


def test_demo_is_the_embedded_one(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "SAE", tmp_path / "embedded" / "sae")
    assert refused(DataError, lambda: load_sae("demo")) == (
        "SAE 'demo': the embedded autoencoder is missing; reinstall the workbench"
    )
    save_sae(tmp_path / "embedded" / "sae", d_sae=33)
    sae = load_sae("demo", device="cpu")
    assert (sae.name, sae.d_sae) == ("demo", 33)


@pytest.mark.parametrize("name", ["demo", "planted"])
def test_an_id_beside_an_embedded_one_is_refused(name):
    expected = f"sae_id 'layer_3': SAE {name!r} is the only one of its name; leave sae_id out"
    assert refused(RequestError, lambda: load_sae(name, "layer_3")) == expected


def test_config_returns_the_content_of_the_file(tmp_path):
    folder = save_sae(tmp_path / "one", "topk", hook_name="blocks.0.hook_resid_post")
    written = json.loads((folder / "cfg.json").read_text())
    config = load_sae(folder, device="cpu").config()
    assert {key: config[key] for key in written if key != "device"} == {
        k: v for k, v in written.items() if k != "device"
    }


def test_weights_in_several_files_are_one_autoencoder(tmp_path):
    whole, parts = save_sae(tmp_path / "a" / "x", "topk"), save_sae(tmp_path / "b" / "x", "topk")
    weights = load_file(parts / "sae_weights.safetensors")
    (parts / "sae_weights.safetensors").unlink()
    for number, names in enumerate((["W_dec", "b_dec"], ["W_enc", "b_enc"]), 1):
        save_file({name: weights[name] for name in names}, parts / f"sae_weights-0000{number}-of-00002.safetensors")
    assert load_sae(parts).fingerprint() == load_sae(whole).fingerprint()
    (parts / "sae_weights-00002-of-00002.safetensors").unlink()
    text = refused(DataError, lambda: load_sae(parts))
    assert "its settings and weights do not fit: " in text
    assert "W_enc" in text


def test_a_threshold_that_is_nan_is_refused(tmp_path):
    folder = save_sae(tmp_path / "x", "jumprelu")
    set_weights(folder, threshold=np.where(np.arange(20) < 3, np.nan, 1))
    text = refused(DataError, lambda: load_sae(folder))
    assert text == "SAE 'x': 3 of 20 numbers of threshold are NaN; save or download the SAE again"


def test_factors_of_features_that_are_missing_are_named(tmp_path):
    """SAELens 3 to 5 refused such files; today's would decode without them."""
    folder = save_sae(tmp_path / "old")
    edit_config(folder, remove=("metadata", "architecture"), finetuning_scaling_factor=True)
    assert refused(DataError, lambda: load_sae(folder)).startswith(
        f"{folder / 'cfg.json'}: finetuning_scaling_factor is true, but sae_weights.safetensors has no tensor"
    )
    factors = np.arange(1, 21)
    sae = load_sae(set_weights(folder, scaling_factor=factors), device="cpu")
    weights = load_file(folder / "sae_weights.safetensors")
    np.testing.assert_allclose(sae.W_dec.numpy(), weights["W_dec"] * factors[:, None], rtol=1e-6)


def test_infinite_biases_of_the_decoder_are_refused(tmp_path):
    folder = set_weights(save_sae(tmp_path / "one", apply_b_dec_to_input=False), b_dec=np.array([0, np.inf] * 4))
    message = "SAE 'one': 4 of 8 numbers of b_dec are NaN or infinite; save or download the SAE again"
    assert refused(DataError, lambda: load_sae(folder, device="cpu")) == message
