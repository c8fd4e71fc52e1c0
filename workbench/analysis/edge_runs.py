"""Runs in which chosen edges alone carry the clean run's values, and scores of all edges from gradients.

A run goes through the model's own blocks one by one. Each receiver gets an input of its own: the corrupt run's stream
plus what the kept senders add in this run beyond what they add in the corrupt one. Nothing is re-implemented: blocks
are called with these inputs, and queries, keys and values, or the MLP's input, are set inside of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from workbench.analysis.attribution import site_gradients
from workbench.analysis.edge_graph import EdgeGraph, EdgeReceiver
from workbench.analysis.patching import Runs, batches, measure
from workbench.io.errors import RequestError
from workbench.io.torch_state import plain_torch
from workbench.model.attention import AttentionInputs, change_attention
from workbench.model.capture import in_site_shape, read_tensors
from workbench.model.forward import attention_name, change_tensor, evaluating, run
from workbench.model.gradients import without_weight_gradients
from workbench.model.unembed import Unembed
from workbench.sites.grammar import Site


class _Enough(BaseException):
    """Leaves a block when everything that is read has come."""


@dataclass(frozen=True)
class EdgeRuns:
    """Both runs of every pair with the values at all parts of a model."""

    graph: EdgeGraph
    runs: Runs
    unembed: Unembed

    # ---- scores -----------------------------------------------------------------------------------------

    @plain_torch()
    def scores(self) -> Float64[np.ndarray, "pair sender receiver"]:
        """Returns (a_u(C) - a_u(K)) . dM/d(input of v) at K for each edge u -> v; 0 where there is no edge.

        Costs a pass and a backward pass, and for each head and MLP the backward pass of its input alone.
        """
        graph, runs = self.graph, self.runs
        sites = [site for layer in graph.queries for site in layer.values()]
        sites += [graph.site(f"mlp_out.{layer}") for layer in range(len(graph.queries))]
        last = graph.site(f"resid_post.{len(graph.queries) - 1}")
        gradients = site_gradients(runs, "corrupt", (*sites, last))
        parts = []
        with without_weight_gradients(runs.model.module):
            for part in batches(runs.model, runs.pairs):
                added = self._differences(part)
                self._check_sum(added, self._difference(last.name, part))
                inputs = [*self._input_gradients(part, gradients), gradients[last.name][part]]
                parts.append(torch.einsum("sbtd,rbtd->bsr", added.double(), torch.stack(inputs).double()))
        return torch.cat(parts).numpy() * graph.allowed

    def _differences(self, part: slice) -> Float[Tensor, "sender batch position d_model"]:
        """What each sender adds in the clean run beyond what it adds in the corrupt one."""
        graph = self.graph
        differences = [self._difference("resid_pre.0", part)[None]]
        with torch.no_grad():
            for layer in graph.outputs:
                differences.append(graph.writes(layer, self._difference(f"z.{layer}", part)))
                differences.append(self._difference(f"mlp_out.{layer}", part)[None])
        return torch.cat(differences)

    def _check_sum(self, added: Tensor, last: Tensor) -> None:
        """Refuses a model whose last stream is not the sum of what its parts add."""
        rounding = 1e-4 if self.runs.model.dtype in (torch.float32, torch.float64) else 0.05
        error = (added.double().sum(0) - last.double()).norm()
        if not error <= rounding * added.double().flatten(1).norm(dim=1).sum():
            raise RequestError(
                f"edges: what heads and MLPs of {self.runs.model.architecture} add does not sum to its last residual "
                f"stream: it misses {float(error / last.double().norm()):.2g} of the difference between clean and "
                "corrupt run; use path-patching or attribution-patching"
            )

    def _difference(self, name: str, part: slice) -> Tensor:
        site = self.graph.site(name).name
        return self.runs.clean_values[site][part] - self.runs.corrupt_values[site][part]

    def _input_gradients(self, part: slice, gradients: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Gradient of the metric with respect to the input of each receiver but the logits, alone."""
        graph = self.graph
        for layer, call in enumerate(self._calls(part)):
            sites = graph.queries[layer]
            out, middle = graph.site(f"mlp_out.{layer}"), graph.mlp_input(layer)
            stream = self._corrupt(graph.site(f"resid_pre.{layer}"), part).to(call.device).requires_grad_()
            read_sites = (*sites.values(), out, *(() if graph.parallel[layer] else (middle,)))
            read = call.read(stream, read_sites)
            for site in sites.values():
                tensor, gradient = read[site.name], gradients[site.name][part]
                for head in range(gradient.shape[2]):
                    single = torch.zeros_like(gradient)
                    single[:, :, head] = gradient[:, :, head]
                    yield _pulled_back(tensor, stream, single)
            source = stream if graph.parallel[layer] else read[middle.name].tensor
            yield _pulled_back(read[out.name], source, gradients[out.name][part])

    # ---- runs of chosen edges ---------------------------------------------------------------------------

    @plain_torch()
    def metric(self, kept: Bool[np.ndarray, "sender receiver"]) -> Float64[Tensor, " pair"]:
        """Returns the metric of each pair when the kept edges alone carry the clean run's values.

        With all edges it is that of the clean run, with none that of the corrupt one.
        """
        parts = []
        with torch.no_grad():
            for part in batches(self.runs.model, self.runs.pairs):
                stream = self._last_stream(part, kept)
                end = self.runs.pairs.end[part]
                logits = self.unembed(stream[torch.arange(len(end)), end].float()).double()
                parts.append(measure(self.runs.metric, logits, self.runs.answers[part], self.runs.clean_logits[part]))
        return torch.cat(parts)

    def _last_stream(
        self, part: slice, edges: Bool[np.ndarray, "sender receiver"]
    ) -> Float[Tensor, "batch position d"]:
        graph, column = self.graph, {receiver.name: index for index, receiver in enumerate(self.graph.receivers)}
        added: list[Tensor | None] = [self._difference("resid_pre.0", part)]  # by sender; None: as in the corrupt run

        def entering(site: Site, receiver: str) -> Tensor | None:
            """The input of a receiver; None if it is that of the corrupt run."""
            terms = [term for term, keep in zip(added, edges[:, column[receiver]], strict=False) if keep]
            clean_terms = [term for term in terms if term is not None]
            return self._corrupt(site, part) + sum(clean_terms) if clean_terms else None

        for layer, call in enumerate(self._calls(part)):
            values = self._queries(layer, call, part, entering)
            heads = graph.outputs[layer].heads
            if values is None:
                added += [None] * heads
            else:
                z = graph.site(f"z.{layer}")
                base = self._corrupt(graph.site(f"resid_pre.{layer}"), part).to(call.device)
                live = call.read(base, (z,), values)[z.name].rows().cpu()
                added += list(graph.writes(layer, live - self._corrupt(z, part)))
            middle, out = graph.mlp_input(layer), graph.site(f"mlp_out.{layer}")
            inside = entering(middle, f"MLP{layer}")
            if inside is None:
                added.append(None)
                continue
            stream, changes = inside.to(call.device), None
            if not graph.parallel[layer]:
                changes = {middle: stream}
                stream = self._corrupt(graph.site(f"resid_pre.{layer}"), part).to(call.device)
            added.append(call.read(stream, (out,), changes)[out.name].rows().cpu() - self._corrupt(out, part))
        last = graph.site(f"resid_post.{len(graph.queries) - 1}")
        stream = entering(last, "logits")
        return self._corrupt(last, part) if stream is None else stream

    def _queries(
        self, layer: int, call: _BlockCall, part: slice, entering: Callable[[Site, str], Tensor | None]
    ) -> dict[Site, Tensor] | None:
        """Queries, keys and values of a layer, each head's from its own input; None: those of the corrupt run."""
        graph, before = self.graph, self.graph.site(f"resid_pre.{layer}")
        sites = graph.queries[layer]
        values = {kind: self._corrupt(site, part).clone() for kind, site in sites.items()}
        groups: list[tuple[Tensor, list[EdgeReceiver]]] = []
        for receiver in (
            receiver for receiver in graph.receivers if receiver.layer == layer and receiver.kind in sites
        ):
            stream = entering(before, receiver.name)
            if stream is None:
                continue
            group = next((members for group_stream, members in groups if torch.equal(group_stream, stream)), None)
            if group is None:
                groups.append((stream, [receiver]))
            else:
                group.append(receiver)
        for stream, members in groups:
            kinds = {member.kind: sites[member.kind] for member in members}
            read = call.read(stream.to(call.device), tuple(kinds.values()))
            for member in members:
                rows = read[sites[member.kind].name].rows().cpu()
                values[member.kind][:, :, member.head] = rows[:, :, member.head]
        return {sites[kind]: value.to(call.device) for kind, value in values.items()} if groups else None

    def _corrupt(self, site: Site, part: slice) -> Tensor:
        return self.runs.corrupt_values[site.name][part]

    def _calls(self, part: slice) -> list[_BlockCall]:
        """Arguments of each block in the corrupt run: masks and positions, which no change touches."""
        module, calls = self.runs.model.module, []
        with ExitStack() as stack:
            for layer in range(len(self.graph.queries)):
                block = module.get_submodule(f"{self.runs.model.site_map.blocks}.{layer}")

                def keep(part_of_model: nn.Module, args: Any, kwargs: Any) -> None:
                    calls.append(_BlockCall(module, part_of_model, args, dict(kwargs)))

                stack.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
            stack.enter_context(without_weight_gradients(module))
            with torch.no_grad():
                run(module, self.runs.pairs.corrupt[part], self.runs.pairs.mask[part], gradients=True)
        return calls


