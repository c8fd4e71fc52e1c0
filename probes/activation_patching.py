"""Activation patching: which activations carry what makes the clean run differ from the corrupt one.

Each pair has a clean prompt C and a corrupt prompt K of the same length, and a metric M, such as the logit difference
of the two answers after the last token. For a site s (a place of the residual stream, of attention or MLP, or a head)

    denoising  D_s = M(K | s <- C) - M(K)        does s suffice to bring the clean answer back?
    noising    N_s = M(C) - M(C | s <- K)        is s needed for the clean answer?

where s <- C is the run with the activations of s replaced by those of the clean run. Both are positive where s matters;
they are not complements. Over pairs p they are normalised as a ratio of sums, sum_p D / sum_p (M(C) - M(K)), which is 1
where patching s does all that the prompts' difference does; the interval is a bootstrap over pairs. Pairs whose two
runs do not differ in the expected direction are left out and counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from workbench.probing import (
    METRIC_UNITS,
    METRICS,
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
    check_fields,
    check_model,
    counted,
    dataset,
    head_name,
    interval_suffix,
    intervals,
    of_usual_length,
    other_pair,
    pairs_of,
    patching_lines,
    patching_map,
    patching_spread,
    plain_torch,
    provenance,
    recorded_pairs,
    resampled_means,
    shuffled_positions,
    with_interval,
    with_note,
    with_progress,
)

_CELL = ("layer", "place")
_NULL = "0 for activations that carry nothing"
_SHARE = "share of the gap"

VARIABLES = (
    *with_interval(Variable("denoising", _CELL, _SHARE, "corrupt run with clean activations: sum D / sum gap", _NULL)),
    *with_interval(Variable("noising", _CELL, _SHARE, "clean run with corrupt activations: sum N / sum gap", _NULL)),
    Variable("denoising_raw", _CELL, "units of the metric", "mean of D over the used pairs", "0"),
    Variable("noising_raw", _CELL, "units of the metric", "mean of N over the used pairs", "0"),
    Variable("by_pair", ("pair", *_CELL), "units of the metric", "D of each used pair", "0"),
    *with_interval(
        Variable("random_donor", _CELL, _SHARE, "clean minus corrupt activations of another pair as donor", "0")
    ),
    *with_interval(
        Variable("shuffled", _CELL, _SHARE, "clean minus corrupt activations of permuted positions as donor", "0")
    ),
    *with_interval(
        Variable("same_answer", _CELL, _SHARE, "denoising by the clean run of another pair with the same answer")
    ),
    Variable("clean_metric", ("pair",), "units of the metric", "metric of the clean run"),
    Variable("corrupt_metric", ("pair",), "units of the metric", "metric of the corrupt run"),
    Variable("gap", (), "units of the metric", "mean difference of clean and corrupt metric over the used pairs"),
)
_STREAMS = ("resid_pre", "resid_mid", "resid_post")
_CONTROLS = ("random_donor", "shuffled", "same_answer")


@dataclass(frozen=True)
class ActivationPatching(StoreProbe):
    """Patches activations between clean and corrupt prompts: by layer and position, or by layer and head."""

    name: ClassVar[str] = "activation-patching"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Meng et al. 2022, Locating and editing factual associations in GPT, arXiv 2202.05262",
        "Heimersheim & Nanda 2024, How to use and interpret activation patching, arXiv 2404.15255",
    )
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {
        "random_donor": "activations of another pair, clean minus corrupt: 0 where they only carry this pair's answer",
        "shuffled": "activations of permuted positions, clean minus corrupt",
        "same_answer": "clean activations of another pair with the same answer, which should do what the pair's own do",
    }

    site: str = "resid_post"
    """Kind of site: resid_pre, resid_mid, resid_post, attn_out, mlp_out, by layer and place; z, q, k or v, by layer and
    head."""
    layers: tuple[int, ...] | None = None
    """Layers to patch. None: all that have the site."""
    metric: str = "logit-difference"
    """logit-difference, log-probability, loss or kl, at the last position."""
    places: str = "labels"
    """labels: each labelled span of the prompts, and the other positions together; positions: each position, for which
    pairs of another length than the most frequent one are left out."""
    at: str = "all"
    """Positions at which heads are patched: all, or a label, such as end."""
    controls_too: bool = True
    """False leaves the controls out, which cost five passes a cell; patching costs two."""
    where: str | None = None
    """SQL over the token table: pairs with a selected token are used. None: all."""
    model: str | None = None
    """Directory or hub id of the recorded model, if the name in the store is not enough to load it."""
    resamples: int = 1000
    """Resamples of pairs for the intervals."""
    seed: int = 0
    """Random seed of donors, permutations and resamples."""
    device: str | None = None
    """Device of a model that the probe loads: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "metric", one_of=METRICS)
        check_fields(self, "places", one_of=("labels", "positions"))
        check_fields(self, "resamples", at_least=1, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)
        if self.layers is not None and not self.layers:
            raise RequestError("layers is empty; name one or more, or leave it out")

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Patches the pairs that a store holds: texts of `wb.prompt_pairs(...).texts()`, or columns pair and side.

        Activations are computed anew, in the model's type; the store names the model, the pairs, answers and labels.
        Costs up to 7 passes over the pairs for each layer and place, or head: cells whose activations are equal on both
        sides are not run, as their effect is 0.

        Args:
            store: The store.
            model: The recorded model. None: it is loaded from the setting `model` or the store's name for it.

        Raises:
            RequestError: The store has no usable pairs, or the model cannot be loaded, is another one, is not causal or
                has no such site.
        """
        loaded, pairs, notes = recorded_pairs(store, self.name, model or self.model, self.where, self.device)
        return self._run(loaded, pairs, notes, provenance(store, self))

    def run_pairs(self, model: Model, pairs: PromptPairs) -> Result:
        """Patches pairs of prompts without a store; see `run`.

        Args:
            model: The model.
            pairs: Pairs, such as those of `wb.prompt_pairs`.
        """
        known = provenance_of_pairs(self, model, pairs)
        return self._run(model, pairs_of(pairs), [], known)

    @plain_torch()
    def _run(self, model: Model, pairs: list[PatchPair], notes: list[str], known: dict[str, Any]) -> Result:
        if not model.site_map.causal:
            raise RequestError(f"model {model.name!r} is not causal; patching compares prompts of a causal model")
        if self.places == "positions":
            pairs, length_notes = of_usual_length(pairs)
            notes += length_notes
        sites = patched_sites(model, self.site, self.layers)
        runs = Runs.make(model, pairs, sites, self.metric, self.places == "positions")  # pyright: ignore[reportArgumentType]  # checked
        if not runs.used.any():
            raise RequestError(
                f"none of {counted(len(pairs), 'pair')} can be used: the model does not prefer the right "
                "answer to both prompts "
                "(clean metric above 0, corrupt below), or the metric does not fall; choose other pairs or metric='kl'"
            )
        if unused := int((~runs.used).sum()):
            notes.append(
                f"{unused} of {counted(len(pairs), 'pair')} left out: the model does not give both right answers"
            )
        if sites[0].axes[0] == "head" and self.at != "all" and self.at not in runs.pairs.places:
            raise RequestError(f"at {self.at!r} is no label; known are all, {', '.join(runs.pairs.places)}")
        data = self._sweep(runs, sites)
        data.attrs["note"] = "; ".join(notes)
        return Result(self.name, data, _table(data), known)

    def _sweep(self, runs: Runs, sites: Sequence[Site]) -> Any:
        cells = list(cells_of(runs, sites, self.at))
        names = list(dict.fromkeys(cell.place for cell in cells))
        layers = [site.layer for site in sites]
        shape = (len(runs.pairs), len(layers), len(names))
        effects = {name: np.full(shape, np.nan) for name in ("denoising", "noising", *_CONTROLS)}
        for cell in with_progress(cells, "activation patching", "cells"):
            index = (slice(None), layers.index(cell.site.layer), names.index(cell.place))
            for name, values in self._effects(runs, cell).items():
                effects[name][index] = values
        used = runs.used
        gap = runs.gap[used]
        arrays: dict[str, Any] = {}
        for name, values in effects.items():
            if name in _CONTROLS and not self.controls_too:
                continue
            ratio, low, high = ratio_of_sums(values[used], gap, self.resamples, self.seed)
            arrays |= {name: ratio, f"{name}_low": low, f"{name}_high": high}
        arrays["by_pair"] = effects["denoising"][used]
        for name in ("denoising", "noising"):
            arrays[f"{name}_raw"] = mean_of_known(effects[name][used])
        arrays |= {"clean_metric": runs.clean.numpy()[used], "corrupt_metric": runs.corrupt.numpy()[used]}
        arrays["gap"] = gap.mean()
        coords = {"layer": layers, "place": names, "pair": np.flatnonzero(used)}
        ordered = {variable.name: arrays[variable.name] for variable in VARIABLES if variable.name in arrays}
        data = dataset(VARIABLES, ordered, coords)
        data.attrs |= {"metric_units": METRIC_UNITS[self.metric], "heads": int(cells[0].head is not None)}
        return data

    def _effects(self, runs: Runs, cell: Cell) -> dict[str, np.ndarray]:
        """Effect of each pair at one cell, in units of the metric; NaN where the pair has no such place."""
        site, at, head = cell.site, cell.at, cell.head
        present = at.any(1).numpy()
        clean, corrupt = runs.clean_values[site.name], runs.corrupt_values[site.name]
        effects = {
            "denoising": runs.effect("corrupt", site, at, clean, head) - runs.corrupt,
            "noising": runs.clean - runs.effect("clean", site, at, corrupt, head),
        }
        masks = {"denoising": present, "noising": present}
        if self.controls_too:
            random_plan, with_random = other_pair(runs.pairs, runs.answers, at, False, self.seed)
            same_plan, with_same_answer = other_pair(runs.pairs, runs.answers, at, True, self.seed)
            for name, plan in (
                ("random_donor", random_plan),
                ("shuffled", shuffled_positions(runs.pairs, at, self.seed)),
            ):
                sides = [
                    runs.effect("corrupt", site, at, runs.gathered(side, site, plan), head)
                    for side in ("clean", "corrupt")
                ]
                effects[name] = sides[0] - sides[1]
            donor = runs.gathered("clean", site, same_plan)
            effects["same_answer"] = runs.effect("corrupt", site, at, donor, head) - runs.corrupt
            masks |= {"random_donor": with_random, "shuffled": present, "same_answer": with_same_answer}
        return {name: np.where(masks[name], values.numpy(), np.nan) for name, values in effects.items()}

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the cell with the largest effect in each direction with its interval, and that of the control."""
        site, data, parts = result.provenance["settings"]["site"], result.data, []
        stream = site in _STREAMS and data.sizes["place"] > 1
        cells = data.isel(place=slice(0, -1)) if stream else data  # the last layer's last position has all by identity
        for direction in ("denoising", "noising"):
            layer, place = strongest(cells[direction])
            at = data.sel(layer=layer, place=place)
            share, low, high = (100 * float(at[f"{direction}{end}"]) for end in ("", "_low", "_high"))
            interval = interval_suffix(low, high, ".0f")
            parts.append(f"{direction} {share:z.0f} % of the gap at {cell_name(data, layer, place)}{interval}")
        text = f"Strongest {site}{' before the last position' if stream else ''}: {'; '.join(parts)}"
        if "random_donor" in data:
            layer, place = strongest(cells["denoising"])
            donor = 100 * float(data["random_donor"].sel(layer=layer, place=place))
            text += "; no random donor there" if np.isnan(donor) else f"; random donor there {donor:z.0f} %"
        if stream:
            above = data["denoising"].isel(place=-1).to_numpy() > 0.5
            later = np.flatnonzero(np.append(True, ~above))[-1]
            if later < len(above):
                text += f"; the last position has more than half from layer {data['layer'].to_numpy()[later]} on"
        pairs, gap = data.sizes["pair"], float(data["gap"])
        return with_note(f"{text}; mean gap {gap:z.2f} {data.attrs['metric_units']}, {counted(pairs, 'pair')}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "denoising" and "noising", heat maps; "lines" over layers with controls; "spread" of the pairs."""
        site, data = result.provenance["settings"]["site"], result.data
        figures = {name: patching_map(data, name, site) for name in ("denoising", "noising")}
        return {**figures, "lines": patching_lines(data, site), "spread": patching_spread(data, site)}


# ---- cells ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A place of a site, or a head of one."""

    site: Site
    place: str
    at: torch.Tensor
    head: int | None = None


def cells_of(runs: Runs, sites: Sequence[Site], at: str) -> Iterator[Cell]:
    """Yields the cells of a sweep: places of each site, or heads at the positions that `at` names."""
    all_positions = runs.pairs.mask.bool()
    for site in sites:
        if site.axes[0] == "head":
            mask = all_positions if at == "all" else runs.pairs.places[at]
            yield from (Cell(site, f"H{head}", mask, head) for head in range(site.shape[0] or 0))
        else:
            yield from (Cell(site, place, mask) for place, mask in runs.pairs.places.items())


def patched_sites(model: Model, kind: str, layers: tuple[int, ...] | None) -> tuple[Site, ...]:
    """Returns the sites of one kind, in the order of their layers."""
    if "." in kind:
        raise RequestError(f"site must be a kind without a layer, such as resid_post, not {kind!r}")
    sites = model.site_map.select((kind,) if layers is None else tuple(f"{kind}.{layer}" for layer in layers))
    if sites[0].layer is None or sites[0].of or sites[0].axes not in (("d_model",), ("head", "d_head"), ("d_mlp",)):
        raise RequestError(
            f"site {kind!r} cannot be patched; resid_pre, resid_post, attn_out, mlp_out, z, q, k and v can"
        )
    return sites


def ratio_of_sums(
    values: Float[np.ndarray, "pair ..."], gap: Float[np.ndarray, " pair"], resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns sum of values / sum of gaps over the pairs that have a value, and the ends of its 95 % interval.

    The interval is a bootstrap over pairs, widened for their number; see `intervals`.
    """
    flat = values.reshape(len(values), -1)
    known = ~np.isnan(flat)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio, resampled = resampled_means(
            np.where(known, flat, 0.0), known * gap[:, None], resamples=resamples, seed=seed
        )
    low, high = intervals(resampled, known.sum(0))
    shape = values.shape[1:]
    return ratio.reshape(shape), low.reshape(shape), high.reshape(shape)


def mean_of_known(values: Float[np.ndarray, "pair ..."]) -> Float[np.ndarray, ...]:
    """Returns the mean over the pairs that have a value; NaN where none has."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, values, 0.0).sum(0) / known.sum(0)


def strongest(values: Any) -> tuple[Any, Any]:
    """Returns layer and place of the largest value."""
    flat = np.nan_to_num(values.to_numpy(), nan=-np.inf)
    layer, place = np.unravel_index(int(flat.argmax()), flat.shape)
    return int(values["layer"].to_numpy()[layer]), str(values["place"].to_numpy()[place])


def cell_name(data: Any, layer: int, place: str) -> str:
    """Returns the name of a cell: L2H3, or layer and place."""
    return head_name(layer, int(place[1:])) if data.attrs["heads"] else f"layer {layer}, {place}"


def provenance_of_pairs(probe: Any, model: Model, pairs: PromptPairs) -> dict[str, Any]:
    """Returns the provenance of a result that was made of pairs without a store."""
    check_model(model)
    texts = "\n".join(f"{pair.clean}{pair.corrupt}{pair.answer}{pair.wrong}" for pair in pairs.pairs)
    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint(),
        "store": f"pairs of {pairs.task}",
        "store_fingerprint": hashlib.sha256(texts.encode()).hexdigest(),
        "rows": len(pairs),
        "pairs": len(pairs),
        "settings": asdict(probe),
        "probe_class": f"{type(probe).__module__}:{type(probe).__qualname__}",
        "workbench": version("interp-workbench"),
    }


def _table(data: Any) -> pd.DataFrame:
    """One line for each layer and place."""
    lines = []
    for layer in data["layer"].to_numpy():
        for place in data["place"].to_numpy():
            at = data.sel(layer=layer, place=place)
            cells = {name: float(at[name]) for name in at.data_vars if at[name].ndim == 0 and name != "gap"}
            lines.append(
                {"layer": int(layer), "place": str(place), **cells, "pairs": int(at["by_pair"].notnull().sum())}
            )
    return pd.DataFrame(lines)
