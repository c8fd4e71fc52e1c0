"""Attribution patching: the effect of patching every activation, estimated from one gradient, beside exact patching.

For a pair of prompts, clean C and corrupt K, a metric M and the activation a of a site, the first-order estimate of
what patching a does to the corrupt run is

    D^ = (a(C) - a(K)) . dM/da at K              estimates denoising D = M(K | a <- C) - M(K)

and, with the gradient at C, of noising. One backward pass gives it for every layer, position and head. With `steps` the
gradient is averaged along the line from a(K) to a(C) of one layer's site, all positions together (integrated
gradients): its sum over positions tends to the effect of patching the whole site.

It is a screen, not a result: norms and attention are not linear over such distances. So exact patching runs on a sample
of pairs, and the correlation by layer and the largest misses are part of the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64

from workbench.probes.activation_patching import (
    cell_name,
    cells_of,
    mean_of_known,
    patched_sites,
    provenance_of_pairs,
    ratio_of_sums,
)
from workbench.probing import (
    METRIC_UNITS,
    METRICS,
    Attribution,
    Model,
    PatchPair,
    PromptPairs,
    RequestError,
    Result,
    Runs,
    Site,
    Store,
    StoreProbe,
    Variable,
    at_place,
    check_fields,
    correlation_lines,
    correlations,
    counted,
    dataset,
    estimate_scatter,
    interval_suffix,
    of_usual_length,
    other_pair,
    pairs_of,
    patching_map,
    plain_torch,
    provenance,
    recorded_pairs,
    shuffled_positions,
    some_pairs,
    with_interval,
    with_note,
    with_progress,
)

_CELL, _MISS = ("layer", "place"), ("miss",)
_UNITS, _SHARE = "units of the metric", "share of the gap"
_TOP, _MISSES = 20, 10

VARIABLES = (
    *with_interval(Variable("estimate", _CELL, _SHARE, "estimated effect of patching: sum D^ / sum gap", "0")),
    Variable("estimate_raw", _CELL, _UNITS, "mean of D^ over the used pairs", "0"),
    Variable("by_pair", ("pair", *_CELL), _UNITS, "D^ of each used pair", "0"),
    *with_interval(Variable("exact", _CELL, _SHARE, "exact effect of patching, over the sampled pairs", "0")),
    Variable("exact_by_pair", ("exact_pair", *_CELL), _UNITS, "exact effect of each sampled pair", "0"),
    Variable("estimate_by_pair", ("exact_pair", *_CELL), _UNITS, "D^ of each sampled pair", "0"),
    *with_interval(
        Variable("random_donor", _CELL, _SHARE, "clean minus corrupt activations of another pair in D^", "0")
    ),
    *with_interval(
        Variable("shuffled", _CELL, _SHARE, "clean minus corrupt activations of permuted positions in D^", "0")
    ),
    *with_interval(Variable("correlation", ("layer",), "1", "Pearson's r of D^ and the exact effect over cells", "0")),
    *with_interval(Variable("overall_correlation", (), "1", "Pearson's r over the cells of all layers", "0")),
    Variable("largest_miss", ("layer",), _UNITS, "largest |D^ - exact effect| of a cell and sampled pair", "0"),
    Variable("whole", ("layer",), _SHARE, "exact effect of patching the site at all places together"),
    Variable("completeness_error", ("layer",), _SHARE, "mean |sum of D^ over places - effect of all together|", "0"),
    Variable("top", (), "cells", "number of cells with the largest exact effects that are compared"),
    Variable("top_found", (), "cells", "of these, how many are among as many with the largest estimates", "top_chance"),
    Variable("top_chance", (), "cells", "the same for estimates at random"),
    Variable("miss_layer", _MISS, "layer", "layer of the largest misses, largest first"),
    Variable("miss_place", _MISS, "text", "place or head of the largest misses"),
    Variable("miss_pair", _MISS, "pair", "pair of the largest misses"),
    Variable("miss_exact", _MISS, _UNITS, "exact effect there"),
    Variable("miss_estimate", _MISS, _UNITS, "estimate there"),
    Variable("clean_metric", ("pair",), _UNITS, "metric of the clean run"),
    Variable("corrupt_metric", ("pair",), _UNITS, "metric of the corrupt run"),
    Variable("gap", (), _UNITS, "mean difference of clean and corrupt metric over the used pairs"),
)


@dataclass(frozen=True)
class AttributionPatching(StoreProbe):
    """Estimates the effect of patching every activation from gradients, beside exact patching of a sample."""

    name: ClassVar[str] = "attribution-patching"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Nanda 2023, Attribution patching: activation patching at industrial scale",
        "Sundararajan et al. 2017, Axiomatic attribution for deep networks, arXiv 1703.01365",
        "Syed et al. 2023, Attribution patching outperforms automated circuit discovery, arXiv 2310.10348",
    )
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {
        "random_donor": "the estimate with clean minus corrupt activations of another pair",
        "shuffled": "the estimate with clean minus corrupt activations of permuted positions",
        "exact": "exact patching of a sample of pairs, which the estimate must agree with",
    }

    site: str = "resid_post"
    """Kind of site: resid_pre, resid_mid, resid_post, attn_out, mlp_out, by layer and place; z, q, k or v, by layer and
    head."""
    layers: tuple[int, ...] | None = None
    """Layers to estimate. None: all that have the site."""
    base: str = "corrupt"
    """Run whose gradient is taken, and which exact patching changes. corrupt: denoising; clean: noising."""
    steps: int = 0
    """0: the gradient at the base run. n: integrated gradients, the mean at n midpoints of the line to the other run,
    which costs n passes a layer."""
    exact_pairs: int = 8
    """Pairs that are patched exactly, too, drawn at random; costs a pass a cell over them."""
    metric: str = "logit-difference"
    """logit-difference, log-probability, loss or kl, at the last position."""
    places: str = "labels"
    """labels: each labelled span of the prompts, and the other positions together; positions: each position, for which
    pairs of another length than the most frequent one are left out."""
    at: str = "all"
    """Positions at which heads are patched: all, or a label, such as end."""
    where: str | None = None
    """SQL over the token table: pairs with a selected token are used. None: all."""
    model: str | None = None
    """Directory or hub id of the recorded model, if the name in the store is not enough to load it."""
    resamples: int = 1000
    """Resamples of pairs for the intervals."""
    seed: int = 0
    """Random seed of the sample, donors, permutations and resamples."""
    device: str | None = None
    """Device of a model that the probe loads: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "metric", one_of=METRICS)
        check_fields(self, "base", one_of=("corrupt", "clean"))
        check_fields(self, "places", one_of=("labels", "positions"))
        check_fields(self, "resamples", "exact_pairs", at_least=1, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)
        check_fields(self, "steps", at_least=0, at_most=10_000, whole=True)
        if self.layers is not None and not self.layers:
            raise RequestError("layers is empty; name one or more, or leave it out")
        if self.metric == "kl" and self.base == "clean" and not self.steps:
            raise RequestError("base='clean': the gradient of the KL from the clean run is 0 there; give steps, as 10")

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Estimates the effects in the pairs that a store holds, as `ActivationPatching.run` finds them.

        Costs a pass and a backward pass over the pairs (with steps, that many a layer), and for the sample a pass a
        cell. Memory: activations and gradients of the site at all layers, of all pairs.

        Args:
            store: The store.
            model: The recorded model. None: it is loaded from the setting `model` or the store's name for it.

        Raises:
            RequestError: The store has no usable pairs, or the model cannot be loaded, is another one, is not causal,
                has no gradients (quantised, offloaded, float16) or no such site.
        """
        loaded, pairs, notes = recorded_pairs(store, self.name, model or self.model, self.where, self.device)
        return self._run(loaded, pairs, notes, provenance(store, self))

    def run_pairs(self, model: Model, pairs: PromptPairs) -> Result:
        """Estimates the effects in pairs of prompts without a store; see `run`.

        Args:
            model: The model.
            pairs: Pairs, such as those of `wb.prompt_pairs`.
        """
        return self._run(model, pairs_of(pairs), [], provenance_of_pairs(self, model, pairs))

    @plain_torch()
    def _run(self, model: Model, pairs: list[PatchPair], notes: list[str], known: dict[str, Any]) -> Result:
        if self.places == "positions":
            pairs, length_notes = of_usual_length(pairs)
            notes += length_notes
        sites = patched_sites(model, self.site, self.layers)
        runs = Runs.make(model, pairs, sites, self.metric, self.places == "positions")  # pyright: ignore[reportArgumentType]  # checked
        used = np.flatnonzero(runs.used)
        if not len(used):
            raise RequestError(
                f"none of {counted(len(pairs), 'pair')} can be used: the model does not prefer the right "
                "answer to both prompts "
                "(clean metric above 0, corrupt below), or the metric does not fall; choose other pairs or metric='kl'"
            )
        if unused := len(pairs) - len(used):
            notes.append(
                f"{unused} of {counted(len(pairs), 'pair')} left out: the model does not give both right answers"
            )
        if sites[0].axes[0] == "head" and self.at != "all" and self.at not in runs.pairs.places:
            raise RequestError(f"at {self.at!r} is no label; known are all, {', '.join(runs.pairs.places)}")
        data = self._data(_Estimated.make(self, some_pairs(runs, used), sites), used)
        data.attrs["note"] = "; ".join(notes)
        return Result(self.name, data, _table(data), known)

    def _data(self, work: _Estimated, used: np.ndarray) -> Any:
        gap, chosen, arrays = work.runs.gap, work.sample, {}
        for name, values, pairs in (
            ("estimate", work.estimates["estimate"], slice(None)),
            ("exact", work.exact, chosen),
            ("random_donor", work.estimates["random_donor"], slice(None)),
            ("shuffled", work.estimates["shuffled"], slice(None)),
        ):
            ratio, low, high = ratio_of_sums(values, gap[pairs], self.resamples, self.seed)
            arrays |= {name: ratio, f"{name}_low": low, f"{name}_high": high}
        estimate, exact = work.estimates["estimate"], work.exact
        sampled = estimate[chosen]
        arrays |= {"estimate_raw": mean_of_known(estimate), "by_pair": estimate}
        arrays |= {"exact_by_pair": exact, "estimate_by_pair": sampled}
        for name, x, y in (
            ("correlation", sampled, exact),
            ("overall_correlation", sampled[:, None], exact[:, None]),
        ):
            mean, low, high = correlations(x, y, self.resamples, self.seed)
            axes = () if name.startswith("overall") else (slice(None),)
            arrays |= {name: mean[axes or 0], f"{name}_low": low[axes or 0], f"{name}_high": high[axes or 0]}
        arrays["largest_miss"] = np.nanmax(np.nan_to_num(np.abs(sampled - exact)), axis=(0, 2))
        arrays |= {"whole": work.whole.sum(0) / gap[chosen].sum()}
        arrays["completeness_error"] = np.abs(work.sums[chosen] - work.whole).mean(0) / gap[chosen].mean()
        arrays |= _top(mean_of_known(sampled), mean_of_known(exact)) | _misses(work, sampled, used)
        arrays |= {"clean_metric": work.runs.clean.numpy(), "corrupt_metric": work.runs.corrupt.numpy()}
        arrays["gap"] = gap.mean()
        coords = {"layer": work.layers, "place": work.places, "pair": used, "exact_pair": used[chosen]}
        ordered = {variable.name: arrays[variable.name] for variable in VARIABLES}
        data = dataset(VARIABLES, ordered, coords)
        data.attrs |= {"metric_units": METRIC_UNITS[self.metric], "heads": int(work.heads)}
        return data

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the agreement with exact patching, the weakest layer and the largest miss."""
        data, settings = result.data, result.provenance["settings"]
        low, high = float(data["overall_correlation_low"]), float(data["overall_correlation_high"])
        interval = interval_suffix(low, high)
        how = f"{settings['steps']} steps" if settings["steps"] else f"gradient of the {settings['base']} run"
        pairs = data.sizes["exact_pair"]
        text = (
            f"Estimated patching of {settings['site']} ({how}): r {float(data['overall_correlation']):z.2f}{interval}"
        )
        text += f" with exact patching over the cells of {counted(pairs, 'pair')}"
        by_layer = data["correlation"].to_numpy()
        if not np.isnan(by_layer).all():
            worst = int(np.nanargmin(by_layer))
            text += f", lowest {by_layer[worst]:z.2f} in layer {int(data['layer'].to_numpy()[worst])}"
        hits, top, chance = (float(data[name]) for name in ("top_found", "top", "top_chance"))
        text += f"; {hits:z.0f} of {counted(top, 'strongest cell')} found ({chance:z.1f} by chance)"
        if data.sizes["miss"]:
            place = cell_name(data, int(data["miss_layer"][0]), str(data["miss_place"].to_numpy()[0]))
            exact, estimate = float(data["miss_exact"][0]), float(data["miss_estimate"][0])
            text += (
                f"; largest miss, {place}: exact {exact:z.2f}, estimated {estimate:z.2f} {data.attrs['metric_units']}"
            )
        return with_note(f"{text}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "estimate" and "exact", heat maps; "scatter", one against the other; "correlation" by layer."""
        site, data = result.provenance["settings"]["site"], result.data
        maps = {name: patching_map(data, name, site) for name in ("estimate", "exact")}
        return {"scatter": estimate_scatter(data, site), "correlation": correlation_lines(data, site), **maps}


# ---- estimates and exact effects ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Estimated:
    """Estimates for all pairs and exact effects of the sample, axes (pair, layer, place), in units of the metric."""

    runs: Runs
    layers: list[int]
    places: list[str]
    heads: bool
    estimates: Mapping[str, Float64[np.ndarray, "pair layer place"]]
    """By name: estimate, random_donor, shuffled; NaN where a pair has no such place or donor."""
    sums: Float64[np.ndarray, "pair layer"]
    """Sum of the estimates over all positions, and heads, that are patched."""
    sample: np.ndarray
    """Pairs that are patched exactly."""
    exact: Float64[np.ndarray, "chosen layer place"]
    whole: Float64[np.ndarray, "chosen layer"]
    """Exact effect of the site at all of these positions together."""

    @classmethod
    def make(cls, probe: AttributionPatching, runs: Runs, sites: Sequence[Site]) -> _Estimated:
        base = "clean" if probe.base == "clean" else "corrupt"
        attribution = Attribution.make(runs, base, sites, probe.steps)
        cells = list(cells_of(runs, sites, probe.at))
        places, layers = list(dict.fromkeys(cell.place for cell in cells)), [site.layer or 0 for site in sites]
        heads = cells[0].head is not None
        patched = runs.pairs.mask.bool() if not heads or probe.at == "all" else runs.pairs.places[probe.at]
        shape = (len(runs.pairs), len(layers), len(places))
        estimates = {name: np.full(shape, np.nan) for name in ("estimate", "random_donor", "shuffled")}
        sums = np.zeros(shape[:2])
        masks = {"": patched} if heads else dict(runs.pairs.places)
        plans = {name: _plans(probe, runs, at) for name, at in masks.items()}
        for row, site in enumerate(sites):
            estimate = attribution.by_position(site)
            sums[:, row] = at_place(estimate, patched).reshape(shape[0], -1).sum(1).numpy()
            for name, at in masks.items():
                columns = slice(None) if heads else places.index(name)
                for kind, (plan, known) in plans[name].items():
                    values = at_place(estimate if plan is None else attribution.by_position(site, plan), at).numpy()
                    estimates[kind][:, row, columns] = np.where(known[:, None] if heads else known, values, np.nan)
        draw = np.random.default_rng(probe.seed)
        sample = np.sort(draw.permutation(shape[0])[: probe.exact_pairs])
        exact, whole = _exact(probe, some_pairs(runs, sample), sites, places)
        return cls(runs, layers, places, heads, estimates, sums, sample, exact, whole)


def _plans(probe: AttributionPatching, runs: Runs, at: torch.Tensor) -> dict[str, tuple[Any, np.ndarray]]:
    """Donors of the estimate and its controls at one place, and the pairs that have them."""
    present = at.any(1).numpy()
    random_plan, with_random = other_pair(runs.pairs, runs.answers, at, False, probe.seed)
    shuffled = shuffled_positions(runs.pairs, at, probe.seed)
    return {
        "estimate": (None, present),
        "random_donor": (random_plan, present & with_random),
        "shuffled": (shuffled, present),
    }


def _exact(
    probe: AttributionPatching, runs: Runs, sites: Sequence[Site], places: Sequence[str]
) -> tuple[Float64[np.ndarray, "pair layer place"], Float64[np.ndarray, "pair layer"]]:
    """Exact effects of each cell, and of the whole site of each layer."""
    layers = [site.layer for site in sites]
    exact = np.full((len(runs.pairs), len(sites), len(places)), np.nan)
    for cell in with_progress(list(cells_of(runs, sites, probe.at)), "exact patching", "cells"):
        index = (slice(None), layers.index(cell.site.layer), list(places).index(cell.place))
        exact[index] = np.where(cell.at.any(1).numpy(), _effect(probe, runs, cell.site, cell.at, cell.head), np.nan)
    heads = sites[0].axes[0] == "head" and probe.at != "all"
    all_positions = runs.pairs.places[probe.at] if heads else runs.pairs.mask.bool()
    return exact, np.stack([_effect(probe, runs, site, all_positions) for site in sites], axis=1)


def _effect(
    probe: AttributionPatching, runs: Runs, site: Site, at: torch.Tensor, head: int | None = None
) -> Float[np.ndarray, " pair"]:
    """Denoising or noising of each pair."""
    if probe.base == "corrupt":
        return (runs.effect("corrupt", site, at, runs.clean_values[site.name], head) - runs.corrupt).numpy()
    return (runs.clean - runs.effect("clean", site, at, runs.corrupt_values[site.name], head)).numpy()


def _top(estimate: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Cells that are among the strongest in both, of at most 20 and a quarter of all."""
    known = ~(np.isnan(estimate) | np.isnan(exact))
    size, top = int(known.sum()), max(1, min(_TOP, int(known.sum()) // 4))
    best = [set(np.argsort(-np.abs(values[known]), kind="stable")[:top].tolist()) for values in (estimate, exact)]
    return {"top": float(top), "top_found": float(len(best[0] & best[1])), "top_chance": top * top / max(size, 1)}


def _misses(work: _Estimated, sampled: np.ndarray, used: np.ndarray) -> dict[str, np.ndarray]:
    """The cells and pairs with the largest differences."""
    error = np.nan_to_num(np.abs(sampled - work.exact))
    order = np.argsort(-error, axis=None, kind="stable")[:_MISSES]
    pair, layer, place = np.unravel_index(order, error.shape)
    return {
        "miss_layer": np.array(work.layers)[layer],
        "miss_place": np.array(work.places)[place],
        "miss_pair": used[work.sample][pair],
        "miss_exact": work.exact[pair, layer, place],
        "miss_estimate": sampled[pair, layer, place],
    }


def _table(data: Any) -> pd.DataFrame:
    """One line for each layer and place."""
    names = [name for name in data.data_vars if data[name].dims == _CELL]
    return pd.DataFrame(
        [
            {
                "layer": int(layer),
                "place": str(place),
                **{name: float(data[name].to_numpy()[row, column]) for name in names},
                "pairs": int(np.isfinite(data["by_pair"].to_numpy()[:, row, column]).sum()),
            }
            for row, layer in enumerate(data["layer"].to_numpy())
            for column, place in enumerate(data["place"].to_numpy())
        ]
    )
