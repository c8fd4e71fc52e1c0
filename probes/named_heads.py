"""Head ablation: what a behaviour loses without the heads that are said to do it.

Heads are named by hand, or by the saved result of a probe that ranks them (attention sinks, induction heads, successor
heads, ...). Their output z is replaced by its mean over the texts, all together and each alone, and the next token is
predicted again. For every group of tokens

    effect = mean of loss(ablated) - loss(model),  and the same for accuracy and KL(model ‖ ablated)

The groups separate the behaviour from the rest: tokens that repeat what followed an earlier occurrence, successors of
days and numbers, or texts of one domain, each beside all others. The control ablates as many random heads of the same
layers, several times; `difference` is the named heads less the mean of the random ones, paired by document.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Int64

from workbench import load_result
from workbench.probing import (
    CATEGORIES,
    NEUTRAL,
    AblatedHeads,
    MeasuredRows,
    Model,
    RequestError,
    Result,
    Store,
    StoreProbe,
    Variable,
    check_fields,
    counted,
    dataset,
    find_chains,
    find_places,
    group_intervals,
    head_ablation,
    head_name,
    interval_suffix,
    label,
    load_unembed,
    next_tokens,
    plain_torch,
    predicting_rows,
    provenance,
    recorded_model,
    require_causal,
    with_interval,
    with_note,
)

GROUPS = ("all", "repeats", "successions", "column")
_CELL = ("heads", "group")
_MEASURED = {"loss": "nats", "accuracy": "share of tokens", "kl": "nats"}
_MEANING = {
    "loss": "increase of the cross-entropy of the next token",
    "accuracy": "change of the share of next tokens that are predicted",
    "kl": "KL(model || ablated) of the next token",
}
VARIABLES: tuple[Variable, ...] = (
    *(
        variable
        for name, units in _MEASURED.items()
        for variable in (
            *with_interval(Variable(name, _CELL, units, _MEANING[name], f"{name}_random")),
            *with_interval(Variable(f"{name}_random", _CELL, units, "the same for random heads of the same layers")),
            *with_interval(Variable(f"{name}_difference", _CELL, units, f"{name} less {name}_random", "0")),
        )
    ),
    Variable("plain_loss", ("group",), "nats", "cross-entropy of the next token in the model as it is"),
    Variable("plain_accuracy", ("group",), "share of tokens", "next tokens that the model as it is predicts"),
    Variable("tokens", ("group",), "tokens", "measured tokens"),
)
_SYMBOLS = ("circle", "diamond", "square", "cross")  # of groups of tokens: all controls are grey


@dataclass(frozen=True)
class HeadAblation(StoreProbe):
    """Ablates named heads, together and each alone: effect on a behaviour, beside random heads of the same layers."""

    name: ClassVar[str] = "head-ablation"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Olsson et al. 2022, In-context learning and induction heads, transformer-circuits.pub",
        "Gould et al. 2024, Successor heads, arXiv 2312.09230",
        "Guo et al. 2024, Active-dormant attention heads, arXiv 2410.13835",
    )
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {
        "random": "as many random heads of the same layers, several draws",
        "other": "tokens without the behaviour",
    }

    heads: tuple[str, ...] = ()
    """Names of heads, such as L5H1."""
    ranked_by: str = ""
    """Folder of a saved result whose table has layer and head, strongest first; its first `top` are ablated, too."""
    top: int = 3
    """Heads that are taken from `ranked_by`."""
    groups: str = "repeats"
    """Tokens that are compared. repeats: the next token is what followed an earlier occurrence; successions: it is the
    successor of a day, month, number, ... up to 8 tokens back; column: values of `column`; all: one group."""
    column: str | None = None
    """Column of the token table whose values are the groups, such as domain."""
    ablation: str = "mean"
    """mean: a head's output becomes its mean over all tokens of the texts; zero: it becomes 0."""
    controls_drawn: int = 5
    """Draws of random heads."""
    where: str | None = "NOT is_special"
    """SQL over the token table: tokens that are measured, as far as one stands before and one after them. None: all."""
    row_limit: int = 1000
    """Tokens that are measured, in whole sequences drawn at random."""
    model: str | None = None
    """Folder or hub id of the recorded model, if the name in the store is not enough to load it."""
    resamples: int = 1000
    """Resamples of documents for the intervals."""
    seed: int = 0
    """Random seed of the drawn sequences, the random heads and the resamples."""
    device: str | None = None
    """Device of a model that the probe loads. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "groups", one_of=GROUPS)
        check_fields(self, "ablation", one_of=("mean", "zero"))
        check_fields(self, "top", "row_limit", "resamples", "controls_drawn", at_least=1, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)
        if (self.groups == "column") != (self.column is not None):
            raise RequestError("column: name a column of the token table together with groups='column'")

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Runs the model without the heads.

        Costs 2 + (1 + controls_drawn) x (heads + 1) passes over about `row_limit` measured tokens; with one head the
        last factor is 1.

        Args:
            store: Its texts are measured; it names the model.
            model: The recorded model. None: it is loaded from the setting `model` or the store's name for it.

        Raises:
            RequestError: No head is named, a head does not exist, no token of a group is measured, or the model cannot
                be loaded, is another one, is not causal, or has no heads whose output can be changed.
        """
        require_causal(store, self.name)
        heads = self._named()
        model = recorded_model(store, model or self.model, self.device)
        rows = predicting_rows(store, self.where, self.row_limit, self.seed)
        groups = self._groups(store, rows)
        if empty := [name for name, members in groups.items() if not len(members)]:
            raise RequestError(f"groups {self.groups!r}: no measured token is of {empty[0]!r}; record other texts")
        sets = {"all": heads} if len(heads) > 1 else {}
        sets |= {head_name(*head): [head] for head in heads}
        ablated = head_ablation(
            model,
            MeasuredRows(store, groups),
            sets,
            ablation=self.ablation,  # pyright: ignore[reportArgumentType]  # checked
            controls=self.controls_drawn,
            resamples=self.resamples,
            seed=self.seed,
        )
        data = dataset(
            VARIABLES, _arrays(ablated, list(sets), list(groups)), {"heads": list(sets), "group": list(groups)}
        )
        documents = len(np.unique(store.tokens["document"].to_numpy()[rows]))
        data.attrs["note"] = f"intervals over {counted(documents, 'document')}" if documents < 10 else ""
        return Result(self.name, data, ablated.table, provenance(store, self))

    def _named(self) -> list[tuple[int, int]]:
        """Layer and head of every named head, each once."""
        heads = []
        for name in self.heads:
            if not (match := re.fullmatch(r"L(\d+)H(\d+)", name)):
                raise RequestError(f"heads: {name!r} is no head; write it as L5H1")
            heads.append((int(match[1]), int(match[2])))
        if self.ranked_by:
            table = load_result(self.ranked_by).table
            if not {"layer", "head"} <= set(table.columns):
                raise RequestError(f"ranked_by: the table of {self.ranked_by} has no columns layer and head")
            heads += [(int(layer), int(head)) for layer, head in table[["layer", "head"]].head(self.top).to_numpy()]
        if not heads:
            raise RequestError("heads: none is named; give heads such as L5H1, or a result that ranks them")
        return list(dict.fromkeys(heads))

    def _groups(self, store: Store, rows: Int64[np.ndarray, " row"]) -> dict[str, Int64[np.ndarray, " _"]]:
        """Measured rows of each group."""
        if self.groups == "all":
            return {"all": rows}
        if self.groups == "column":
            assert self.column is not None
            if self.column not in store.tokens.column_names:
                raise RequestError(f"column {self.column!r} is not in the token table: {store.tokens.column_names}")
            values = store.tokens[self.column].to_pandas().astype("string").to_numpy(dtype=object, na_value="")[rows]
            return {str(value): rows[values == value] for value in sorted({str(text) for text in values} - {""})}
        if self.groups == "repeats":
            chosen = np.isin(rows, _repeated(store))
        else:
            chains = find_chains(load_unembed(store.path), space="both", case="both", min_members=4, wrap=True)
            chosen = np.isin(rows, find_places(store, chains, store.rows).rows)
        return {self.groups: rows[chosen], "other": rows[~chosen]}

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the effect on the first group and on the others, beside random heads."""
        data = result.data.isel(heads=0)
        names = ", ".join(str(name) for name in result.data["heads"].to_numpy() if name != "all")
        parts = []
        for group in data["group"].to_numpy()[:2].tolist():
            at = data.sel(group=group)
            low, high = float(at["loss_low"]), float(at["loss_high"])
            interval = interval_suffix(low, high)
            parts.append(
                f"loss at {group} {float(at['loss']):+z.2f} nats{interval} (random heads "
                f"{float(at['loss_random']):+z.2f}), accuracy {100 * float(at['plain_accuracy']):z.0f} to "
                f"{100 * float(at['plain_accuracy'] + at['accuracy']):z.0f} %"
            )
        return with_note(
            f"Without {names}: {'; '.join(parts)} ({counted(int(data['tokens'].sum()), 'token')}).", result
        )

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "loss" and "accuracy": effect of each set of heads on each group, beside random heads."""
        return {name: _figure(result, name) for name in ("loss", "accuracy")}


