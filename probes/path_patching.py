"""Path patching: which heads act on the answer, or on another head, directly and not through what lies between.

For a sender head s and receivers R (the logits, or queries, keys or values of later heads) the run of base K with
s <- C is made in two steps (Wang et al. 2022):

    1. K runs with s <- C while every other head's output z, and with mlps = "frozen" every MLP's output, stays that of
       K; the inputs of R are kept. The residual stream is never frozen.
    2. K runs with the inputs of R alone replaced by those kept.

With mlps = "recomputed" the MLPs between s and R see the change. For R = logits step 1 gives the answer. The final norm
acts as it is (norm = "exact"), or keeps its scale of K (norm = "linear"), which makes effects of heads add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from workbench.probes.activation_patching import (
    mean_of_known,
    provenance_of_pairs,
    ratio_of_sums,
    strongest,
)
from workbench.probing import (
    METRIC_UNITS,
    METRICS,
    Model,
    PatchPair,
    PathRuns,
    PromptPairs,
    RequestError,
    Result,
    Store,
    StoreProbe,
    Variable,
    check_fields,
    counted,
    dataset,
    head_name,
    interval_suffix,
    other_pair,
    pairs_of,
    patching_map,
    plain_torch,
    provenance,
    recorded_pairs,
    with_interval,
    with_note,
    with_progress,
)

_CELL = ("layer", "place")
VARIABLES = (
    *with_interval(
        Variable("denoising", _CELL, "share of the gap", "base corrupt, sender from clean: sum D / sum gap", "0")
    ),
    *with_interval(
        Variable("noising", _CELL, "share of the gap", "base clean, sender from corrupt: sum N / sum gap", "0")
    ),
    *with_interval(
        Variable("random_donor", _CELL, "share of the gap", "sender from another pair, clean minus corrupt", "0")
    ),
    Variable("denoising_raw", _CELL, "units of the metric", "mean of D over the used pairs", "0"),
    Variable("gap", (), "units of the metric", "mean difference of clean and corrupt metric over the used pairs"),
)


@dataclass(frozen=True)
class PathPatching(StoreProbe):
    """Patches the paths from each head to the logits, or to chosen later heads, with everything between held."""

    name: ClassVar[str] = "path-patching"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Wang et al. 2022, Interpretability in the wild, arXiv 2211.00593",
        "Goldowsky-Dill et al. 2023, Localizing model behavior with path patching, arXiv 2304.05969",
    )
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {
        "random_donor": "the sender's output from another pair, clean minus corrupt",
    }

    receivers: tuple[str, ...] = ("logits",)
    """logits, or queries, keys and values of heads, changed together: L9H6.q L9H6.k L9H6.v."""
    mlps: str = "frozen"
    """MLPs between sender and receivers. frozen: their outputs stay; recomputed: they see the change."""
    norm: str = "exact"
    """Final norm before the logits. exact: as it is; linear: with the scale of the unchanged run."""
    layers: tuple[int, ...] | None = None
    """Layers of the senders. None: all."""
    at: str = "all"
    """Positions at which the sender is changed: all, or a label, such as end."""
    metric: str = "logit-difference"
    """logit-difference, log-probability, loss or kl, at the last position."""
    control_too: bool = True
    """False leaves the control out, which costs as much as both directions."""
    where: str | None = None
    """SQL over the token table: pairs with a selected token are used. None: all."""
    model: str | None = None
    """Directory or hub id of the recorded model, if the name in the store is not enough to load it."""
    resamples: int = 1000
    """Resamples of pairs for the intervals."""
    seed: int = 0
    """Random seed of donors and resamples."""
    device: str | None = None
    """Device of a model that the probe loads: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "metric", one_of=METRICS)
        check_fields(self, "mlps", one_of=("frozen", "recomputed"))
        check_fields(self, "norm", one_of=("exact", "linear"))
        check_fields(self, "resamples", at_least=1, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Patches the paths in the pairs that a store holds, as `ActivationPatching.run` finds them.

        Costs, for each sender head, two passes over the pairs (four with the control) to the logits, and twice as many
        to heads; all heads' and MLPs' outputs of both sides are kept in memory.

        Args:
            store: The store.
            model: The recorded model. None: it is loaded from the setting `model` or the store's name for it.

        Raises:
            RequestError: The store has no usable pairs, the model cannot be loaded, is another one, is not causal or
                has no heads, or a receiver does not exist.
        """
        loaded, pairs, notes = recorded_pairs(store, self.name, model or self.model, self.where, self.device)
        return self._run(loaded, pairs, notes, provenance(store, self))

    def run_pairs(self, model: Model, pairs: PromptPairs) -> Result:
        """Patches the paths in pairs of prompts without a store; see `run`.

        Args:
            model: The model.
            pairs: Pairs, such as those of `wb.prompt_pairs`.
        """
        return self._run(model, pairs_of(pairs), [], provenance_of_pairs(self, model, pairs))

    @plain_torch()
    def _run(self, model: Model, pairs: list[PatchPair], notes: list[str], known: dict[str, Any]) -> Result:
        paths = PathRuns.make(
            model,
            pairs,
            self.receivers,
            self.metric,  # pyright: ignore[reportArgumentType]  # checked
            frozen=self.mlps == "frozen",
            linear=self.norm == "linear",
        )
        runs, used = paths.runs, paths.runs.used
        if not used.any():
            raise RequestError(
                f"none of {counted(len(pairs), 'pair')} can be used: the model does not give both right answers"
            )
        if unused := int((~used).sum()):
            notes.append(
                f"{unused} of {counted(len(pairs), 'pair')} left out: the model does not give both right answers"
            )
        if self.at != "all" and self.at not in runs.pairs.places:
            raise RequestError(f"at {self.at!r} is no label; known are all, {', '.join(runs.pairs.places)}")
        effects, layers = self._sweep(paths)
        gap, arrays = runs.gap[used], {}
        for name, values in effects.items():
            ratio, low, high = ratio_of_sums(values[used], gap, self.resamples, self.seed)
            arrays |= {name: ratio, f"{name}_low": low, f"{name}_high": high}
        arrays |= {"denoising_raw": mean_of_known(effects["denoising"][used]), "gap": gap.mean()}
        places = [f"H{head}" for head in range(effects["denoising"].shape[2])]
        data = dataset(VARIABLES, arrays, {"layer": layers, "place": places})
        data.attrs |= {"metric_units": METRIC_UNITS[self.metric], "heads": 1, "pairs": int(used.sum())}
        data.attrs["note"] = "; ".join(notes)
        return Result(self.name, data, _table(data), known)

    def _sweep(self, paths: PathRuns) -> tuple[dict[str, np.ndarray], list[int]]:
        """Effects of every sender head, axes (pair, layer, head), in units of the metric; and the layers."""
        runs = paths.runs
        senders = [site for site in paths.heads if self.layers is None or site.layer in self.layers]
        if not senders:
            raise RequestError(f"layers {self.layers}: no such layer has heads")
        heads = max(site.shape[0] or 0 for site in senders)
        names = ("denoising", "noising", *(("random_donor",) if self.control_too else ()))
        effects = {name: np.full((len(runs.pairs), len(senders), heads), np.nan) for name in names}
        at = runs.pairs.mask.bool() if self.at == "all" else runs.pairs.places[self.at]
        plan, with_donor = other_pair(runs.pairs, runs.answers, at, False, self.seed)
        cells = [(row, site, head) for row, site in enumerate(senders) for head in range(site.shape[0] or 0)]
        for row, site, head in with_progress(cells, "path patching", "heads"):
            clean, corrupt = runs.clean_values[site.name], runs.corrupt_values[site.name]
            index = (slice(None), row, head)
            effects["denoising"][index] = paths.effect("corrupt", site, head, at, clean) - runs.corrupt
            effects["noising"][index] = runs.clean - paths.effect("clean", site, head, at, corrupt)
            if self.control_too:
                from_clean, from_corrupt = (
                    paths.effect("corrupt", site, head, at, runs.gathered(side, site, plan))
                    for side in ("clean", "corrupt")
                )
                effects["random_donor"][index] = np.where(with_donor, (from_clean - from_corrupt).numpy(), np.nan)
        return effects, [site.layer or 0 for site in senders]

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the sender with the largest effect in each direction, with its interval."""
        data, parts = result.data, []
        for direction in ("denoising", "noising"):
            layer, place = strongest(data[direction])
            at = data.sel(layer=layer, place=place)
            share, low, high = (100 * float(at[f"{direction}{end}"]) for end in ("", "_low", "_high"))
            interval = interval_suffix(low, high, ".0f")
            parts.append(f"{direction} {share:z.0f} % of the gap from {head_name(layer, int(place[1:]))}{interval}")
        gap, units = float(data["gap"]), data.attrs["metric_units"]
        text = f"Strongest path to {_aims(result)}: {'; '.join(parts)}; mean gap {gap:z.2f} {units}"
        return with_note(f"{text}, {counted(data.attrs['pairs'], 'pair')}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "denoising" and "noising", one cell a sender head."""
        aims = f"paths to {_aims(result)}"
        return {name: patching_map(result.data, name, aims) for name in ("denoising", "noising")}


def _aims(result: Result) -> str:
    settings = result.provenance["settings"]
    return f"{', '.join(settings['receivers'])} (MLPs {settings['mlps']}, norm {settings['norm']})"


def _table(data: Any) -> pd.DataFrame:
    """One line for each sender head."""
    names = [name for name in data.data_vars if data[name].ndim == 2]
    return pd.DataFrame(
        [
            {"layer": int(layer), "head": head, **{name: float(data[name].to_numpy()[row, head]) for name in names}}
            for row, layer in enumerate(data["layer"].to_numpy())
            for head in range(data.sizes["place"])
        ]
    )
