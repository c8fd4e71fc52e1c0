"""Fixtures of sparse features: a store, an autoencoder, and its features."""

import shutil

import pytest
from features_example import HEADS, SEGMENTS, SITE, TRAINED
from sae_example import save_sae
from store_example import write_store

from workbench.features.extract import extract_features
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