def _repeated(store: Store) -> Int64[np.ndarray, " row"]:
    """Rows whose next token followed an earlier occurrence of their own token in the sequence."""
    following = next_tokens(store)
    ids, sequence = (store.tokens[name].to_numpy().astype(np.int64) for name in ("token_id", "sequence"))
    known: set[tuple[int, int, int]] = set()
    rows = []
    for row, pair in enumerate(zip(sequence.tolist(), ids.tolist(), following.tolist(), strict=True)):
        if pair[2] < 0:
            continue
        if pair in known:
            rows.append(row)
        known.add(pair)
    return np.array(rows, dtype=np.int64)


def _arrays(ablated: AblatedHeads, heads: Sequence[str], groups: Sequence[str]) -> dict[str, np.ndarray]:
    """Variables of the result, axes (heads, group)."""
    arrays: dict[str, np.ndarray] = {}
    for name in _MEASURED:
        for kind, end in (("named", ""), ("random", "_random"), ("difference", "_difference")):
            values = np.array([[ablated.of(head, group, name, kind) for group in groups] for head in heads])
            for at, bound in enumerate(("", "_low", "_high")):
                arrays[f"{name}{end}{bound}"] = values[..., at]
    lines = ablated.table.loc[(ablated.table["heads"] == heads[0]) & (ablated.table["kind"] == "named")]
    for name in ("loss", "accuracy"):
        by_group = lines.loc[lines["measure"] == name].set_index("group")
        arrays[f"plain_{name}"] = by_group["plain"].reindex(list(groups)).to_numpy()
    arrays["tokens"] = (
        lines.loc[lines["measure"] == "loss"].set_index("group")["tokens"].reindex(list(groups)).to_numpy()
    )
    return arrays


