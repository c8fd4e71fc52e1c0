"""Edge attribution patching: which connections between heads and MLPs carry the answer, and how few suffice.

An edge u -> v runs from a part that adds to the stream (embedding, head, MLP) to a part that reads it (queries, keys or
values of a head, MLP, logits). Its score is the first-order estimate of what patching it alone does,

    score(u -> v) = (a_u(C) - a_u(K)) . dM/d(input of v) at K

where the gradient goes through v alone. The scores are an estimate; their test is exact: with the n edges of largest
absolute score alone carrying the clean run's values, and all others those of the corrupt run, the metric is M(n), and

    F(n) = sum_p (M(n) - M(K)) / sum_p (M(C) - M(K))

is the faithfulness of these edges, beside that of n edges drawn at random. F of all edges is 1, of none 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from workbench.probes.activation_patching import provenance_of_pairs, ratio_of_sums
from workbench.probing import (
    METRIC_UNITS,
    METRICS,
    EdgeGraph,
    EdgeRuns,
    Model,
    PatchPair,
    PromptPairs,
    RequestError,
    Result,
    Runs,
    Store,
    StoreProbe,
    Variable,
    check_fields,
    counted,
    dataset,
    faithfulness_curve,
    interval_suffix,
    intervals,
    measure_unembed,
    pairs_of,
    plain_torch,
    progress,
    provenance,
    recorded_pairs,
    resampled_means,
    some_pairs,
    strongest_edges,
    with_interval,
    with_note,
)

_LISTED = 200
_UNITS, _SHARE = "units of the metric", "share of the gap"

VARIABLES = (
    Variable("score", ("sender", "receiver"), _UNITS, "mean estimated effect of each edge; 0 where there is none", "0"),
    *with_interval(Variable("faithfulness", ("edges",), _SHARE, "recovered by the edges of largest score: F(n)", "0")),
    *with_interval(
        Variable("random_faithfulness", ("edges",), _SHARE, "recovered by as many edges drawn at random", "0")
    ),
    Variable("sum_of_scores", (), _SHARE, "sum of the scores of all edges into the logits, over the gap"),
    Variable("total", (), "edges", "number of edges"),
    Variable("half", (), "edges", "smallest tried number of edges that recovers half of the gap; NaN: none"),
    Variable("clean_metric", ("pair",), _UNITS, "metric of the clean run"),
    Variable("corrupt_metric", ("pair",), _UNITS, "metric of the corrupt run"),
    Variable("gap", (), _UNITS, "mean difference of clean and corrupt metric over the used pairs"),
)


@dataclass(frozen=True)
class EdgeAttribution(StoreProbe):
    """Scores the edges between embedding, heads, MLPs and logits, and measures how few of them recover the answer."""

    name: ClassVar[str] = "edge-attribution"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Syed et al. 2023, Attribution patching outperforms automated circuit discovery, arXiv 2310.10348",
        "Hanna et al. 2024, Have faith in faithfulness, arXiv 2403.17806",
    )
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {"random_faithfulness": "as many edges drawn at random"}

    sizes: tuple[int, ...] | None = None
    """Numbers of edges to keep. None: 1, 3, 10, 30, ... and all."""
    metric: str = "logit-difference"
    """logit-difference, log-probability, loss or kl, at the last position."""
    where: str | None = None
    """SQL over the token table: pairs with a selected token are used. None: all."""
    model: str | None = None
    """Directory or hub id of the recorded model, if the name in the store is not enough to load it."""
    resamples: int = 1000
    """Resamples of pairs for the intervals."""
    seed: int = 0
    """Random seed of the random edges and the resamples."""
    device: str | None = None
    """Device of a model that the probe loads: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "metric", one_of=METRICS)
        check_fields(self, "resamples", at_least=1, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)
        if self.sizes is not None and (not self.sizes or min(self.sizes) < 0):
            raise RequestError(f"sizes must be numbers of edges, at least one, not {self.sizes}")

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Scores and tests the edges in the pairs that a store holds, as `ActivationPatching.run` finds them.

        Costs a pass and a backward pass, a backward pass of one input for each head's queries, keys, values and MLP,
        and for each size two runs in which every distinct input of a layer costs a pass of its block.

        Args:
            store: The store.
            model: The recorded model. None: it is loaded from the setting `model` or the store's name for it.

        Raises:
            RequestError: The store has no usable pairs, or the model cannot be loaded, is another one, has no gradients
                or no edges: no separate heads, queries, keys and values, or a norm behind attention.
        """
        loaded, pairs, notes = recorded_pairs(store, self.name, model or self.model, self.where, self.device)
        return self._run(loaded, pairs, notes, provenance(store, self))

    def run_pairs(self, model: Model, pairs: PromptPairs) -> Result:
        """Scores and tests the edges in pairs of prompts without a store; see `run`.

        Args:
            model: The model.
            pairs: Pairs, such as those of `wb.prompt_pairs`.
        """
        return self._run(model, pairs_of(pairs), [], provenance_of_pairs(self, model, pairs))

    @plain_torch()
    def _run(self, model: Model, pairs: list[PatchPair], notes: list[str], known: dict[str, Any]) -> Result:
        graph = EdgeGraph.of(model)
        runs = Runs.make(model, pairs, graph.sites, self.metric, False)  # pyright: ignore[reportArgumentType]  # checked
        used = np.flatnonzero(runs.used)
        if not len(used):
            raise RequestError(
                f"none of {counted(len(pairs), 'pair')} can be used: the model does not give both right answers"
            )
        if unused := len(pairs) - len(used):
            notes.append(
                f"{unused} of {counted(len(pairs), 'pair')} left out: the model does not give both right answers"
            )
        edges = EdgeRuns(graph, some_pairs(runs, used), measure_unembed(model.module, model.site_map.last_block))
        scores = edges.scores()
        data = self._data(edges, scores, used)
        data.attrs["note"] = "; ".join(notes)
        return Result(self.name, data, self._table(graph, scores), known)

    def _data(self, edges: EdgeRuns, scores: np.ndarray, used: np.ndarray) -> Any:
        graph, runs, gap = edges.graph, edges.runs, edges.runs.gap
        total, mean = int(graph.allowed.sum()), scores.mean(0)
        sizes = sorted({min(size, total) for size in self.sizes or _sizes(total)})
        best = np.argsort(-np.where(graph.allowed, np.abs(mean), -1), axis=None, kind="stable")
        random = np.random.default_rng(self.seed).permutation(np.flatnonzero(graph.allowed.ravel()))
        recovered = {"faithfulness": best, "random_faithfulness": random}
        arrays: dict[str, Any] = {"score": mean}
        with progress("keeping edges", 2 * len(sizes), "runs") as advance:
            for name, order in recovered.items():
                values = np.zeros((len(used), len(sizes)))
                for column, size in enumerate(sizes):
                    mask = np.zeros(graph.allowed.size, bool)
                    mask[order[:size]] = True
                    values[:, column] = (edges.metric(mask.reshape(graph.allowed.shape)) - runs.corrupt).numpy()
                    advance(1)
                ratio, low, high = ratio_of_sums(values, gap, self.resamples, self.seed)
                arrays |= {name: ratio, f"{name}_low": low, f"{name}_high": high}
        enough = [size for size, share in zip(sizes, arrays["faithfulness"], strict=True) if share >= 0.5]
        arrays |= {"sum_of_scores": mean[:, -1].sum() / gap.mean(), "total": total}
        arrays |= {"half": float(enough[0]) if enough else np.nan}
        arrays |= {"clean_metric": runs.clean.numpy(), "corrupt_metric": runs.corrupt.numpy(), "gap": gap.mean()}
        names = {"sender": graph.senders, "receiver": graph.receivers}
        coords = {axis: [node.name for node in parts] for axis, parts in names.items()} | {"edges": sizes, "pair": used}
        data = dataset(VARIABLES, arrays, coords)
        data.attrs["metric_units"] = METRIC_UNITS[self.metric]
        return data

    def _table(self, graph: EdgeGraph, scores: np.ndarray) -> pd.DataFrame:
        """The 200 edges of largest absolute score, with their intervals over pairs."""
        mean = scores.mean(0)
        order = np.argsort(-np.where(graph.allowed, np.abs(mean), -1), axis=None, kind="stable")
        order = order[: min(_LISTED, int(graph.allowed.sum()))]
        sender, receiver = np.unravel_index(order, mean.shape)
        values = scores[:, sender, receiver]
        _, resampled = resampled_means(values, np.ones_like(values), resamples=self.resamples, seed=self.seed)
        low, high = intervals(resampled, len(values))
        return pd.DataFrame(
            {
                "sender": [graph.senders[index].name for index in sender],
                "receiver": [graph.receivers[index].name for index in receiver],
                "score": mean[sender, receiver],
                "low": low,
                "high": high,
            }
        )

    @staticmethod
    def headline(result: Result) -> str:
        """Returns how few edges recover half of the gap, beside random ones, and the strongest edges."""
        data, table = result.data, result.table
        half, total = float(data["half"]), int(data["total"])
        size = data["edges"].to_numpy()[-1] if np.isnan(half) else int(half)
        at = data.sel(edges=size)
        share, low, high, random = (
            100 * float(at[name])
            for name in ("faithfulness", "faithfulness_low", "faithfulness_high", "random_faithfulness")
        )
        interval = interval_suffix(low, high, ".0f")
        text = (
            f"The {counted(size, 'edge')} of largest score, of {total:,}, recover {share:z.0f} % of the gap{interval}"
        )
        text += f"; random ones {random:z.0f} %; strongest: "
        units = data.attrs["metric_units"]
        best = zip(*(table[name].head(3) for name in ("sender", "receiver", "score")), strict=True)
        text += ", ".join(f"{sender} to {receiver} {score:+z.2f}" for sender, receiver, score in best)
        return with_note(f"{text} {units}; {counted(data.sizes['pair'], 'pair')}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "faithfulness", recovered share by number of edges, and "edges", the strongest ones."""
        units = str(result.data.attrs["metric_units"])
        return {"faithfulness": faithfulness_curve(result.data), "edges": strongest_edges(result.table, units)}


def _sizes(total: int) -> list[int]:
    """1, 3, 10, 30, ... below the number of edges, and all of them."""
    steps = [factor * 10**power for power in range(9) for factor in (1, 3)]
    return [size for size in steps if size < total] + [total]