@dataclass(frozen=True)
class _Read:
    """A tensor of the model as it came, and the site that it is the value of."""

    site: Site
    tensor: Tensor
    heads_first: bool
    batch: tuple[int, ...]

    def rows(self) -> Tensor:
        """The value, axes (batch, position, *row)."""
        tensor = self.tensor.transpose(1, 2) if self.heads_first else self.tensor
        return in_site_shape(self.site, tensor, self.batch)

    def shaped(self, rows: Tensor) -> Tensor:
        """Rows in the shape of the tensor."""
        rows = rows.transpose(1, 2) if self.heads_first else rows
        return rows.reshape(self.tensor.shape).to(self.tensor)


def _pulled_back(read: _Read, source: Tensor, gradient: Tensor) -> Tensor:
    """Gradient at the source of a number whose gradient at a tensor is given."""
    (result,) = torch.autograd.grad(read.tensor, source, read.shaped(gradient), retain_graph=True)
    return result.detach().cpu().float().reshape(*read.batch, -1)  # some modules merge batch and position


@dataclass(frozen=True)
class _BlockCall:
    """A block with the arguments that the model gave it."""

    module: nn.Module
    block: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        """Device of the block."""
        return next(self.block.parameters()).device

    def read(
        self,
        stream: Float[Tensor, "batch position d_model"],
        sites: Sequence[Site],
        changes: Mapping[Site, Tensor] | None = None,
    ) -> dict[str, _Read]:
        """Runs the block on another stream, with sites set to values, and returns the tensors of others."""
        reads: dict[str, _Read] = {}

        def keep(site: Site, tensor: Tensor | None, heads_first: bool) -> None:
            if tensor is not None:
                reads.setdefault(site.name, _Read(site, tensor, heads_first, tuple(stream.shape[:2])))
            if len(reads) == len(sites):
                raise _Enough

        with ExitStack() as stack:
            stack.enter_context(evaluating(self.block))
            stack.enter_context(change_tensor(self.block, "in", lambda _tensor: stream))
            for site, value in (changes or {}).items():
                stack.enter_context(_set(self.module, site, value))
            stack.enter_context(read_tensors(self.module, sites, keep))
            with suppress(_Enough):
                self.block(*self.args, **self.kwargs)
        return reads


@contextmanager
def _set(module: nn.Module, site: Site, value: Tensor) -> Iterator[None]:
    """Sets a site to values (batch, position, *row) inside the block."""
    part = module.get_submodule(site.tap.path)
    if site.tap.part in ("query", "key", "value"):

        def replaced(inputs: AttentionInputs) -> AttentionInputs:
            tensor = getattr(inputs, site.tap.part)
            return inputs.replaced(**{site.tap.part: value.transpose(1, 2).to(tensor)})

        with change_attention(attention_name(module), part, replaced):
            yield
        return
    side = "in" if site.tap.part == "in" else "out"
    with change_tensor(part, side, lambda tensor: value.reshape(tensor.shape).to(tensor)):
        yield
