"""Edges between the parts of a model: what each part adds to the stream, and which later parts read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.io.errors import RequestError
from workbench.model.circuits import HeadOutput, check_added, head_outputs
from workbench.model.forward import the_tensor
from workbench.model.load import Model
from workbench.sites.grammar import Site

EMBEDDING, LOGITS = "embedding", "logits"


@dataclass(frozen=True)
class Sender:
    """A part that adds to the stream: the embedding, a head, or the MLP of a layer."""

    name: str
    layer: int
    """-1 for the embedding."""
    head: int | None = None


@dataclass(frozen=True)
class EdgeReceiver:
    """A part that reads the stream: queries, keys or values of a head, the MLP of a layer, or the logits."""

    name: str
    layer: int
    """The number of layers for the logits."""
    kind: str
    """q, k, v, mlp or logits."""
    head: int = 0


@dataclass(frozen=True)
class EdgeGraph:
    """Senders and receivers of a model, with the sites of their values."""

    model: Model
    outputs: Mapping[int, HeadOutput]
    queries: tuple[Mapping[str, Site], ...]
    """For each layer the sites of q, k and v."""
    parallel: tuple[bool, ...]
    """True for a layer whose MLP reads the same stream as its attention."""

    @classmethod
    def of(cls, model: Model) -> EdgeGraph:
        """Returns the graph of a model.

        Raises:
            RequestError: A layer without separate heads, queries, keys, values or MLP, one that adds more than these,
                or one with a norm behind attention, which makes what a head adds depend on the others.
        """
        outputs, layers = head_outputs(model), range(model.site_map.n_layers)
        check_added(outputs, model)
        for layer in layers:
            if layer not in outputs:
                raise RequestError(f"edges: layer {layer} of {model.architecture} has no separate attention heads")
            if outputs[layer].norm is not None:
                raise RequestError(
                    f"edges: {model.architecture} has a norm behind attention, so that a head's write depends on the "
                    "other heads; use attribution-patching of z"
                )
        queries = tuple({part: _query_site(model, part, layer) for part in "qkv"} for layer in layers)
        site_names = {site.short for site in model.site_map.sites.values()}
        if missing := [layer for layer in layers if f"mlp_out.{layer}" not in site_names]:
            raise RequestError(
                f"edges: layer {missing[0]} of {model.architecture} has no site mlp_out; use path-patching"
            )
        return cls(model, outputs, queries, tuple(f"resid_mid.{layer}" not in site_names for layer in layers))

    @cached_property
    def senders(self) -> tuple[Sender, ...]:
        """Senders in the order of the pass."""
        senders = [Sender(EMBEDDING, -1)]
        for layer, output in self.outputs.items():
            senders += [Sender(f"L{layer}H{head}", layer, head) for head in range(output.heads)]
            senders.append(Sender(f"MLP{layer}", layer))
        return tuple(senders)

    @cached_property
    def receivers(self) -> tuple[EdgeReceiver, ...]:
        """Receivers in the order of the pass; keys and values are those of key/value heads."""
        receivers = []
        for layer, sites in enumerate(self.queries):
            for kind, site in sites.items():
                heads = range(site.shape[0] or 0)
                receivers += [EdgeReceiver(f"L{layer}H{head}.{kind}", layer, kind, head) for head in heads]
            receivers.append(EdgeReceiver(f"MLP{layer}", layer, "mlp"))
        return (*receivers, EdgeReceiver(LOGITS, len(self.queries), "logits"))

    @cached_property
    def allowed(self) -> Bool[np.ndarray, "sender receiver"]:
        """Edges that exist: what a sender adds reaches the receiver's input."""
        return np.array([[self._reaches(sender, receiver) for receiver in self.receivers] for sender in self.senders])

    def _reaches(self, sender: Sender, receiver: EdgeReceiver) -> bool:
        if sender.layer < receiver.layer:
            return True
        same_block = sender.layer == receiver.layer and sender.head is not None and receiver.kind == "mlp"
        return same_block and not self.parallel[sender.layer]

    def site(self, name: str) -> Site:
        """Returns the one site of a name."""
        return self.model.site_map.select((name,))[0]

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """All sites whose values are needed."""
        layers = range(len(self.queries))
        names = [f"{kind}.{layer}" for layer in layers for kind in ("resid_pre", "z", "mlp_out")]
        names += [f"resid_mid.{layer}" for layer in layers if not self.parallel[layer]]
        names += [site.name for sites in self.queries for site in sites.values()]
        return self.model.site_map.select((*names, f"resid_post.{len(layers) - 1}"))

    def mlp_input(self, layer: int) -> Site:
        """Returns the stream that the MLP of a layer reads."""
        return self.site(f"{'resid_pre' if self.parallel[layer] else 'resid_mid'}.{layer}")

    def writes(
        self, layer: int, z: Float[Tensor, "batch position head d_head"]
    ) -> Float[Tensor, "head batch position d_model"]:
        """Returns what each head of a layer adds to the stream for a difference of z, without the projection's bias."""
        project, parts = self.outputs[layer].project, []
        device = next(project.parameters()).device
        constant = the_tensor(project(torch.zeros_like(z.flatten(2)).to(device)))
        for head in range(z.shape[2]):
            single = torch.zeros_like(z)
            single[:, :, head] = z[:, :, head]
            parts.append((the_tensor(project(single.flatten(2).to(device))) - constant).cpu())
        return torch.stack(parts)


def _query_site(model: Model, part: str, layer: int) -> Site:
    kinds = (part,) if part == "v" else (part, f"rot_{part}")
    sites = model.site_map.sites
    site = next((sites[name] for kind in kinds if (name := f"blocks.{layer}.attn.hook_{kind}") in sites), None)
    if site is None or site.axes[0] != "head":
        raise RequestError(f"edges: {model.architecture} has no site {part}.{layer} with heads; use path-patching")
    return site
