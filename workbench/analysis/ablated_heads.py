"""Ablation of single heads and of all of them together, as arrays of a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from workbench.analysis.change_effects import MeasuredRows
from workbench.analysis.head_ablation import head_ablation
from workbench.figures.head_grid import head_name
from workbench.model.load import Model
from workbench.results.bootstrap import interval_suffix
from workbench.results.variable import Variable, with_interval

_AXES = ("ablated", "group")
ABLATION_VARIABLES: tuple[Variable, ...] = (
    *with_interval(Variable("ablation", _AXES, "nats", "loss with the heads at their mean, less the loss", "0")),
    *with_interval(
        Variable(
            "ablation_random", _AXES, "nats", "the same of as many random heads of the same layers, mean over draws"
        )
    ),
    *with_interval(Variable("ablation_excess", _AXES, "nats", "ablation less ablation_random", "0")),
    Variable("ablation_tokens", ("group",), "tokens", "tokens that the loss is measured at"),
)
"""Variables of `ablated_heads`."""


def ablated_heads(
    model: Model,
    rows: MeasuredRows,
    heads: Sequence[tuple[int, int]],
    *,
    controls: int,
    resamples: int,
    seed: int,
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Returns the arrays of `ABLATION_VARIABLES` and their coordinates, for each head and for all together.

    Costs 1 + (heads + 1) x (1 + controls) passes over the sequences with measured rows, and one for the means.

    Args:
        model: The recorded model.
        rows: Rows at which the loss is measured, in groups.
        heads: Layer and head of each.
        controls: Draws of random heads.
        resamples: Resamples of documents for the intervals.
        seed: Random seed of draws and resamples.
    """
    sets: dict[str, Sequence[tuple[int, int]]] = {head_name(*head): [head] for head in heads}
    if len(heads) > 1:
        sets[f"all {len(heads)}"] = heads
    settings = {"controls": controls, "resamples": resamples, "seed": seed, "show_progress": False}
    effect = head_ablation(model, rows, sets, **settings)
    kinds = {"ablation": "named", "ablation_random": "random", "ablation_excess": "difference"}
    parts = {
        name: np.array([[effect.of(set_name, group, kind=kind) for group in rows.groups] for set_name in sets])
        for name, kind in kinds.items()
    }
    arrays = {name: part[..., 0] for name, part in parts.items()}
    for name in kinds:
        arrays |= {f"{name}_low": parts[name][..., 1], f"{name}_high": parts[name][..., 2]}
    arrays["ablation_tokens"] = np.array([len(group) for group in rows.groups.values()])
    return arrays, {"ablated": list(sets), "group": list(rows.groups)}


def ablation_text(data: Mapping[str, np.ndarray], group: int = 0) -> str:
    """Returns the effect of all ablated heads together on one group, with its control, as a phrase."""
    value, low, high, random = (
        float(data[name][-1, group]) for name in ("ablation", "ablation_low", "ablation_high", "ablation_random")
    )
    return f"{value:+z.2f} nats{interval_suffix(low, high)}, random heads {random:+z.2f}"
