"""Effect of ablating named heads on a model's predictions, beside random heads of the same layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analysis.change_effects import MEASURES, Change, ChangeEffects, MeasuredRows, change_effects
from workbench.io.checks import MOST, check
from workbench.io.errors import RequestError
from workbench.model.capture import capture
from workbench.model.load import Model
from workbench.model.row_changes import query_heads
from workbench.model.row_records import Set
from workbench.results.bootstrap import Interval, intervals
from workbench.sae.reconstruction import Documents
from workbench.sae.spliced_loss import batch_limit, sequence_batches

Heads = Sequence[tuple[int, int]]
"""Layer and query head of each."""

Ablation = Literal["mean", "zero"]
"""mean: a head's output z becomes its mean over all tokens of the sequences; zero: it becomes 0."""


@dataclass(frozen=True)
class AblatedHeads:
    """Result of `head_ablation`."""

    table: pd.DataFrame
    """Columns heads (name of the set), kind ("named", "random", "difference"), draw (number of a random draw, -1:
    none), group, measure, plain (value of the plain model), value (ablated minus plain), low, high (95 % CI over
    documents, NaN from one), units, tokens. "random" with draw -1 is the mean of the draws; "difference" is named minus
    that, paired by document; under the null, heads like any others of their layers, 0."""
    controls: Mapping[str, tuple[Heads, ...]]
    """Random heads of each draw, by name of the set."""

    def of(self, heads: str, group: str, measure: str = "loss", kind: str = "named") -> Interval:
        """Returns one line of the table: the change of a measure with its interval.

        Args:
            heads: Name of the set of heads.
            group: Name of the group of rows.
            measure: A key of `MEASURES`.
            kind: "named"; "random", the mean of the draws; or "difference".

        Raises:
            RequestError: There is no such line.
        """
        line = self.table.query("heads == @heads and group == @group and measure == @measure and kind == @kind")
        line = line.loc[line["draw"] == -1]
        if len(line) != 1:
            raise RequestError(f"no line of heads {heads!r}, group {group!r}, measure {measure!r}, kind {kind!r}")
        return Interval(*(float(line[name].iloc[0]) for name in ("value", "low", "high")))


def head_ablation(
    model: Model,
    rows: MeasuredRows,
    heads: Mapping[str, Heads],
    *,
    ablation: Ablation = "mean",
    controls: int = 5,
    resamples: int = 1000,
    seed: int = 0,
    show_progress: bool = True,
) -> AblatedHeads:
    """Measures how predictions change when sets of heads are ablated, each set as a whole.

    The control ablates as many other heads of the same layers, drawn at random; where a layer has too few others, the
    rest comes from the nearest layers. Costs 1 + sets x (1 + controls) passes over the sequences, and one more up to
    the last layer concerned for the means.

    Args:
        model: The recorded model.
        rows: Rows at which predictions are measured, in groups.
        heads: Name to the heads that are ablated together.
        ablation: "mean" or "zero"; see `Ablation`.
        controls: Draws of random heads for each set; 0: none.
        resamples: Resamples of documents for the intervals.
        seed: Random seed of draws and resamples.
        show_progress: Show a progress bar.

    Raises:
        RequestError: A head that the model does not have, a set without heads, no measured row, or an architecture
            whose heads' outputs cannot be changed.
    """
    check("ablation", ablation, one_of=get_args(Ablation))
    check("controls", controls, at_least=0, at_most=MOST, whole=True)
    for name, head_set in heads.items():
        _check_heads(model, name, head_set)
    draw = np.random.default_rng(seed)
    random_sets = {
        name: tuple(random_heads(model, head_set, draw) for _ in range(controls)) for name, head_set in heads.items()
    }
    sets = {(name, -1): head_set for name, head_set in heads.items()}
    sets |= {(name, number): head_set for name, draws in random_sets.items() for number, head_set in enumerate(draws)}
    means = head_means(model, rows, sorted({layer for head_set in sets.values() for layer, _ in head_set}))
    values = {layer: mean if ablation == "mean" else torch.zeros_like(mean) for layer, mean in means.items()}
    changes = {f"{name} {number}": ablate(head_set, values) for (name, number), head_set in sets.items()}
    effects = change_effects(model, rows, changes, label="ablation", show_progress=show_progress)
    return AblatedHeads(_table(effects, list(sets), resamples, seed), random_sets)


