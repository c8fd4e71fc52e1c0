"""A recorded tiny model with features of a middle and of its last residual stream."""

import pytest
from sae_example import save_sae

import workbench as wb
from workbench.model.load import Model

TEXTS = [
    "Once upon a time the little day was Monday",
    "Monday and Tuesday was the day to Once upon a time",
    "the little time and the day",
    "Tuesday Monday a day upon the little Monday",
]


@pytest.fixture(scope="session")
def recorded_model(tiny_models, tiny_tokenizer):
    return Model(tiny_models["gpt2"], tiny_tokenizer, "tiny-gpt2")


@pytest.fixture(scope="session")
def recorded(recorded_model, tmp_path_factory):
    """Four documents, the residual stream after every block, in float32."""
    options = {"bos": "always", "dtype": "float32", "context": 16, "show_progress": False}
    return wb.record(
        recorded_model, TEXTS, out=tmp_path_factory.mktemp("recorded") / "x.acts", sites=["resid_post"], **options
    )


@pytest.fixture(scope="session")
def saes(tmp_path_factory):
    """Folders of random autoencoders of width 32 by name."""
    folder = tmp_path_factory.mktemp("saes")
    settings = {
        "middle": ("topk", {"k": 8, "hook_name": "resid_post.1"}),
        "last": ("topk", {"k": 8, "hook_name": "resid_post.2"}),
        "normed": ("standard", {"normalize_activations": "layer_norm", "hook_name": "resid_post.2"}),
    }
    return {
        name: save_sae(folder / name, kind, d_in=32, d_sae=64, seed=seed, **more)
        for seed, (name, (kind, more)) in enumerate(settings.items())
    }


@pytest.fixture(scope="session")
def feature_stores(recorded, saes, tmp_path_factory):
    """(features, SAE) by the name of the SAE."""
    folder = tmp_path_factory.mktemp("features")
    loaded = {name: wb.load_sae(path, device="cpu") for name, path in saes.items()}
    return {
        name: (wb.extract_features(recorded, sae, out=folder / name, show_progress=False), sae)
        for name, sae in loaded.items()
    }