def _figure(result: Result, name: str) -> go.Figure:
    data = result.data
    categories = [str(heads) for heads in data["heads"].to_numpy()]
    groups, controls = {}, []
    for group in data["group"].to_numpy().tolist():
        for kind, end in (("named heads", ""), ("random heads", "_random")):
            parts = [data[f"{name}{end}{bound}"].sel(group=group).to_numpy() for bound in ("", "_low", "_high")]
            groups[f"{label(str(group), 24)}, {kind}"] = np.stack(parts)
        controls.append(f"{label(str(group), 24)}, random heads")
    titles = {"loss": "Increase of the loss", "accuracy": "Change of the accuracy"}
    draws = result.provenance["settings"]["controls_drawn"]
    figure = group_intervals(
        groups,
        categories=categories,
        hover="%{x}",
        title=f"{titles[name]} without these heads, {label(str(result.provenance['model']), 50)}",
        subtitle=f"random heads: mean of {counted(draws, 'draw')} of the same layers; 95 % intervals over documents",
    )
    points: Any
    for number, points in enumerate(figure.data):
        marker = {"symbol": _SYMBOLS[number // 2 % len(_SYMBOLS)], "color": CATEGORIES[number // 2 % len(CATEGORIES)]}
        points.update(marker=marker | ({"color": NEUTRAL} if points.name in controls else {}))
    figure.update_xaxes(title="ablated heads")
    return figure.update_yaxes(title=_MEASURED[name], rangemode="normal")
