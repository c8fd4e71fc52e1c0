"""A small store of the sites that transcoders read, with a final norm, and weights of one layer of several."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from formats_example import D_IN, B, T, W
from store_example import write_store

from workbench.store.manifest import SiteRecord

MIDS = tuple(
    SiteRecord(f"blocks.{layer}.hook_resid_mid", f"resid_mid.{layer}", ("row", "d_model"), (D_IN,), "float32")
    for layer in (0, 1)
)
MLP_IN = SiteRecord("blocks.1.mlp.hook_in", None, ("row", "d_mlp_in"), (D_IN,), "float16")
LN2 = SiteRecord("blocks.1.ln2.hook_out", "ln2.1", ("row", "d_ln2"), (D_IN,), "float32")
Z = SiteRecord("blocks.1.attn.hook_z", "z.1", ("row", "head", "d_head"), (2, 4), "float16")


def stream_store(path: Path, norm: str = "rms"):
    """Opens a new store with these sites of two layers, whose model has a final norm of this kind."""
    import torch

    from workbench.model.unembed import Unembed, save_unembed
    from workbench.store.reader import open_store

    unembed = Unembed(torch.ones(40, D_IN), None, norm, torch.ones(D_IN), torch.zeros(D_IN), 1e-5)
    sites = (*MIDS, MLP_IN, LN2, Z)
    written = {"unembed": lambda place: save_unembed(unembed, place, torch.float32), "unembed_reason": None}
    return open_store(write_store(path, [[7, 9], [12]], sites=sites, **written))


def part_of(layer: int) -> dict[str, np.ndarray]:
    """Encoder of one layer, as a cross-layer transcoder of circuit-tracer stores it, without the number."""
    return {"W_enc": np.roll(W.T, layer, 0), "b_enc": np.roll(B, layer), "b_dec": np.zeros(D_IN), "threshold": T}
