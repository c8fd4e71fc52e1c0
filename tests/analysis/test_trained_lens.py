"""Trained lenses as objects: what they read again, their files, released ones, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from planted import linear_unembed, planted_store
from refusals import refused
from safetensors.torch import save_file
from warned import warned

import workbench as wb
from workbench.analysis.lens import kl_slope
from workbench.io.errors import DataError, RequestError
from workbench.probes import LogitLens, TunedLens

D, VOCAB = 5, 7
SHORT = {"epochs": 3, "batch": 32, "learning_rate": 0.03}


def make(path, **more):
    draw = np.random.default_rng(1)
    sites = {f"resid_post.{layer}": draw.normal(size=(120, D)) for layer in range(3)}
    ids = draw.integers(0, VOCAB, (12, 10)).tolist()
    return planted_store(path, ids, sites, linear_unembed(draw.normal(size=(VOCAB, D))), **more)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make(tmp_path_factory.mktemp("lens") / "x.acts")


@pytest.fixture(scope="module")
def lens(store):
    return TunedLens(**SHORT).fit(store)


def test_a_saved_lens_reads_what_the_probe_reads(store, lens, tmp_path):
    again = wb.load_lens(lens.save(tmp_path / "lens"))
    assert (
        repr(again)
        == repr(lens)
        == "TrainedLens of planted: 2 layers of resid_post, d_model 5".replace("planted", store.manifest.model.name)
    )
    assert torch.equal(again.weight, lens.weight)
    assert again.made_of == lens.made_of
    result = TunedLens(**SHORT).run(store)
    rows = ", ".join(map(str, result.data["row"].to_numpy()))
    read = again.read(store, where=f"row IN ({rows})")
    for name in ("kl", "entropy", "top_id", "mean_kl", "logit_mean_kl", "weight", "bias", "epochs"):
        np.testing.assert_array_equal(read.data[name], result.data[name], err_msg=name)
    assert "tuned lens" in read.headline()
    assert read.figures().keys() == result.figures().keys()


def test_some_layers_alone(store, lens):
    whole, one_layer = lens.read(store), lens.read(store, layers=(1,))
    assert one_layer.data["layer"].values.tolist() == [1]
    np.testing.assert_array_equal(one_layer.data["kl"][0], whole.data["kl"][1])
    plain = LogitLens(layers=(0, -1)).run(store).data
    assert plain["layer"].values.tolist() == [0, 2]
    np.testing.assert_array_equal(plain["kl"], LogitLens().run(store).data["kl"][[0, 2]])
    lens_of_layer = TunedLens(layers=(0,), **SHORT).fit(store)
    assert lens_of_layer.layers == (0,)
    assert refused(RequestError, lambda: lens_of_layer.read(store, layers=(1,))).startswith("layer 1 has no map")


def test_a_store_of_another_model_is_refused(lens, tmp_path):
    other_store = make(tmp_path / "x.acts", fingerprint="e" * 64)
    assert "with the weights" in refused(RequestError, lambda: lens.read(other_store))
    deeper = make(tmp_path / "y.acts", n_layers=4)
    assert "3 layers, d_model 5" in refused(RequestError, lambda: lens.read(deeper))


def test_a_released_lens_reads_the_stream_before_its_block(store, lens, tmp_path):
    """In the package's layout map 0 is of the embedding, and map i of the output of block i - 1."""
    config = {"base_model_name_or_path": "some/model", "d_model": D, "num_hidden_layers": 3, "bias": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "params.pt").write_bytes(b"pickle")
    text = refused(RequestError, lambda: wb.load_lens(tmp_path))
    assert "is a pickle" in text
    assert "save_file" in text
    tensors = {"0.weight": torch.full((D, D), torch.pi), "0.bias": torch.zeros(D)}
    for layer in range(2):
        tensors |= {f"{layer + 1}.weight": lens.weight[layer].clone(), f"{layer + 1}.bias": lens.bias[layer].clone()}
    save_file(tensors, tmp_path / "params.safetensors")
    released = wb.load_lens(tmp_path)
    with warned("the lens names no weights"):
        data = released.read(store).data
    np.testing.assert_array_equal(data["kl"], lens.read(store).data["kl"])
    save_file({"0.weight": torch.zeros(D, D)}, tmp_path / "params.safetensors")
    assert "has no tensor 1.weight" in refused(RequestError, lambda: wb.load_lens(tmp_path))


def test_folders_that_are_no_lens_or_damaged(lens, tmp_path):
    assert refused(RequestError, lambda: wb.load_lens(tmp_path)).startswith(f"no lens at {tmp_path}")
    folder = lens.save(tmp_path / "lens")
    assert "not empty" in refused(RequestError, lambda: lens.save(folder))
    data = bytearray((folder / "maps.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "maps.safetensors").write_bytes(data)
    assert "damaged" in refused(DataError, lambda: wb.load_lens(folder))
    text = (folder / "lens.json").read_text()
    (folder / "lens.json").write_text(text.replace('"n_layers": 3', '"n_layers": 4'))
    assert "checksum" in refused(DataError, lambda: wb.load_lens(folder))


def test_the_slope_of_kl_is_autograds():
    logits, target = (3 * torch.randn(9, 11, dtype=torch.float64) for _ in range(2))
    model = target.softmax(1)
    logits.requires_grad_()
    expected = (model * (target.log_softmax(1) - logits.log_softmax(1))).sum(1)
    expected.sum().backward()
    slope = logits.detach().clone()
    values = kl_slope(slope, model, -(model * model.log()).sum(1))
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(slope, logits.grad)
