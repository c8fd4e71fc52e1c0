"""Attention that each position receives and pays, read from patterns or from what was derived while recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int

from workbench.analysis.read_layers import choose_layers, layers_of, require_any
from workbench.model.attention import Columns, row_entropy
from workbench.store.reader import Store

_DERIVED = {"alpha": "attn_received", "column": "attn_received_entropy", "row": "attn_entropy", "paid": "attn_first"}


def attention_source(store: Store, layers: Sequence[int] | None = None) -> tuple[str, list[int]]:
    """Returns the source of attention, "pattern" or "derived", and its layers.

    It is the one that was recorded at more layers, of `layers` if they are given; `pattern` if equal.

    Args:
        store: The recorded activations.
        layers: Layers to read; negative ones count from the last block. None: all that the source has.

    Raises:
        RequestError: No attention was recorded, or none at one of `layers`.
    """
    layers_by_source = {"pattern": layers_of(store, "pattern"), "derived": layers_of(store, "attn_received")}
    n_layers = store.manifest.model.n_layers
    chosen_layers = None if layers is None else {layer % n_layers for layer in layers}
    source = max(
        layers_by_source,
        key=lambda name: len(
            layers_by_source[name] if chosen_layers is None else chosen_layers.intersection(layers_by_source[name])
        ),
    )
    require_any(store, "attn_received", "pattern")
    return source, choose_layers(layers_by_source[source], layers, n_layers)


def read_attention(
    store: Store, source: str, layer: int, rows: Int[np.ndarray, "sequence position"], sink: int
) -> dict[str, Float[np.ndarray, "sequence position head"]]:
    """Returns attention statistics of sequences, in float64, as far as they were recorded.

    "alpha", the mean attention that a key receives from the queries that see it, and "column", the entropy of that
    attention; "row", the entropy of a query's attention, and "paid", its attention to position `sink`. Entropies in
    nats.

    Args:
        store: The recorded activations.
        source: What `attention_source` gives.
        layer: The layer to read.
        rows: Ids of the rows.
        sink: Position that "paid" is about; derived attention has it for position 0 only.
    """
    if source == "pattern":
        pattern = store["pattern", layer][rows][..., : rows.shape[1]].double()
        block = rearrange(pattern, "sequence query head key -> sequence head query key")
        columns = Columns(torch.ones(rows.shape))
        columns.add(0, block)
        statistics = {"alpha": columns.received(), "column": columns.entropy(), "row": row_entropy(block)}
        return {name: part.numpy() for name, part in {**statistics, "paid": pattern[..., sink]}.items()}
    kinds = {part: kind for part, kind in _DERIVED.items() if layer in layers_of(store, kind)}
    if sink:
        kinds.pop("paid", None)
    return {part: store[kind, layer][rows].double().numpy() for part, kind in kinds.items()}


def read_alpha(
    store: Store, source: str, layer: int, rows: Int[np.ndarray, "sequence position"]
) -> Float[np.ndarray, "sequence position head"]:
    """Returns the mean attention that each key receives from the queries at and after it, in float64.

    Args:
        store: The recorded activations.
        source: What `attention_source` gives.
        layer: The layer to read.
        rows: Ids of the rows.
    """
    if source == "derived":
        return store["attn_received", layer][rows].double().numpy()
    pattern = store["pattern", layer][rows][..., : rows.shape[1]].double()
    visible = rearrange(pattern, "sequence query head key -> sequence head query key").tril()
    queries = torch.arange(rows.shape[1], 0, -1, dtype=torch.float64)
    return rearrange(visible.sum(2) / queries, "sequence head key -> sequence key head").numpy()


def attention_sites(store: Store, source: str, layers: Sequence[int]) -> list[str]:
    """Returns the sites that `read_attention` reads at these layers."""
    kinds = ("pattern",) if source == "pattern" else tuple(_DERIVED.values())
    return [f"{kind}.{layer}" for layer in layers for kind in kinds if layer in layers_of(store, kind)]


def stack_heads(
    layers: Sequence[int], values: Mapping[int, Mapping[str, np.ndarray]], names: Sequence[str]
) -> dict[str, Float[np.ndarray, "layer head ..."]]:
    """Returns values of single layers, whose first axis is heads, as arrays over (layer, head, ...).

    NaN stands where a layer was not recorded or has fewer heads. A name that no layer has is left out.
    """
    arrays: dict[str, np.ndarray] = {}
    for name in names:
        parts = {layer: part[name] for layer, part in values.items() if name in part}
        if not parts:
            continue
        heads = max(len(next(iter(part.values()))) for part in values.values())
        rest = next(iter(parts.values())).shape[1:]
        arrays[name] = np.full((len(layers), heads, *rest), np.nan)
        for layer, part in parts.items():
            arrays[name][layers.index(layer), : len(part)] = part
    return arrays


def stack_layers(
    layers: Sequence[int], values: Mapping[int, Mapping[str, float]]
) -> dict[str, Float[np.ndarray, " layer"]]:
    """Returns numbers of single layers as arrays over (layer), NaN where a layer has none of a name."""
    names = dict.fromkeys(name for part in values.values() for name in part)
    return {name: np.array([values.get(layer, {}).get(name, np.nan) for layer in layers]) for name in names}


def strongest_patterns(
    store: Store,
    received: Float[np.ndarray, "layer head"],
    layers: Sequence[int],
    rows: Int[np.ndarray, " position"],
    number: int,
) -> tuple[Int[np.ndarray, " example"], Int[np.ndarray, " example"], Float[np.ndarray, "example query key"], int]:
    """Returns layer, head and attention over `rows` of the heads with the largest `received`, NaN left out.

    Only layers of which whole patterns were recorded count, so that there may be fewer than `number`, or none; the
    last value is the number of heads that were chosen among.
    """
    pattern_layers = set(layers_of(store, "pattern"))
    ranked = [np.unravel_index(i, received.shape) for i in np.argsort(-received, axis=None, kind="stable")]  # NaN last
    places = [(int(layers[i]), int(head)) for i, head in ranked if not np.isnan(received[i, head])]
    places = [place for place in places if place[0] in pattern_layers]
    example_layer, example_head = np.array(places[:number], dtype=np.int64).reshape(-1, 2).T
    patterns = [store["pattern", layer][rows][:, head, : len(rows)].float().numpy() for layer, head in places[:number]]
    stacked = np.stack(patterns) if patterns else np.zeros((0, len(rows), len(rows)), np.float32)
    return example_layer, example_head, stacked, len(places)