def _table(effects: ChangeEffects, sets: Sequence[tuple[str, int]], resamples: int, seed: int) -> pd.DataFrame:
    """Lines of every set of heads, its random draws, their mean, and the difference from it."""
    plain, _ = effects.means(resamples=1)
    change, resampled = effects.effects(resamples=resamples, seed=seed)
    counts, lines = effects.counts.sum(0), []
    for name in dict.fromkeys(name for name, _ in sets):
        named_index, *random = (index for index, (set_name, _) in enumerate(sets) if set_name == name)
        parts = [("named", -1, [named_index]), *(("random", draw, [index]) for draw, index in enumerate(random))]
        parts += [("random", -1, random)] * bool(random)
        values = [(kind, draw, change[at].mean(0), resampled[:, at].mean(1)) for kind, draw, at in parts]
        if random:
            values.append(("difference", -1, values[0][2] - values[-1][2], values[0][3] - values[-1][3]))
        for kind, draw, value, resampled_values in values:
            low, high = intervals(resampled_values)
            for g, group in enumerate(effects.groups):
                for m, (measure, units) in enumerate(MEASURES.items()):
                    cell = {"heads": name, "kind": kind, "draw": draw, "group": group, "measure": measure}
                    cell |= {"plain": plain[0, g, m], "value": value[g, m], "low": low[g, m], "high": high[g, m]}
                    lines.append(cell | {"units": units, "tokens": int(counts[g, m])})
    return pd.DataFrame(lines)


def ablate(heads: Heads, values: Mapping[int, Float[Tensor, "head d_head"]]) -> Change:
    """Returns the change that gives heads' outputs fixed values.

    Args:
        heads: Layer and head of each.
        values: Output of every head, by layer.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    records = [
        Set(f"z.{layer}", values[layer][layer_heads], at="all", head=layer_heads)
        for layer, layer_heads in by_layer.items()
    ]
    return lambda _batch: records


def head_means(model: Model, rows: MeasuredRows, layers: Sequence[int]) -> dict[int, Float[Tensor, "head d_head"]]:
    """Returns the mean output z of every head of some layers over all tokens of the sequences with measured rows."""
    sites = model.site_map.select([f"z.{layer}" for layer in layers])
    sums: dict[int, Tensor] = {}
    tokens = 0
    documents = Documents.of(rows.store.tokens["document"].to_numpy(), rows.ids)
    for batch in sequence_batches(rows.store, documents, batch_limit(model)):
        real = batch.mask.bool()

        def add(site, tensor, _first, real=real):
            total = tensor.detach()[real.to(tensor.device)].double().sum(0).cpu()
            sums[site.layer] = sums.get(site.layer, 0) + total

        capture(model.module, sites, batch.ids, batch.mask, add)
        tokens += int(real.sum())
    return {layer: (total / tokens).float() for layer, total in sums.items()}


def random_heads(model: Model, heads: Heads, draw: np.random.Generator) -> Heads:
    """Returns as many other heads of the same layers, drawn at random; of the nearest layers where they are too few.

    Raises:
        RequestError: The model has too few other heads.
    """
    named_heads = set(heads)
    layers = [layer for layer in range(model.site_map.n_layers) if query_heads(model, layer)]
    free = {
        layer: [(layer, h) for h in range(query_heads(model, layer) or 0) if (layer, h) not in named_heads]
        for layer in layers
    }
    drawn_heads: list[tuple[int, int]] = []
    for layer, _ in heads:
        near = sorted((index for index in layers if free[index]), key=lambda index: abs(index - layer))
        if not near:
            raise RequestError(f"heads: {len(heads)} are named, and the model has too few others as a control")
        drawn_heads.append(free[near[0]].pop(int(draw.integers(len(free[near[0]])))))
    return tuple(sorted(drawn_heads))


def _check_heads(model: Model, name: str, heads: Heads) -> None:
    if not heads:
        raise RequestError(f"heads {name!r} is empty; name one or more, as (layer, head)")
    if len(set(heads)) < len(heads):
        raise RequestError(f"heads {name!r} names a head twice")
    for layer, head in heads:
        check("layer", layer, at_least=0, at_most=model.site_map.n_layers - 1, whole=True)
        count = query_heads(model, layer)
        if not count:
            raise RequestError(f"layer {layer} of {model.architecture} has no heads whose output can be changed")
        check(f"head of layer {layer}", head, at_least=0, at_most=count - 1, whole=True)
