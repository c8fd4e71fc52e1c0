"""Path patching: the effect of one head on the logits, or on later heads, alone, with everything between held."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from workbench.analysis.frozen_norm import frozen_logits
from workbench.analysis.patch_pairs import PatchPair
from workbench.analysis.patching import Metric, Runs, Side, batches, end_logits, measure
from workbench.io.errors import RequestError
from workbench.model.capture import capture
from workbench.model.circuits import check_heads_alone
from workbench.model.intervene import intervene
from workbench.model.load import Model
from workbench.model.row_records import Set
from workbench.model.unembed import Unembed, measure_unembed
from workbench.sites.grammar import Site

_RECEIVER = re.compile(r"L(\d+)H(\d+)\.([qkv])")


@dataclass(frozen=True)
class Receiver:
    """Queries, keys or values of one head; keys and values are those of its group."""

    name: str
    site: Site
    head: int


def parse_receivers(model: Model, names: Sequence[str]) -> tuple[Receiver, ...]:
    """Returns the inputs of heads that `names` name, by layer: "L9H6.q", "L9H6.k", "L9H6.v"; none for ("logits",).

    Raises:
        RequestError: Another form, no such layer, head or site, or the logits together with heads.
    """
    if tuple(names) == ("logits",):
        return ()
    if "logits" in names or not names:
        raise RequestError('receivers must be "logits" alone, or queries, keys and values of heads, such as L9H6.q')
    receivers = [_receiver(model, name) for name in names]
    return tuple(sorted(receivers, key=lambda receiver: receiver.site.layer or 0))


def _receiver(model: Model, name: str) -> Receiver:
    match = _RECEIVER.fullmatch(name)
    if match is None:
        raise RequestError(f"receiver {name!r} is none of logits, L9H6.q, L9H6.k, L9H6.v")
    layer, head, part = int(match[1]), int(match[2]), match[3]
    (z,) = model.site_map.select((f"z.{layer}",))
    kinds = (part,) if part == "v" else (part, f"rot_{part}")
    sites = model.site_map.sites
    site_names = [f"blocks.{layer}.attn.hook_{kind}" for kind in kinds]
    site = next((sites[site_name] for site_name in site_names if site_name in sites), None)
    if site is None or site.axes[0] != "head":
        raise RequestError(f"receiver {name!r}: {model.architecture} has no site {part}.{layer} with heads")
    heads, site_heads = z.shape[0] or 0, site.shape[0] or 0
    if not 0 <= head < heads:
        raise RequestError(f"receiver {name!r}: layer {layer} has the heads 0 to {heads - 1}")
    return Receiver(name, site, head * site_heads // heads)


def _mlps(model: Model) -> tuple[Site, ...]:
    """Output of the MLP of every layer: mlp_out, or what the block multiplies before it adds it (Granite)."""
    multiplied = model.site_map.factors
    layers = range(model.site_map.n_layers)
    names = ["mlp.hook_out" if f"blocks.{layer}.hook_mlp_out" in multiplied else "hook_mlp_out" for layer in layers]
    return model.site_map.select([f"blocks.{layer}.{name}" for layer, name in zip(layers, names, strict=True)])


@dataclass(frozen=True)
class PathRuns:
    """Both runs of every pair with the outputs of all heads and MLPs, and what path patching needs of them."""

    runs: Runs
    heads: tuple[Site, ...]
    """z of every layer that has it."""
    mlps: tuple[Site, ...]
    """Output of the MLP of every layer, where MLPs are frozen."""
    last: Site
    """resid_post of the last block."""
    receivers: tuple[Receiver, ...]
    unembed: Unembed | None
    """Final norm and unembedding, where the norm keeps its scale."""

    @classmethod
    def make(
        cls,
        model: Model,
        pairs: Sequence[PatchPair],
        receivers: Sequence[str],
        metric: Metric,
        frozen: bool,
        linear: bool,
    ) -> PathRuns:
        """Runs both sides of every pair."""
        aims = parse_receivers(model, receivers)
        if linear and aims:
            raise RequestError(
                "norm='linear' is for the receiver logits; a head's own norm acts as it is: norm='exact'"
            )
        check_heads_alone(model)
        heads = model.site_map.select(("z",))
        mlps = _mlps(model) if frozen else ()
        (last,) = model.site_map.select((f"resid_post.{model.site_map.n_layers - 1}",))
        runs = Runs.make(model, pairs, (*heads, *mlps, last), metric, False)
        unembed = measure_unembed(model.module, model.site_map.last_block) if linear else None
        return cls(runs, heads, mlps, last, aims, unembed)

    def effect(
        self,
        base: Side,
        sender: Site,
        head: int,
        at: Bool[Tensor, "pair position"],
        donor: Float[Tensor, "pair position ..."],
    ) -> Float64[Tensor, " pair"]:
        """Returns the metric of one side's runs when only the paths to the receivers carry the donor's z of a head."""
        runs = self.runs
        unchanged = runs.clean if base == "clean" else runs.corrupt
        values = self._values(base)
        if any((receiver.site.layer or 0) <= (sender.layer or 0) for receiver in self.receivers[-1:]):
            return unchanged
        if torch.equal(values[sender.name][at][:, head], donor[at][:, head]):
            return unchanged
        changed_values = values[sender.name].clone()
        changed_values[:, :, head] = torch.where(at[:, :, None], donor[:, :, head], changed_values[:, :, head])
        return torch.cat([self._batch(base, part, sender, changed_values) for part in batches(runs.model, runs.pairs)])

    def _values(self, base: Side) -> Mapping[str, Tensor]:
        return self.runs.clean_values if base == "clean" else self.runs.corrupt_values

    def _batch(self, base: Side, part: slice, sender: Site, changed_values: Tensor) -> Float64[Tensor, " batch"]:
        """Metric of some pairs: the held run, and, for heads as receivers, the run with their inputs alone."""
        runs, values = self.runs, self._values(base)
        fixed_sites = [site for site in (*self.heads, *self.mlps) if site is not sender and self._between(site, sender)]
        records = [Set(sender.name, changed_values[part], at="all")]
        records += [Set(site.name, values[site.name][part], at="all") for site in fixed_sites]
        ids, mask = getattr(runs.pairs, base)[part], runs.pairs.mask[part]
        if self.receivers:
            records = self._inputs(records, ids, mask)
        logits = self._logits(base, part, records)
        return measure(runs.metric, logits, runs.answers[part], runs.clean_logits[part])

    def _between(self, site: Site, sender: Site) -> bool:
        """True for a site that the sender's write can reach, and that lies before the last receiver."""
        layer, first = site.layer or 0, sender.layer or 0
        after = layer > first or (layer == first and site in self.mlps)
        return after and all(layer < (receiver.site.layer or 0) for receiver in self.receivers[-1:])

    def _inputs(self, records: list[Set], ids: Tensor, mask: Tensor) -> list[Set]:
        """Records that set the inputs of the receivers, and nothing else, to those of the held run."""
        module, inputs = self.runs.model.module, {}
        sites = tuple(dict.fromkeys(receiver.site for receiver in self.receivers))

        def keep(site: Site, tensor: Tensor, _first: int) -> None:
            inputs[site.name] = tensor.detach().cpu().clone()

        with intervene(self.runs.model, *records):
            capture(module, sites, ids, mask, keep)
        heads = dict.fromkeys((receiver.site.name, receiver.head) for receiver in self.receivers)
        return [Set(name, inputs[name][:, :, head : head + 1], at="all", head=head) for name, head in heads]

    def _logits(self, base: Side, part: slice, records: Sequence[Set]) -> Float64[Tensor, "batch vocab"]:
        """Logits at the end of some pairs' runs, with the final norm's own scale or that of the unchanged run."""
        runs, pairs = self.runs, self.runs.pairs
        ids = getattr(pairs, base)
        if self.unembed is None:
            return end_logits(runs.model, ids, pairs, part, records)
        streams: list[Tensor] = []
        with intervene(runs.model, *records):
            capture(
                runs.model.module, (self.last,), ids[part], pairs.mask[part], lambda _s, x, _f: streams.append(x.cpu())
            )
        rows = torch.arange(len(streams[0])), pairs.end[part]
        return frozen_logits(self.unembed, self._values(base)[self.last.name][part][rows], streams[0][rows])
