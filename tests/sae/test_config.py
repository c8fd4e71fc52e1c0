"""Settings that SAELens would drop, misread or replace by a default are refused by name."""

import json

import pytest
from refusals import refused
from sae_example import edit_config, save_sae
from safetensors.torch import load_file, save_file
from torch import ones

from workbench.io.errors import DataError, RequestError
from workbench.sae.load import load_sae

FORMER = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.3.hook_resid_pre",
    "hook_point_layer": 3,
    "hook_point_head_index": None,
    "dataset_path": "text",
    "context_size": 128,
    "d_in": 8,
    "d_sae": 20,
    "l1_coefficient": 8e-5,
    "lr": 4e-4,
    "use_ghost_grads": True,
    "wandb_project": "x",
    "n_checkpoints": 10,
    "dtype": "torch.float32",
    "device": "cuda",
    "seed": 42,
    "normalize_activations": None,
}
"""A cfg.json from before SAELens 6, without its architecture."""


def former(tmp_path, **changes):
    folder = save_sae(tmp_path / "one", changes.get("architecture", "standard"))
    (folder / "cfg.json").write_text(json.dumps(FORMER | changes))
    return folder


def text(kind, folder) -> str:
    return refused(kind, lambda: load_sae(folder, device="cpu")).removeprefix(str(folder / "cfg.json"))


def test_a_file_from_before_saelens_6_is_read(tmp_path):
    sae = load_sae(former(tmp_path, activation_fn_str="relu"), device="cpu")
    assert (sae.architecture, sae.site, sae.context_size) == ("standard", "blocks.3.hook_resid_pre", 128)


def test_its_topk_keeps_its_k(tmp_path):
    folder = former(tmp_path, activation_fn="topk", activation_fn_kwargs={"k": 5})
    sae = load_sae(folder, device="cpu")
    assert (sae.architecture, sae.module.cfg.k) == ("topk", 5)
    assert (sae.encode(load_file(folder / "sae_weights.safetensors")["W_dec"]) != 0).sum(1).max() == 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"activation_fn": "tanh-relu"},
            ": activation_fn 'tanh-relu' is not supported; SAELens would encode with ReLU",
        ),
        ({"activation_fn_str": "gelu"}, ": activation_fn 'gelu' is not supported; SAELens would encode with ReLU"),
        ({"activation_fn": None}, ": activation_fn None is not supported; SAELens would encode with ReLU"),
        ({"architecture": "tanh"}, ": SAELens has no inference class for architecture 'tanh'"),
    ],
)
def test_its_other_activations_are_refused(changes, reason, tmp_path):
    folder = save_sae(tmp_path / "one")
    (folder / "cfg.json").write_text(json.dumps(FORMER | changes))
    assert text(RequestError, folder).startswith(reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation_fn_": "relu"}, ": SAELens would ignore 'activation_fn_', unknown for a standard SAE"),
        ({"gate": True}, ": SAELens would ignore 'gate', unknown for a standard SAE"),
        ({"activation_fn": "topk"}, ": k is None, expected a whole number above 0"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": "5"}}, ": k is '5', expected a whole number above 0"),
        ({"apply_b_dec_to_input": "no"}, ": apply_b_dec_to_input is 'no', expected true or false"),
    ],
)
def test_its_unknown_keys_and_wrong_values_are_refused(changes, reason, tmp_path):
    assert text(DataError, former(tmp_path, **changes)).startswith(reason)


@pytest.mark.parametrize("k", [0, -1, "12", 12.0, True, None, 1 << 60, [12]])
def test_k_is_a_whole_number_above_0(k, tmp_path):
    folder = edit_config(save_sae(tmp_path / "one", "topk"), k=k)
    assert text(DataError, folder) == f": k is {k!r}, expected a whole number above 0"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input is 1, expected true or false"),
        ({"rescale_acts_by_decoder_norm": "false"}, "rescale_acts_by_decoder_norm is 'false', expected true or false"),
        ({"reshape_activations": "hook_q"}, "reshape_activations is 'hook_q', expected 'none' or 'hook_z'"),
        ({"d_in": 8.0}, "d_in is 8.0, expected a whole number above 0"),
        ({"metadata": []}, "metadata is [], expected an object"),
    ],
)
def test_values_have_the_type_that_the_class_declares(changes, reason, tmp_path):
    assert text(DataError, edit_config(save_sae(tmp_path / "one", "topk"), **changes)).startswith(f": {reason}")


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"hook_name": 3}, "hook_name is 3, expected a text; correct its settings"),
        ({"hook_name": ["a", "b"]}, "hook_name is ['a', 'b'], expected a text; correct its settings"),
        ({"model_name": 5}, "model_name is 5, expected a text; correct its settings"),
        ({"n_sites": "x"}, "n_sites is 'x', expected a whole number; correct its settings"),
        ({"n_sites": 0}, "n_sites is 0, expected a number from 1 on; correct its settings"),
        ({"hook_head_index": "1"}, "hook_head_index is '1', expected a whole number; correct its settings"),
        ({"n_sites": True}, "n_sites is True, expected a whole number; correct its settings"),
        ({"hook_names": ["a", "b"]}, "hook_names is ['a', 'b'], expected as many names as n_sites, 1; correct its"),
    ],
)
def test_what_files_record_of_a_training_has_the_right_type(metadata, reason, tmp_path):
    """These are used long after loading, by code that takes them for text or numbers."""
    folder = save_sae(tmp_path / "one", "topk")
    edit_config(folder, metadata=json.loads((folder / "cfg.json").read_text())["metadata"] | metadata)
    assert text(DataError, folder).startswith(f"SAE 'one': metadata.{reason}")


def test_names_of_other_libraries_files_are_checked_too(tmp_path):
    save_file(
        {"W_enc": ones(20, 8), "b_enc": ones(20), "W_dec": ones(20, 8), "b_dec": ones(8)},
        tmp_path / "layer_0.safetensors",
    )
    for line, reason in (
        ("model_name: 5", "model_name is 5, expected a text"),
        ("feature_input_hook: [a]", "feature_input_hook is ['a'], expected a text"),
        ("transcoders: 3", "transcoders is 3, expected a list of files"),
    ):
        (tmp_path / "config.yaml").write_text(line)
        message = f"{tmp_path / 'config.yaml'}: {reason}; save or download the SAE again"
        assert refused(DataError, lambda: load_sae(tmp_path, "layer_0")) == message
