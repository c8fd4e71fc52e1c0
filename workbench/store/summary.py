"""Values of a store's overview figures: size per kind of site, token counts, median norms by layer."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int64

from workbench.figures.store_overview import SiteKind, StoreSummary

if TYPE_CHECKING:
    from workbench.store.reader import Store

_SAMPLED_ROWS = 1_024
_VECTOR_AXES = ("d_model", "d_head", "d_mlp")  # last axes over which an L2 norm is meaningful
_NO_LAYER = -1


def summarize(store: Store) -> StoreSummary:
    """Returns the values of the overview. Reads the token table and 1,024 rows of each site of vectors."""
    by_kind = _layers_by_kind(store)
    rows = np.unique(np.linspace(0, store.rows - 1, min(store.rows, _SAMPLED_ROWS)).astype(np.int64))
    layers, norms = _norms(store, by_kind, rows)
    counts = store.tokens["token"].cast("string").value_counts().to_pylist()
    token_counts: dict[str, int] = defaultdict(int)
    for part in counts:
        token_counts[part["values"] or ""] += part["counts"]
    model = store.manifest.model
    return StoreSummary(
        name=store.path.name,
        provenance=f"model {model.name} ({model.fingerprint[:12]}), store {store.path.name} "
        f"({store.manifest.fingerprint[:12]}), {store.rows:,} rows",
        rows=store.rows,
        kinds=_kinds(store, by_kind),
        token_counts=token_counts,
        norm_layers=layers,
        norms=norms,
        norm_rows=len(rows),
    )


def _layers_by_kind(store: Store) -> dict[str, dict[int, str]]:
    """Labels of the sites by kind and layer; a site outside of the blocks has layer -1."""
    kinds: dict[str, dict[int, str]] = defaultdict(dict)
    for site in store.sites:
        kind, dot, layer = site.label.rpartition(".")
        numbered = bool(dot) and layer.isdecimal()
        kinds[kind if numbered else site.label][int(layer) if numbered else _NO_LAYER] = site.label
    return kinds


def _kinds(store: Store, by_kind: dict[str, dict[int, str]]) -> list[SiteKind]:
    sites = {site.label: site for site in store.sites}
    kinds = []
    for kind, labels in by_kind.items():
        example = sites[next(iter(labels.values()))]
        total = sum(sites[name].row_bytes for name in labels.values()) * store.rows
        kinds.append(
            SiteKind(kind, len(labels), _NO_LAYER not in labels, example.axes, example.dtype, example.row_bytes, total)
        )
    return kinds


def _norms(
    store: Store, by_kind: dict[str, dict[int, str]], rows: Int64[np.ndarray, " row"]
) -> tuple[list[int], dict[str, Float[np.ndarray, " layer"]]]:
    """Median L2 norms by kind, over all heads of sites per head."""
    last_axis = {site.label: site.axes[-1] for site in store.sites}
    vectors = {
        kind: {layer: name for layer, name in labels.items() if layer >= 0 and last_axis[name] in _VECTOR_AXES}
        for kind, labels in by_kind.items()
    }
    layers = sorted({layer for labels in vectors.values() for layer in labels})
    norms = {kind: np.full(len(layers), np.nan) for kind, labels in vectors.items() if labels}
    if len(rows):
        for kind, medians in norms.items():
            for layer, name in vectors[kind].items():
                norm = store[name][rows].float().norm(dim=-1).numpy()
                medians[layers.index(layer)] = np.median(norm)
    return layers, norms
