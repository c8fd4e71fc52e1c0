"""A store of two sites, and features extracted from it."""

from pathlib import Path

from sae_example import save_sae

from workbench.features.extract import extract_features
from workbench.sae.load import load_sae
from workbench.store.manifest import SiteRecord

SITE = SiteRecord("blocks.1.hook_resid_post", "resid_post.1", ("row", "d_model"), (8,), "float32")
HEADS = SiteRecord("blocks.1.attn.hook_z", "z.1", ("row", "head", "d_head"), (2, 4), "float16")
SEGMENTS = [[7, 9], [12], [3, 1, 14], [5]]
ROWS = 51
TRAINED = {"hook_name": SITE.name, "model_name": "demo"}
RAGGED = [11, 3, 7, 1, 16, 7, 20, 5]
"""Lengths of sequences that are recorded with an SAE."""
TINY = {"dtype": "float32", "context": 20, "segment_rows": 24, "batch_tokens": 40, "show_progress": False}
"""Settings of such recordings: several batches and segments."""


def loaded(folder: Path, architecture: str = "standard", **settings):
    return load_sae(save_sae(folder, architecture, **{**TRAINED, **settings}), device="cpu")


def extracted(store, sae, *arguments, **settings):
    return extract_features(store, sae, *arguments, **{"show_progress": False, **settings})
