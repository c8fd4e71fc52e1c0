"""Sites with short names that a model does not offer, with the reasons, in the form in which a store keeps them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from workbench.sites.grammar import DERIVED, SHORT_NAMES, SiteMap


@dataclass(frozen=True)
class AbsentSites:
    """Sites that a model does not offer, all for one reason."""

    kinds: tuple[str, ...]
    """Short names without the layer."""
    layers: tuple[int, ...] | None
    """Layers that lack them. None: all, or sites outside of the blocks."""
    reason: str


def absent_sites(sites: SiteMap) -> tuple[AbsentSites, ...]:
    """Returns what a model lacks of the sites with short names, in the order of these names."""
    missing_layers: dict[tuple[str, str], list[int]] = {}
    for kind, template in SHORT_NAMES.items():
        for layer in range(sites.n_layers) if "{layer}" in template else (0,):
            name = template.format(layer=layer)
            if name not in sites.recordable and name not in sites.synonyms:
                reason = sites.reason(name) or _not_in(sites, kind)
                missing_layers.setdefault((kind, reason), []).append(layer)
    kinds: dict[tuple[str, tuple[int, ...] | None], list[str]] = defaultdict(list)
    for (kind, reason), layers in missing_layers.items():
        everywhere = "{layer}" not in SHORT_NAMES[kind] or len(layers) == sites.n_layers
        kinds[reason, None if everywhere else tuple(layers)].append(kind)
    return tuple(AbsentSites(tuple(names), layers, reason) for (reason, layers), names in kinds.items())


def _not_in(sites: SiteMap, kind: str) -> str:
    if kind in DERIVED:
        return f"it is computed from {DERIVED[kind]} of single heads, which this model does not offer"
    return f"it does not exist in {sites.source}"


def absence(absent: Iterable[AbsentSites] | None, kind: str, layer: int | None = None) -> str | None:
    """Returns the reason why a model does not offer a site; None where it does, or where that is not known.

    Args:
        absent: What the model lacks, from `absent_sites`. None: not known.
        kind: Short name without the layer: `attn_received`.
        layer: The layer. None: any.
    """
    entries = (entry for entry in absent or () if kind in entry.kinds)
    return next((entry.reason for entry in entries if entry.layers is None or layer in entry.layers), None)
