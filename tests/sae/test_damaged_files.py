"""Damaged files of autoencoders give the same autoencoder or an error in one line, never another exception."""

import json

import numpy as np
import pytest
import torch
from mutations import fuzz, safetensors
from sae_example import save_sae
from safetensors.numpy import save_file

from workbench.sae.load import load_sae

ROWS = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32))
RNG = np.random.default_rng(1)
TENSORS = {
    "encoder.weight": RNG.normal(size=(20, 8)).astype(np.float32),
    "encoder.bias": RNG.normal(size=20).astype(np.float32),
}


def encode(folder):
    return load_sae(folder, device="cpu").encode(ROWS).shape


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors"])
def test_of_saelens(architecture, file, tmp_path):
    folder = save_sae(tmp_path / "one", architecture, hook_name="blocks.0.hook_resid_post", context_size=8)
    outcomes = fuzz(lambda: encode(folder), folder / file, parts=safetensors if "weights" in file else None)
    assert outcomes["DataError"] > 0.1 * outcomes.total()


@pytest.mark.parametrize("file", ["cfg.json", "sae.safetensors"])
def test_of_sparsify(file, tmp_path):
    decoder = {"W_dec": TENSORS["encoder.weight"], "b_dec": np.zeros(8, np.float32)}
    save_file(TENSORS | decoder, tmp_path / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": 2, "num_latents": 20, "k": 4, "d_in": 8, "transcode": False}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    fuzz(lambda: encode(tmp_path), tmp_path / file, parts=safetensors if file != "cfg.json" else None)


@pytest.mark.parametrize("file", ["config.json", "ae.safetensors"])
def test_of_dictionary_learning(file, tmp_path):
    decoder = {"decoder.weight": TENSORS["encoder.weight"].T.copy(), "b_dec": np.zeros(8, np.float32)}
    save_file(TENSORS | decoder | {"k": np.array(4), "threshold": np.array(-1.0)}, tmp_path / "ae.safetensors")
    trainer = {"dict_class": "AutoEncoderTopK", "k": 4, "activation_dim": 8, "dict_size": 20, "layer": 3}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer | {"submodule_name": "resid_post_layer_3"}}))
    fuzz(lambda: encode(tmp_path), tmp_path / file, parts=safetensors if file != "config.json" else None)
