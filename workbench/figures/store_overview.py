"""A store at a glance: what was recorded and how large it is, which tokens, how large the vectors."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
import pyarrow.compute as pc

from workbench.figures.layer_curves import layer_curves
from workbench.figures.safe_text import label, sentence
from workbench.figures.theme import TEMPLATE

if TYPE_CHECKING:
    from workbench.store.reader import Store

_TOKENS_SHOWN = 30
_SAMPLED = 1_024  # rows
_VECTORS = ("d_model", "d_head", "d_mlp")  # last axes of sites whose norm means something
_MEGA = 1e6


def overview(store: Store) -> dict[str, go.Figure]:
    """ "sites": bytes on the disk of each kind of site; "tokens": the most frequent tokens; "norms": by layer.

    Reads the token table, and of each site of vectors 1,024 rows spread evenly, which the figure says.
    """
    figures = {"sites": _sites(store), "tokens": _tokens(store), "norms": _norms(store)}
    model = store.manifest.model
    told = f"model {model.name} ({model.fingerprint[:12]}), store {store.path.name} "
    told += f"({store.manifest.fingerprint[:12]}), {store.rows:,} rows"
    for figure in figures.values():
        figure.update_layout(meta={"provenance": sentence(told)})
    return {name: figure for name, figure in figures.items() if len(figure.data)}


def _kinds(store: Store) -> dict[str, dict[int, str]]:
    """Kind of site to its layers and the sites' labels; a site outside of blocks has layer -1."""
    kinds: dict[str, dict[int, str]] = defaultdict(dict)
    for site in store.sites:
        kind, dot, layer = site.label.rpartition(".")
        numbered = dot and layer.isdigit()
        kinds[kind if numbered else site.label][int(layer) if numbered else -1] = site.label
    return kinds


def _sites(store: Store) -> go.Figure:
    sizes = {site.label: site.row_bytes * store.rows for site in store.sites}
    kinds, known = _kinds(store), {site.label: site for site in store.sites}
    total = {kind: sum(sizes[name] for name in found.values()) for kind, found in kinds.items()}
    order = sorted(total, key=total.__getitem__, reverse=True)
    told = []
    for kind in order:
        one = known[next(iter(kinds[kind].values()))]
        axes = ", ".join(map(label, one.axes))
        told.append(f"{len(kinds[kind])} sites, axes ({axes}), {one.dtype}, {one.row_bytes:,} bytes a row")
    names = [f"{kind} ({len(kinds[kind])})" if -1 not in kinds[kind] else kind for kind in order]
    figure = go.Figure(
        go.Bar(
            x=[total[kind] / _MEGA for kind in order],
            y=names,
            orientation="h",
            customdata=told,
            hovertemplate="%{x:,.1f} MB<br>%{customdata}<extra></extra>",
        )
    )
    shape = f"{store.rows:,} rows, {len(store.sites):,} sites, {sum(sizes.values()) / _MEGA:,.1f} MB of activations"
    return _rows(
        figure, len(names), f"What {_name(store)} holds", f"{shape}; kinds of sites, with the number of layers", "MB"
    )


def _tokens(store: Store) -> go.Figure:
    found = pc.value_counts(store.tokens["token"].cast("string")).to_pylist()
    counts = sorted(((part["counts"], part["values"] or "") for part in found), key=lambda part: (-part[0], part[1]))
    best = counts[:_TOKENS_SHOWN]
    share = 100 * sum(number for number, _ in best) / max(1, store.rows)
    figure = go.Figure(
        go.Bar(
            x=[number for number, _ in best],
            y=[f"{place} {label(text)}" for place, (_, text) in enumerate(best, start=1)],
            orientation="h",
            hovertemplate="%{x:,} times<extra></extra>",
        )
    )
    told = f"{len(best)} of {len(counts):,} kinds of tokens, {share:.0f} % of {store.rows:,}"
    return _rows(figure, len(best), f"The most frequent tokens of {_name(store)}", told, "tokens")


def _rows(figure: go.Figure, number: int, title: str, subtitle: str, unit: str) -> go.Figure:
    figure.update_layout(
        template=TEMPLATE,
        title={"text": title, "subtitle": {"text": subtitle}},
        width=760,
        height=180 + 20 * max(3, number),
        showlegend=False,
    )
    figure.update_xaxes(title=unit, rangemode="tozero")
    return figure.update_yaxes(autorange="reversed", type="category")


def _norms(store: Store) -> go.Figure:
    """The median L2 norm by layer, a line for each kind of site that holds vectors; of heads, over all of them."""
    axes = {site.label: site.axes[-1] for site in store.sites}
    kinds = {
        kind: {layer: name for layer, name in found.items() if layer >= 0 and axes[name] in _VECTORS}
        for kind, found in _kinds(store).items()
    }
    layers = sorted({layer for found in kinds.values() for layer in found})
    rows = np.unique(np.linspace(0, store.rows - 1, min(store.rows, _SAMPLED)).astype(np.int64))
    if not len(rows):
        return go.Figure()
    curves = {}
    for kind, found in kinds.items():
        if found:
            curves[kind] = np.full(len(layers), np.nan)
            for layer, name in found.items():
                norm = store[name][rows].float().norm(dim=-1).numpy()
                curves[kind][layers.index(layer)] = np.median(norm)
    figure = layer_curves(curves, layers=layers, title=f"Norms of the vectors in {_name(store)}", unit="median L2 norm")
    told = f"over {len(rows):,} of {store.rows:,} rows, spread evenly"
    figure.update_layout(title={"subtitle": {"text": told}}, margin={"t": 110})
    return figure.update_yaxes(type="log", rangemode="normal", dtick="D2", tickformat="~r")


def _name(store: Store) -> str:
    return label(store.path.name, 60)
