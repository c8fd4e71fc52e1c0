"""Features of what is no recorded site as it is, extracted while a model is recorded: several sites, a head, a norm."""

import copy
import os

import numpy as np
import pytest
import torch
from features_example import RAGGED, TINY
from formats_example import assert_close, jump, tensors, text
from pretend_device import PretendDevice
from refusals import refused
from sae_example import encode64, save_sae
from warned import warned

import workbench as wb
from workbench.cli.main import main
from workbench.io.errors import DataError, RequestError
from workbench.model.load import Model

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, FEATURES = 32, 20
MIDS = [f"blocks.{layer}.hook_resid_mid" for layer in range(3)]


def layer_weights(layer: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(layer)
    weights = {"W_enc": random.normal(size=(FEATURES, WIDTH)), "b_enc": random.normal(size=FEATURES)}
    return weights | {"b_dec": np.zeros(WIDTH), "threshold": np.abs(random.normal(size=FEATURES))}


def cross_layer(folder, hook="hook_resid_mid", layers=range(3), model="tiny-llama", device="cpu"):
    for layer in layers:
        weights = {f"{name}_{layer}": part for name, part in layer_weights(layer).items()}
        tensors(folder / f"W_enc_{layer}.safetensors", weights)
    text(folder / "config.yaml", f"model_name: {model}\nfeature_input_hook: {hook}\n")
    return wb.load_sae(folder, device=device)


def crosscoder(folder):
    weights = {f"{part}.{kind}": value for part, kind, value in _crosscoder_weights()}
    tensors(folder / "ae.safetensors", weights)
    text(folder / "config.json", {"trainer": {"dict_class": "CrossCoder", "dict_size": FEATURES}})
    return wb.load_sae(folder, device="cpu")


def _crosscoder_weights():
    random = np.random.default_rng(9)
    yield "encoder", "weight", random.normal(size=(2, WIDTH, FEATURES))
    yield "encoder", "bias", random.normal(size=FEATURES)
    yield "decoder", "weight", random.normal(size=(2, FEATURES, WIDTH))
    yield "decoder", "bias", np.zeros((2, WIDTH))


def head(folder):
    about = {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 2, "model_name": "tiny-llama"}
    return wb.load_sae(save_sae(folder, "topk", d_in=WIDTH // 4, d_sae=FEATURES, **about), device="cpu")


@pytest.fixture(scope="module")
def clt(tmp_path_factory):
    return cross_layer(tmp_path_factory.mktemp("saes") / "clt")


def record(model, texts, out, **settings):
    return wb.record(model, texts, out=out, **{**TINY, **settings})


def contents(path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def feature_files(store) -> dict[str, bytes]:
    return {name: part for name, part in contents(store.path / "features").items() if name.endswith("safetensors")}


# ---- what is extracted --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "site", "recorded"),
    [
        (cross_layer, None, MIDS),
        (lambda folder: cross_layer(folder, "ln2.hook_normalized"), None, MIDS),
        (crosscoder, ["resid_post.0", "resid_pre.2"], ["resid_post.0", "resid_pre.2"]),
        (head, None, ["z.1"]),
    ],
    ids=["cross-layer transcoder", "norms", "crosscoder", "head"],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features_equal_those_of_the_recorded_sites(make, site, recorded, dtype, llama, sequences, tmp_path):
    sae = make(tmp_path / "sae")
    passed = record(llama, sequences, tmp_path / "p", dtype=dtype, sae=sae, sae_site=site)
    assert passed.sites == ()
    stored = record(llama, sequences, tmp_path / "s", dtype=dtype, sites=recorded)
    expected = wb.extract_features(stored, sae, site, show_progress=False)
    assert feature_files(passed) == feature_files(stored)
    features = wb.open_features(passed.path)
    assert features.record.reads == expected.record.reads
    assert len(features.by_row["value"]) > sum(RAGGED)


def test_features_of_layers_equal_the_encoders_on_the_model(llama, sequences, clt, tmp_path):
    """Against float64 NumPy on what Hugging Face's modules read."""
    features = wb.open_features(record(llama, sequences, tmp_path / "p", sae=clt).path)
    module, read = copy.deepcopy(llama.module), {layer: [] for layer in range(3)}
    for layer, block in enumerate(module.model.layers):
        block.post_attention_layernorm.register_forward_pre_hook(
            lambda _module, args, layer=layer: read[layer].append(args[0][0].double().numpy())
        )
    with torch.no_grad():
        for ids in sequences:
            module(torch.tensor([ids]))
    dense = []
    for layer in range(3):
        weights = layer_weights(layer)
        pre = np.concatenate(read[layer]) @ np.float32(weights["W_enc"]).T + np.float32(weights["b_enc"])
        dense.append(jump(pre, np.float32(weights["threshold"])))
    assert_close(features[:].toarray(), np.concatenate(dense, 1))
    assert features.sites["layer"].tolist() == [0, 1, 2]
    features.verify()


def test_features_of_a_head_equal_the_autoencoder_on_its_column_of_z(llama, sequences, tmp_path):
    sae = head(tmp_path / "sae")
    features = wb.open_features(record(llama, sequences, tmp_path / "p", sae=sae).path)
    module, read = copy.deepcopy(llama.module), []
    projection = module.model.layers[1].self_attn.o_proj
    projection.register_forward_pre_hook(lambda _module, args: read.append(args[0][0]))
    with torch.no_grad():
        for ids in sequences:
            module(torch.tensor([ids]))
    column = torch.cat(read)[:, 2 * WIDTH // 4 : 3 * WIDTH // 4]
    assert_close(features[:].toarray(), encode64(tmp_path / "sae", column.double().numpy()))


@pytest.mark.parametrize("sites", [["resid_mid.1", "embed"], ["resid_mid"]])
def test_sites_that_are_stored_as_well_keep_their_values(sites, llama, sequences, clt, tmp_path):
    store_with_features = record(llama, sequences, tmp_path / "b", sites=sites, sae=clt)
    plain = record(llama, sequences, tmp_path / "p", sites=sites)
    assert [site.name for site in store_with_features.sites] == [site.name for site in plain.sites]
    for site in plain.sites:
        assert torch.equal(store_with_features[site.name][:], plain[site.name][:])
    assert feature_files(store_with_features) == feature_files(record(llama, sequences, tmp_path / "f", sae=clt))


def test_rows_unlike_those_of_the_training_are_reported(llama, sequences, tmp_path):
    about = {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny-llama", "context_size": 10}
    sae = wb.load_sae(save_sae(tmp_path / "x", d_in=WIDTH, **about), device="cpu")
    with warned(r"SAE 'x' was trained on sequences of 10 tokens; 17 rows lie beyond: features may differ there"):
        record(llama, sequences, tmp_path / "p", sae=sae)


# ---- interrupted, shared, on a device ------------------------------------------------------------------------


def test_stopped_at_every_commit_it_resumes_to_the_same_bytes(llama, sequences, clt, tmp_path, monkeypatch):
    texts = sequences[:5]  # two segments
    whole = contents(record(llama, texts, tmp_path / "whole", sites=["resid_mid.1"], sae=clt).path)
    replace, stops = os.replace, 0

    def stop_after(replacements):
        def stopping(source, target):
            if next(replacements, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        return stopping

    while True:
        out = tmp_path / str(stops)
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", stop_after(iter(range(stops))))
            try:
                record(llama, texts, out, sites=["resid_mid.1"], sae=clt)
                break
            except KeyboardInterrupt:
                stops += 1
        record(llama, texts, out, sites=["resid_mid.1"], sae=clt)
        assert contents(out) == whole, stops
    assert stops > 12


def test_shares_record_and_encode_to_the_bytes_of_one_process(llama, sequences, clt, tmp_path):
    whole = record(llama, sequences, tmp_path / "one", sae=clt)
    for rank in (2, 0, 1):
        record(llama, sequences, tmp_path / "two", sae=clt, workers=wb.Share(rank, 3))
    assert contents(tmp_path / "two") == contents(whole.path)


def test_workers_encode_a_head_to_the_bytes_of_one_process(in_this_process, llama, sequences, tmp_path):
    llama.module.save_pretrained(tmp_path / "tiny-llama")
    saved, sae = wb.load_model(tmp_path / "tiny-llama", device="cpu"), head(tmp_path / "sae")
    whole = record(saved, sequences, tmp_path / "one", sae=sae)
    from_workers = record(saved, sequences, tmp_path / "two", sae=sae, workers=wb.RayWorkers(2))
    assert contents(from_workers.path) == contents(whole.path)


def test_a_device_that_mixes_with_no_other_gives_the_same(llama, sequences, clt, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    cpu_features = wb.open_features(record(llama, sequences, tmp_path / "here", sae=clt).path)
    with PretendDevice("xpu"):
        moved = cross_layer(tmp_path / "clt", device="xpu")
        module = copy.deepcopy(llama.module).to("xpu")
        moved_store = record(Model(module, None, "tiny-llama"), sequences, tmp_path / "there", sae=moved)
    moved_features = wb.open_features(moved_store.path)
    assert moved_features.by_row["feature"].tolist() == cpu_features.by_row["feature"].tolist()
    assert_close(moved_features.by_row["value"], cpu_features.by_row["value"])


# ---- refused ------------------------------------------------------------------------------------------------


def test_a_site_that_the_model_does_not_offer_is_refused_before_anything_is_written(
    tiny_models, llama, sequences, tmp_path
):
    too_deep = cross_layer(tmp_path / "deep", layers=range(4))
    text = refused(RequestError, lambda: record(llama, sequences, tmp_path / "p", sae=too_deep))
    assert text.startswith("site 'blocks.3.hook_resid_mid'")
    parallel = Model(tiny_models["gpt_neox"], None, "tiny-neox")  # no stream between attention and MLP
    clt = cross_layer(tmp_path / "clt", model="tiny-neox")
    text = refused(RequestError, lambda: record(parallel, sequences, tmp_path / "p", sae=clt))
    assert text.startswith("site 'blocks.0.hook_resid_mid' "), text
    normed = cross_layer(tmp_path / "ln", "ln2.hook_normalized", model="tiny-neox")
    text = refused(RequestError, lambda: record(parallel, sequences, tmp_path / "p", sae=normed))
    assert text.endswith(
        "tiny-neox has LayerNorms, and the SAE's files do not record fold_ln; give sae_site= and sae_force=True for "
        "another one"
    )
    head_sae = head(tmp_path / "head")
    text = refused(
        RequestError, lambda: record(llama, sequences, tmp_path / "p", sae=head_sae, sae_site="resid_post.1")
    )
    assert text == "head 2 of resid_post.1 does not exist: a row has the axes d_model 32"
    few = refused(RequestError, lambda: record(llama, sequences, tmp_path / "p", sae=clt, sae_site="resid_mid.1"))
    assert few == "sae_site: SAE 'clt' reads 3 sites at once; give as many, not 1"
    unknown = crosscoder(tmp_path / "cross")
    text = refused(RequestError, lambda: record(llama, sequences, tmp_path / "p", sae=unknown))
    assert text == "sae_site: the files of SAE 'cross' do not record its site; give sae_site=, a list of 2 names"
    assert not (tmp_path / "p").exists()


def test_a_row_that_is_not_finite_is_refused_with_its_site(tiny_models, sequences, clt, tmp_path):
    module = copy.deepcopy(tiny_models["llama"])
    with torch.no_grad():
        module.model.embed_tokens.weight[sequences[0][3]] = torch.nan
    model = Model(module, None, "tiny-llama")
    text = refused(DataError, lambda: record(model, sequences, tmp_path / "p", sae=clt))
    assert text == "row 0 of resid_mid.0 is not finite in the model's forward pass; load the model in another dtype"


def test_another_order_of_sites_is_not_resumed(llama, sequences, tmp_path):
    sae = crosscoder(tmp_path / "cross")
    record(llama, sequences, tmp_path / "p", sae=sae, sae_site="resid_post.0,resid_post.1")
    text = refused(
        RequestError,
        lambda: record(llama, sequences, tmp_path / "p", sae=sae, sae_site="resid_post.1,resid_post.0"),
    )
    assert "features: blocks.0-1.hook_resid_post by cross" in text


# ---- the command --------------------------------------------------------------------------------------------


def test_the_command_takes_several_sites(tmp_path, capsys):
    layers = ["resid_post.0", "resid_post.1"]
    width = wb.load_model("demo").d_model
    random = np.random.default_rng(9)
    weights = {"encoder.weight": random.normal(size=(2, width, 6)), "encoder.bias": np.zeros(6)}
    weights |= {"decoder.weight": random.normal(size=(2, 6, width)), "decoder.bias": np.zeros((2, width))}
    tensors(tmp_path / "cross" / "ae.safetensors", weights)
    text(tmp_path / "cross" / "config.json", {"trainer": {"dict_class": "CrossCoder", "dict_size": 6}})
    out, sae = str(tmp_path / "d.acts"), str(tmp_path / "cross")
    with pytest.raises(SystemExit) as ended:
        main(["record", "demo", "On Monday.", "--out", out, "--sae", sae, "--sae-site", ",".join(layers)])
    assert ended.value.code == 0
    assert "features 1: blocks.0-1.hook_resid_post-cross\n" in capsys.readouterr().out
