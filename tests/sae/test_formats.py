"""Folders of several autoencoders, and pickles."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from formats_example import B, C, K, V, W, X, assert_close, features, largest, relu, tensors, text
from refusals import refused
from sae_example import save_sae

from workbench.io.errors import RequestError
from workbench.sae.formats import places_in
from workbench.sae.load import load_sae

LAYER = {"W_enc": W.T, "b_enc": B, "W_dec": V, "b_dec": C}


def test_a_folder_of_folders_lists_what_can_be_loaded(tmp_path):
    save_sae(tmp_path / "b" / "deep" / "er" / "resid", hook_name="blocks.0.hook_resid_post")
    for layer in (10, 2):
        tensors(tmp_path / "a" / f"layer_{layer}.safetensors", LAYER)
    tensors(tmp_path / "model.safetensors", {"lm_head": W})
    (tmp_path / "c").mkdir()
    assert places_in(tmp_path) == ["a", "b/deep/er/resid"]
    assert refused(RequestError, lambda: load_sae(tmp_path)) == (
        f"SAE {str(tmp_path)!r} contains several; choose one with sae_id: a, b/deep/er/resid"
    )
    assert refused(RequestError, lambda: load_sae(tmp_path, "b")) == (
        "sae_id 'b' contains several; choose one: b/deep/er/resid"
    )
    assert refused(RequestError, lambda: load_sae(tmp_path / "a", "layer_7")) == (
        f"sae_id 'layer_7': no such folder in {str(tmp_path / 'a')!r}; nearest: layer_2, layer_10"
    )
    assert load_sae(tmp_path, "b/deep/er/resid", device="cpu").name == "b/deep/er/resid"
    assert load_sae(tmp_path, "a/layer_2", device="cpu").name == "a/layer_2"


def test_a_weights_file_means_its_folder(tmp_path):
    folder = save_sae(tmp_path / "one")
    by_file = load_sae(folder / "sae_weights.safetensors", device="cpu")
    assert (by_file.name, by_file.fingerprint()) == ("one", load_sae(folder, device="cpu").fingerprint())
    foreign = tensors(tmp_path / "two" / "model.safetensors", {"lm_head": W})
    assert refused(RequestError, lambda: load_sae(foreign)).startswith(
        f"SAE {str(foreign)!r} is a file; give the folder"
    )


@pytest.mark.parametrize("place", ["ae.pt", "deep/er/ae.pt"])
def test_a_pickle_is_refused_with_a_command_that_converts_it(place, tmp_path):
    path = tmp_path / "it's" / place
    path.parent.mkdir(parents=True)
    states = {"k": K, "postact_fn": "ReLU"}
    weights = {"pre_bias": C, "encoder.weight": W.T, "latent_bias": B, "decoder.weight": V.T}
    weights = {name: torch.tensor(np.float32(part)) for name, part in weights.items()}
    torch.save(weights | {"activation": "TopK", "activation_state_dict": states}, path)
    for name in (path, tmp_path / "it's"):
        message = refused(RequestError, lambda name=name: load_sae(name))
        assert message.startswith(
            f"SAE {str(path)!r} is a pickle, which can run code, and is not opened; if you trust it,"
        )
    command = shlex.split(message.split("load the result: ")[1])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True)
    sae = load_sae(path.with_suffix(".safetensors"), device="cpu")
    x = X - X.mean(1, keepdims=True)
    assert_close(features(sae), largest(relu((x / (x.std(1, ddof=1, keepdims=True) + 1e-5) - C) @ W + B)))


def test_an_id_finds_the_pickle_of_its_layer(tmp_path):
    (tmp_path / "layer0.sae.pt").touch()
    assert "is a pickle" in refused(RequestError, lambda: load_sae(tmp_path, "layer0"))


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    for name in ("one", "deep/two"):
        save_sae(tmp_path / "all" / name)
    (tmp_path / "all" / "again").symlink_to(tmp_path / "all")
    (tmp_path / "all" / "deep" / "again").symlink_to(tmp_path / "all")
    (tmp_path / "all" / "linked").symlink_to(tmp_path / "all" / "one")
    assert places_in(tmp_path / "all") == ["deep/two", "linked", "one"]
    assert load_sae(tmp_path / "all" / "linked", device="cpu").d_sae == 20


def test_a_folder_of_two_formats_is_refused(tmp_path):
    """One of them would be read, and the other ignored, by the order in which formats are tried."""
    folder = save_sae(tmp_path / "x")
    tensors(folder / "ae.safetensors", {"encoder.weight": W.T, "encoder.bias": B, "decoder.weight": V.T, "bias": C})
    text(folder / "config.json", {"trainer": {"dict_class": "AutoEncoder"}})
    assert refused(RequestError, lambda: load_sae(folder)) == (
        f"SAE {str(folder)!r} has files of several formats, sae_weights.safetensors, ae.safetensors; move all but one "
        "into a folder of their own"
    )


def test_an_id_is_a_text_or_a_path(tmp_path):
    save_sae(tmp_path / "one")
    assert load_sae(tmp_path, Path("one"), device="cpu").name == load_sae(tmp_path, "one/", device="cpu").name == "one"
    assert refused(RequestError, lambda: load_sae(tmp_path)).endswith(" contains one; give its sae_id: one")
