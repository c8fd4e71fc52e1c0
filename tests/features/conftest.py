"""Fixtures of sparse features: a store, an autoencoder, and its features."""

import shutil

import numpy as np
import pytest
import torch
from features_example import HEADS, RAGGED, SEGMENTS, SITE, TRAINED
from sae_example import save_sae
from store_example import write_store

from workbench.features.extract import extract_features
from workbench.model.load import Model
from workbench.sae.load import load_sae
from workbench.store.reader import open_store


@pytest.fixture(scope="session")
def example(tmp_path_factory):
    """A store of two sites; tests that change it take a copy."""
    return open_store(write_store(tmp_path_factory.mktemp("stores") / "x.acts", SEGMENTS, sites=(SITE, HEADS)))


@pytest.fixture
def store(example, tmp_path):
    return open_store(shutil.copytree(example.path, tmp_path / "x.acts"))


@pytest.fixture(scope="session")
def sae(tmp_path_factory):
    return load_sae(save_sae(tmp_path_factory.mktemp("saes") / "topk", "topk", **TRAINED), device="cpu")


@pytest.fixture(scope="session")
def features(example, sae, tmp_path_factory):
    return extract_features(example, sae, out=tmp_path_factory.mktemp("features") / "topk", show_progress=False)


@pytest.fixture(scope="module")
def one_thread():
    """Threads divide a product by its rows, and here blocks are of other rows than there: last bits would differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sequences():
    random = np.random.default_rng(0)
    return [random.integers(2, 300, n).tolist() for n in RAGGED]


@pytest.fixture(scope="session")
def llama(tiny_models):
    return Model(tiny_models["llama"], None, "tiny-llama")
