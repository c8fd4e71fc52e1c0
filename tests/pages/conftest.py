"""Features whose store, model and vocabulary are full of hostile text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import store_example
import torch
from hostile_example import HOSTILE, SITE
from sae_example import save_sae
from store_example import MODEL, write_store

from workbench.features.extract import extract_features
from workbench.model.load import Model
from workbench.model.unembed import measure_unembed, save_unembed
from workbench.sae.load import load_sae
from workbench.store.reader import open_store


@pytest.fixture(scope="module")
def hostile_features(tiny_models, tmp_path_factory):
    """Features of a store whose tokens and vocabulary are hostile; their SAE; the unembedding."""
    folder = tmp_path_factory.mktemp("hostile")
    model = tiny_models["gpt2"]
    tokens = tuple(HOSTILE[i % len(HOSTILE)].replace("\ud800", "?") for i in range(320))
    unembed = replace(measure_unembed(model, Model(model, None, "tiny").site_map.last_block), tokens=tokens)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store_example, "WORDS", tuple(token.replace("\ud800", "?") for token in HOSTILE))
        path = write_store(
            folder / "x.acts",
            [[7, 9], [12, 30]],
            sites=(SITE,),
            model=replace(MODEL, name="<b>tiny</b>", d_model=32, vocab=320),
            unembed=lambda path: save_unembed(unembed, path, torch.float32),
            unembed_reason=None,
        )
    about = {"hook_name": SITE.name, "model_name": "<b>tiny</b>"}
    sae = load_sae(save_sae(folder / "sae", d_in=32, **about), device="cpu")
    return extract_features(open_store(path), sae, show_progress=False), sae, unembed
