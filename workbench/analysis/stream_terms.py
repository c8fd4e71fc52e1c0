"""The last residual stream as a sum of what embedding and blocks added to it, read from a store and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from workbench.io.errors import RequestError
from workbench.store.reader import Store

Parts = Literal["blocks", "sublayers", "heads", "neurons"]
"""How fine the sum is: whole blocks; attention and MLP of each block; their heads; their neurons."""

SUBLAYERS = {"attn_out": "attention", "mlp_out": "MLP"}
"""Sites of what attention and MLP add, and the first word of their terms where these are differences of the stream."""

_TRIED = 512  # rows on which embedding and position embedding are compared


@dataclass(frozen=True)
class StreamTerm:
    """One term of the sum: values of some sites, minus those of others."""

    name: str
    layer: int | None
    plus: tuple[str, ...]
    minus: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """First word of the name: embedding, attn_out, mlp_out, attention, MLP, block, rest."""
        return self.name.split(".")[0].split(" ")[0]

    def read(self, store: Store, rows: Int[np.ndarray, " row"]) -> Float64[Tensor, "row d_model"]:
        """Returns the term for some rows, in float64 on the CPU."""
        values = [store[site][rows].double().cpu() for site in (*self.plus, *self.minus)]
        return sum(values[len(self.plus) :], torch.zeros(())).neg() + sum(values[: len(self.plus)])  # pyright: ignore[reportReturnType]  # a sum of tensors


def plan_terms(store: Store, parts: Parts) -> tuple[StreamTerm, ...]:
    """Returns the terms whose sum is the last residual stream, in the order of the forward pass.

    A part of a block that was not recorded, or that the architecture does not have as a site (Granite multiplies what
    it adds), is the change of the stream between resid_pre, resid_mid and resid_post; without resid_mid it is one term
    with the rest of the block. Where embed stands for resid_pre.0, block 0 holds a position embedding, too.

    Args:
        store: The recorded activations.
        parts: How fine the sum is; heads and neurons are terms of sublayers here.

    Raises:
        RequestError: A site that is needed was not recorded.
    """
    layers = store.manifest.model.n_layers
    labels = {site.label for site in store.sites}
    store.require(f"resid_post.{layers - 1}")
    terms = list(_embedding(store, labels))
    for layer in range(layers):
        first = "embed" if "embed" in labels and "resid_pre.0" not in labels else "resid_pre.0"
        before = f"resid_pre.{layer}" if f"resid_pre.{layer}" in labels else f"resid_post.{layer - 1}"
        whole = [f"resid_post.{layer}", before if layer else first]
        present = [] if parts == "blocks" else list(_sublayers(layer, whole[1], labels))
        terms += present
        if len(present) == 2:
            continue
        if parts != "blocks" and not {*whole} <= labels:
            store.require(*(f"{kind}.{layer}" for kind in SUBLAYERS))
        store.require(*whole)
        name = f"rest of block {layer}" if present else f"block {layer}"
        present_sites = [site for term in present for site in term.plus]
        terms.append(StreamTerm(name, layer, (whole[0],), (whole[1], *present_sites)))
    for term in terms:
        _check_width(store, (*term.plus, *term.minus))
    return tuple(terms)


def _sublayers(layer: int, before: str, labels: set[str]) -> Iterator[StreamTerm]:
    """What attention and MLP of a block add: their sites, or differences of the stream where it has both ends."""
    middle = f"resid_mid.{layer}"
    ends = {"attn_out": (middle, before), "mlp_out": (f"resid_post.{layer}", middle)}
    for kind, (after, start) in ends.items():
        if f"{kind}.{layer}" in labels:
            yield StreamTerm(f"{kind}.{layer}", layer, (f"{kind}.{layer}",))
        elif {middle, before, f"resid_post.{layer}"} <= labels:
            yield StreamTerm(f"{SUBLAYERS[kind]} of block {layer}", layer, (after,), (start,))


def _embedding(store: Store, labels: set[str]) -> Iterator[StreamTerm]:
    if "resid_pre.0" not in labels:
        store.require("embed" if "embed" in labels else "resid_pre.0")
        yield StreamTerm("embedding", None, ("embed",))
    elif "embed" in labels and _has_positions(store):
        yield StreamTerm("embedding", None, ("embed",))
        yield StreamTerm("position embedding", None, ("resid_pre.0",), ("embed",))
    else:
        yield StreamTerm("embedding", None, ("resid_pre.0",))


def _has_positions(store: Store) -> bool:
    """True if the first stream is the token's embedding plus a vector of the position, on the first rows."""
    embed, stream = (store[site][:_TRIED].double().cpu() for site in ("embed", "resid_pre.0"))
    if embed.shape != stream.shape:
        return False
    size = (embed.norm(dim=-1) + stream.norm(dim=-1)) * 4 * _eps(store["resid_pre.0"].site.dtype)
    added = stream - embed
    positions = store.tokens["position"].to_numpy()[: len(added)]
    _, first, group = np.unique(positions, return_index=True, return_inverse=True)
    equal = (added - added[first[group]]).norm(dim=-1) <= 2 * size
    ids = store.tokens["token_id"].to_numpy()[: len(added)]
    compared = bool((ids != ids[first[group]]).any())
    return compared and bool(equal.all()) and bool((added.norm(dim=-1) > size).any())


