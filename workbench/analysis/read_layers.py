"""Layers at which a store has sites, and those of them that a setting names."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.io.errors import RequestError
from workbench.store.layers import offered_label
from workbench.store.reader import Store


def layers_of(store: Store, *kinds: str) -> list[int]:
    """Returns the layers at which a site of any of these kinds was recorded."""
    labels = [(site.short or "").split(".") for site in store.sites]
    return sorted({int(parts[1]) for parts in labels if parts[0] in kinds})


def require_any(store: Store, *kinds: str) -> None:
    """Raises RequestError for a store without a site of these kinds; the text names one that its model offers."""
    if not layers_of(store, *kinds):
        store.require(offered_label(store.manifest, *kinds))


def layers_text(layers: Sequence[int]) -> str:
    """Returns ascending layers as text, three or more in a row by their ends: "0 to 4, 6, 8 to 29"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def choose_layers(
    known: Sequence[int],
    layers: Sequence[int] | None,
    n_layers: int,
    lack: str = "was not recorded; recorded are",
) -> list[int]:
    """Returns the layers of `layers` in ascending order, each once; all `known` ones for None.

    Args:
        known: Layers that can be read.
        layers: Layers to read; negative ones count from the last of the model's `n_layers`.
        n_layers: Number of the model's blocks.
        lack: Reason for an error about another layer, before the list of the known ones.

    Raises:
        RequestError: A layer that is not among `known`, or none at all.
    """
    if layers is None:
        return list(known)
    numbers = {layer: layer + n_layers if layer < 0 else layer for layer in layers}
    if missing := [layer for layer, number in sorted(numbers.items()) if number not in known]:
        raise RequestError(f"layers: layer {missing[0]} {lack} {', '.join(map(str, known))}")
    if not numbers:
        raise RequestError("layers is empty; name one or more, or leave it out for all")
    return sorted(set(numbers.values()))
