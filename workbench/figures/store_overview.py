"""Overview figures of a store: size per kind of site, most frequent tokens, norms over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from workbench.figures.layer_curves import layer_curves
from workbench.figures.safe_text import label, sentence
from workbench.figures.themed import ThemedFigure

_TOKENS_SHOWN = 30
_MEGA = 1e6


@dataclass(frozen=True)
class SiteKind:
    """The recorded sites of one kind, such as resid_post of every layer."""

    name: str
    sites: int
    layered: bool
    """True for sites inside blocks, which have one site per layer."""
    axes: tuple[str, ...]
    dtype: str
    row_bytes: int
    """Bytes per row of one site."""
    total_bytes: int
    """Bytes of all rows and sites."""


@dataclass(frozen=True)
class StoreSummary:
    """Values that the overview draws; `workbench.store.summary` collects them."""

    name: str
    provenance: str
    """One line of plain text: model, store, rows."""
    rows: int
    kinds: Sequence[SiteKind]
    token_counts: Mapping[str, int]
    """Occurrences of each distinct token."""
    norm_layers: Sequence[int]
    norms: Mapping[str, Float[np.ndarray, " layer"]]
    """Median L2 norm by layer for each kind of site that holds vectors; NaN for a layer that was not recorded."""
    norm_rows: int
    """Rows that the medians are taken over."""


def overview(summary: StoreSummary) -> dict[str, go.Figure]:
    """Returns the figures "sites" (bytes per kind of site), "tokens" (the most frequent) and "norms" (by layer)."""
    figures = {"sites": _sites(summary), "tokens": _tokens(summary), "norms": _norms(summary)}
    for figure in figures.values():
        figure.update_layout(meta={"provenance": sentence(summary.provenance)})
    return {name: figure for name, figure in figures.items() if len(figure.data)}  # pyright: ignore[reportArgumentType]  # plotly


def _sites(summary: StoreSummary) -> go.Figure:
    kinds = sorted(summary.kinds, key=lambda kind: kind.total_bytes, reverse=True)
    details = [
        f"{kind.sites} sites, axes ({', '.join(map(label, kind.axes))}), {kind.dtype}, {kind.row_bytes:,} bytes per row"
        for kind in kinds
    ]
    names = [f"{kind.name} ({kind.sites})" if kind.layered else kind.name for kind in kinds]
    figure = ThemedFigure(
        go.Bar(
            x=[kind.total_bytes / _MEGA for kind in kinds],
            y=names,
            orientation="h",
            customdata=details,
            hovertemplate="%{x:,.1f} MB<br>%{customdata}<extra></extra>",
        )
    )
    sites, size = sum(kind.sites for kind in kinds), sum(kind.total_bytes for kind in kinds) / _MEGA
    subtitle = f"{summary.rows:,} rows, {sites:,} sites, {size:,.1f} MB of activations; in brackets: layers recorded"
    return _horizontal(figure, len(names), f"Recorded sites of {_name(summary)}", subtitle, "size (MB)")


def _tokens(summary: StoreSummary) -> go.Figure:
    counts = sorted(summary.token_counts.items(), key=lambda part: (-part[1], part[0]))
    best = counts[:_TOKENS_SHOWN]
    share = 100 * sum(number for _, number in best) / max(1, summary.rows)
    figure = ThemedFigure(
        go.Bar(
            x=[number for _, number in best],
            y=[f"{place} {label(text)}" for place, (text, _) in enumerate(best, start=1)],
            orientation="h",
            hovertemplate="%{x:,} times<extra></extra>",
        )
    )
    subtitle = f"{len(best)} of {len(counts):,} distinct tokens, {share:.0f} % of {summary.rows:,} rows"
    return _horizontal(figure, len(best), f"Most frequent tokens of {_name(summary)}", subtitle, "occurrences")


def _norms(summary: StoreSummary) -> go.Figure:
    if not summary.norm_rows:
        return ThemedFigure()
    title = f"Activation norms in {_name(summary)}"
    figure = layer_curves(summary.norms, layers=summary.norm_layers, title=title, unit="median L2 norm")
    subtitle = f"median over {summary.norm_rows:,} of {summary.rows:,} rows, evenly spaced"
    figure.update_layout(title={"subtitle": {"text": subtitle}}, margin={"t": 110})
    return figure.update_yaxes(type="log", rangemode="normal", dtick="D2", tickformat="~r")


def _horizontal(figure: go.Figure, bars: int, title: str, subtitle: str, unit: str) -> go.Figure:
    figure.update_layout(
        title={"text": title, "subtitle": {"text": subtitle}},
        width=760,
        height=180 + 20 * max(3, bars),
        showlegend=False,
    )
    figure.update_xaxes(title=unit, rangemode="tozero")
    return figure.update_yaxes(autorange="reversed", type="category")


def _name(summary: StoreSummary) -> str:
    return label(summary.name, 60)