def _check_width(store: Store, sites: Sequence[str]) -> None:
    width = store[f"resid_post.{store.manifest.model.n_layers - 1}"].shape[1:]
    for site in sites:
        if store[site].shape[1:] != width or len(width) != 1:
            raise RequestError(
                f"{site} has rows of shape {tuple(store[site].shape[1:])} and the last residual stream "
                f"{tuple(width)}: it is not a sum of one stream"
            )


def check_sum(
    store: Store,
    terms: Mapping[StreamTerm, Float64[Tensor, "row d_model"]],
    stream: Float64[Tensor, "row d_model"],
    rows: Int[np.ndarray, " row"],
) -> None:
    """Refuses terms that do not add up to the last residual stream, by the name of the block where the sum breaks.

    The error allowed is that of rounding to the stored type, and of the model's own sums in its type.

    Raises:
        RequestError: The terms do not add up.
    """
    total, size = torch.zeros_like(stream), stream.norm(dim=-1)
    last = f"resid_post.{store.manifest.model.n_layers - 1}"
    stored = _eps(store[last].site.dtype)
    computed = _eps(store.manifest.model.dtype)
    tolerance = 2 * stored + 2 * len(terms) ** 0.5 * computed
    labels, broken = {site.label for site in store.sites}, ""
    ordered = list(terms.items())
    for index, (term, value) in enumerate(ordered):
        total, size = total + value, size + value.norm(dim=-1)
        ends = index + 1 == len(ordered) or ordered[index + 1][0].layer != term.layer
        site = f"resid_post.{term.layer}" if term.layer is not None else "resid_pre.0"
        if not ends or site not in labels or broken:
            continue
        values = stream if site == last else store[site][rows].double().cpu()
        if not bool(((total - values).norm(dim=-1) <= tolerance * size).all()):
            broken = site
    error = (total - stream).norm(dim=-1)
    if bool((error <= tolerance * size).all()):
        return
    worst = int((error / size).argmax())
    names = ", ".join(term.name for term, _ in ordered if term.layer == _layer(broken or last))
    raise RequestError(
        f"the terms do not add up to {last}: at row {rows[worst]} the sum misses it by {error[worst]:.2g} of "
        f"{stream[worst].norm():.2g}; the first sum that breaks is {broken or last}, to which "
        f"{names or 'the embedding'} is added; choose parts='blocks', which needs resid_pre.0 and resid_post"
    )


def _layer(site: str) -> int | None:
    return int(site.rsplit(".", 1)[1]) if site.startswith("resid_post") else None


def _eps(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype, torch.float32)).eps
