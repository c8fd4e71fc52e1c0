"""Stores that the tests of lenses share."""

from __future__ import annotations

import pytest
from lens_example import KINDS, TEXTS, record

from workbench.model.load import Model


@pytest.fixture(scope="session")
def tiny_stores(tiny_models, tiny_tokenizer, tmp_path_factory):
    """TEXTS in every family, by family: sequences of at most 12 tokens, BOS first."""
    folder = tmp_path_factory.mktemp("lens")
    stores = {}
    for family, module in tiny_models.items():
        sites = ("resid_mid", "resid_post") if family == "llama" else ("resid_post",)
        model = Model(module, tiny_tokenizer, f"tiny-{family}")
        stores[family] = record(model, TEXTS, folder / family, sites, context=12, bos="always")
    return stores


@pytest.fixture(scope="session")
def llama_store(tiny_stores):
    return tiny_stores["llama"]


@pytest.fixture(scope="session")
def wide_store(tiny_models, tmp_path_factory):
    """Every kind of site of a model without tokenizer, and some that no lens can read."""
    ids = [[5, 6, 7, 8, 9], [10, 11, 12]]
    sites = (*KINDS, "mlp_post", "z")
    return record(Model(tiny_models["llama"], None, "bare"), ids, tmp_path_factory.mktemp("wide") / "acts", sites)
