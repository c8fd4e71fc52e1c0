"""Direct logit attribution: a logit as a sum over what each part of the model added to the last residual stream.

With the final norm at the row's own scale s, the logit of token a (or the difference to token b) is

    sum over parts x of m (x * g) / s . (w_a - w_b)  +  m n . (w_a - w_b)  +  m (b_a - b_b)

with the gain g and the bias n of the final norm, the rows w of W_U, its bias b, and the model's factor m of its logits;
for a LayerNorm each part x is centred. Parts are the embedding, each attention and MLP, each head (z W_O, with the bias
of the projection as a term of its own), or each neuron; a norm behind attention or MLP keeps its own scale, too. The
sum is the logit before a soft-cap. It is a decomposition, not an effect: later parts read what earlier ones wrote. With
`ablation` the model runs with each part set to 0, or to its mean, at the row alone, and what the logit loses stands
beside what the part adds directly.

In place of w_a - w_b any direction d of the normed last stream can be decomposed: d . norm(x), without m and b.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

import numpy as np
import pandas as pd
from torch import Tensor

from workbench.probing import (
    SUBLAYERS,
    AblatedPart,
    AblatedRuns,
    Decomposition,
    Direction,
    FrozenOutput,
    LogitTargets,
    Model,
    Parts,
    RequestError,
    Result,
    SplitTerm,
    Store,
    StoreProbe,
    StreamTerm,
    SumChecks,
    TermName,
    TermSums,
    Variable,
    ablated_logit_text,
    ablation_bars,
    ablation_effects,
    attribution_bars,
    attribution_grid,
    attribution_heads,
    check_added,
    check_fields,
    clustered_means,
    dataset,
    head_outputs,
    interval_suffix,
    intervals,
    load_direction,
    load_unembed,
    mlp_outputs,
    plain_torch,
    plan_terms,
    progress,
    recorded_model,
    require_causal,
    resampled_means,
    selected_rows,
    with_interval,
    with_note,
)

_TERM, _ROW = ("term",), ("token", "term")

VARIABLES = (
    *with_interval(Variable("contribution", _TERM, "logits", "mean contribution of the term over tokens", "control")),
    Variable("absolute", _TERM, "logits", "mean absolute contribution over tokens"),
    *with_interval(
        Variable("control", _TERM, "logits", "the same for tokens drawn uniformly from the vocabulary, for each row")
    ),
    *with_interval(Variable("ablated", _TERM, "logits", "mean loss when the term is ablated at the row itself", "0")),
    Variable("direct", _TERM, "logits", "mean contribution of the term at the same tokens", "0"),
    Variable(
        "ablated_by_token", ("ablated_token", "term"), "logits", "loss at each token whose terms are ablated", "0"
    ),
    Variable("by_token", _ROW, "logits", "contribution of the term at each of the first tokens"),
    Variable("text", ("token",), "text", "token whose row is decomposed"),
    Variable("target", ("token",), "text", "token whose logit is decomposed"),
    Variable("logit", (), "logits", "mean of the decomposed logit or difference, before a soft-cap"),
    Variable("error", (), "logits", "largest |sum of the terms - logit| over tokens", "0"),
    Variable("rounding", (), "logits", "largest sum of absolute terms times a quarter of the stored type's eps"),
    Variable("nonfinite_rows", (), "tokens", "tokens left out because of a NaN or infinite value", "0"),
)


@dataclass(frozen=True)
class DirectLogitAttribution(StoreProbe):
    """Decomposes a logit or a logit difference into what embedding, attention, MLPs, heads or neurons add to it."""

    name: ClassVar[str] = "direct-logit-attribution"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Elhage et al. 2021, A mathematical framework for transformer circuits",
        "Wang et al. 2022, Interpretability in the wild, arXiv 2211.00593",
    )
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {
        "control": "the same decomposition of tokens drawn uniformly from the vocabulary, or of random directions",
    }

    token: str | None = None
    """Text of the token whose logit is decomposed at every row. None: see token_column and predicted."""
    against: str | None = None
    """Text of the token whose logit is subtracted."""
    token_column: str | None = None
    """Column of the token table with the text of each row's token, such as the answer of a prompt."""
    against_column: str | None = None
    """Column with the text of the token that is subtracted."""
    predicted: str = "top"
    """Token where neither token nor token_column is given. top: the model's top token; next: the next of the text."""
    direction: str | None = None
    """File of a direction of the normed last residual stream (`wb.Direction.save`) that is read in place of tokens."""
    relative: bool = False
    """True subtracts the mean over the vocabulary from every term, which changes no probability."""
    parts: str = "sublayers"
    """blocks: whole blocks; sublayers: attention and MLP of each block; heads: each attention by head, which needs z
    and the model; neurons: each MLP by neuron, which needs mlp_post and the model."""
    neurons: int = 10
    """Neurons of each layer with their own term, by absolute mean contribution; the others are one term."""
    ablation: str | None = None
    """zero or mean: run the model with each term set to 0, or to its mean over the selected tokens, at the token
    itself; what the logit loses is exact. None: the decomposition alone."""
    ablated_tokens: int = 32
    """Tokens at which terms are ablated, drawn at random; costs a pass over their texts for each term."""
    where: str | None = None
    """SQL over the token table: the tokens whose logits are decomposed. None: all."""
    detail: int = 64
    """Maximum number of tokens whose terms are kept one by one, from the first selected one on; means are over all."""
    model: str | None = None
    """Directory or hub id of the recorded model, if the name in the store is not enough to load it."""
    resamples: int = 1000
    """Resamples of documents for the intervals."""
    seed: int = 0
    """Random seed of the control's tokens and of the resamples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "parts", one_of=get_args(Parts))
        check_fields(self, "predicted", one_of=("top", "next"))
        check_fields(self, "neurons", "resamples", "ablated_tokens", at_least=1, whole=True)
        check_fields(self, "ablation", one_of=("zero", "mean"), optional=True)
        check_fields(self, "detail", "seed", at_least=0, whole=True)
        for setting, column in (("token", "token_column"), ("against", "against_column")):
            if getattr(self, setting) is not None and getattr(self, column) is not None:
                raise RequestError(f"{setting} and {column} both name the token; give one of them")
        tokens = ("token", "against", "token_column", "against_column")
        if self.direction is not None and (self.relative or any(getattr(self, name) is not None for name in tokens)):
            raise RequestError("direction stands in place of tokens; leave token, against, their columns and relative")

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Decomposes the logit at every selected row.

        Costs rows x d_model operations a term in float64; for heads and neurons rows x d_model x (heads x d_head, or
        d_mlp) a layer. Precision: the sum is the model's logit to 1e-4 in a float32 store; a store in bfloat16 misses
        it by about 2^-9 times the sum of the absolute terms, in float16 by 2^-12 times, which `rounding` states.

        Args:
            store: Has resid_post of the last block, resid_pre.0 (or embed), and attn_out and mlp_out of
                every block, or resid_post of those that lack one; z for heads, mlp_post for neurons.
            model: The recorded model, for heads, neurons and ablation. None: it is loaded from the setting `model` or
                the store's name for it.

        Raises:
            RequestError: A site or the unembedding was not recorded, a token is no single one, the terms do not add up
                to the stream, values are NaN or infinite, or the model is not causal or cannot be loaded.
        """
        direction = None if self.direction is None else load_direction(self.direction)
        return self._run(store, direction, model)

    def read(self, store: Store, direction: Direction, *, model: Model | None = None) -> Result:
        """Decomposes the normed last stream along a direction in memory, whatever the setting `direction`; see `run`.

        Args:
            store: The store.
            direction: Direction of d_model, such as a row of the unembedding minus another one.
            model: The recorded model.
        """
        return self._run(store, direction, model)

    @plain_torch()
    def _run(self, store: Store, direction: Direction | None, model: Model | None) -> Result:
        require_causal(store, self.name)
        unembed = load_unembed(store.path)
        chosen = selected_rows(store, self.where)
        terms = plan_terms(store, self.parts)  # pyright: ignore[reportArgumentType]  # checked
        if self.ablation is not None or self.parts in ("heads", "neurons"):
            model = recorded_model(store, model or self.model, "cpu")
        split = self._split(store, terms, model)
        last = f"resid_post.{store.manifest.model.n_layers - 1}"
        read = [site for term in terms for site in (*term.plus, *term.minus)]
        rows = self.finite_rows(store, [*dict.fromkeys([*read, *(part.site for part in split.values()), last])], chosen)
        if direction is not None:
            targets = LogitTargets.of_direction(unembed, direction, rows.rows)
        else:
            named = {name: (getattr(self, name), getattr(self, f"{name}_column")) for name in ("token", "against")}
            targets = LogitTargets.of_tokens(store, unembed, rows.rows, named, self.predicted, self.relative)
        work = Decomposition(store, unembed, terms, split, rows.rows[targets.known], targets.chosen(targets.known))
        neurons = self.neurons if self.parts == "neurons" else None
        names, totals, details, checks = work.decompose(neurons, self.detail, self.seed)
        ablated = {} if self.ablation is None or model is None else self._ablated(work, model, names)
        data = self._data(work, names, totals, details, checks, ablated)
        data.attrs["direction"] = "" if direction is None else direction.name
        table = _table(names, data)
        return self.result(store, data, table, rows, [targets.note])

    def _split(self, store: Store, terms: Sequence[StreamTerm], model: Model | None) -> dict[str, SplitTerm]:
        """Sublayers that are split further, by the name of their term."""
        if self.parts not in ("heads", "neurons"):
            return {}
        kind, site = ("attn_out", "z") if self.parts == "heads" else ("mlp_out", "mlp_post")
        assert model is not None  # loaded by `run`
        outputs = head_outputs(model) if self.parts == "heads" else mlp_outputs(model)
        names = {term.layer: term.name for term in terms if term.kind in (kind, SUBLAYERS[kind])}
        layers = [layer for layer in outputs if layer in names]
        store.require(*(f"{site}.{layer}" for layer in layers or outputs))
        if not layers:
            store.require(*(f"{kind}.{layer}" for layer in outputs))
        check_added({layer: outputs[layer] for layer in layers}, model)
        return {
            names[layer]: SplitTerm(layer, f"{site}.{layer}", FrozenOutput(outputs[layer]), self.parts == "heads")
            for layer in layers
        }

    def _ablated(self, work: Decomposition, model: Model, names: list[TermName]) -> dict[str, Any]:
        """Exact effects of the terms at some rows, and their contributions there."""
        drawn = np.random.default_rng(self.seed).permutation(len(work.rows))[: self.ablated_tokens]
        index = np.sort(drawn)
        rows, targets = work.rows[index], work.targets.chosen(index)
        runs, parts = AblatedRuns.make(model, work.unembed, work.store, rows, targets), _parts(names, work)
        replacement = "mean" if self.ablation == "mean" else "zero"
        with progress("ablating", len(parts), "terms") as advance:
            terms = [term.name for term in names]
            effects = ablation_effects(runs, parts, replacement, work.mean, terms, advance)
        direct, _ = replace(work, rows=rows, targets=targets).each(slice(0, len(rows)))
        documents = work.store.tokens["document"].take(rows).to_numpy()
        mean, resampled = clustered_means(effects, documents, resamples=self.resamples, seed=self.seed)
        low, high = intervals(resampled)
        arrays = {"ablated": mean, "ablated_low": low, "ablated_high": high, "direct": direct.mean(0).numpy()}
        return arrays | {"ablated_by_token": effects, "ablated_token": rows}

    def _data(
        self,
        work: Decomposition,
        names: list[TermName],
        totals: TermSums,
        details: Tensor,
        checks: SumChecks,
        ablated: dict[str, Any],
    ) -> Any:
        arrays: dict[str, Any] = {}
        for name, values in (
            ("contribution", totals.values),
            ("absolute", totals.absolute),
            ("control", totals.control),
        ):
            mean, resampled = resampled_means(
                values, np.broadcast_to(totals.rows[:, None], values.shape), resamples=self.resamples, seed=self.seed
            )
            arrays[name] = mean
            if name != "absolute":
                arrays[f"{name}_low"], arrays[f"{name}_high"] = intervals(resampled)
        detail_rows = work.rows[: self.detail]
        arrays |= {"by_token": details.numpy(), "text": list(work.store.tokens["token"].take(detail_rows).to_pylist())}
        arrays |= {"target": work.targets.chosen(slice(self.detail)).texts(work.unembed), "logit": checks.logit}
        arrays |= {"error": checks.error, "rounding": checks.rounding}
        coords = {"term": [term.name for term in names], "token": detail_rows}
        if ablated:
            coords["ablated_token"] = ablated.pop("ablated_token")
            arrays |= ablated
        return dataset(VARIABLES, arrays, coords)

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the decomposed logit, the three largest terms with their intervals, and the error of the sum."""
        data, table = result.data, result.table
        largest = table.iloc[np.argsort(-table["contribution"].abs().to_numpy(), kind="stable")[:3]]
        parts = [
            f"{line['term']} {line['contribution']:+z.2f}{interval_suffix(line['low'], line['high'])}"
            for _, line in largest.iterrows()
        ]
        text = f"Mean {_quantity(result)} {float(data['logit']):z.2f}; largest terms: {'; '.join(parts)}; "
        text += f"the sum misses it by at most {float(data['error']):.2g}"
        if float(data["rounding"]) > 1e-3:
            text += f" and, by rounding of the stored type, the model's own by about {float(data['rounding']):.2g}"
        if "ablated" in data:
            text += f"; {ablated_logit_text(data, result.provenance['settings']['ablation'])}"
        return with_note(f"{text}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "terms", the mean of each term; "heads", one cell a head; "tokens", terms by tokens;
        "ablation", what the logit loses without a term against what the term adds."""
        figures = {"terms": attribution_bars(result, _quantity(result))}
        if "head" in set(result.table["kind"]):
            figures["heads"] = attribution_heads(result, _quantity(result))
        if "ablated" in result.data:
            figures["ablation"] = ablation_bars(result, _quantity(result))
        if result.data.sizes["token"]:
            figures["tokens"] = attribution_grid(result, _quantity(result))
        return figures


def _quantity(result: Result) -> str:
    settings = result.provenance["settings"]
    if name := result.data.attrs.get("direction"):
        return f"normed last stream along {name!r}"
    target = settings["token"] or settings["token_column"] or f"{settings['predicted']} token"
    against = settings["against"] or settings["against_column"]
    text = f"logit of {target!r}" if settings["token"] else f"logit of the {target}"
    text += f" minus {against!r}" if settings["against"] else f" minus the {against}" if against else ""
    return f"{text} minus the vocabulary's mean" if settings["relative"] else text


def _parts(names: Sequence[TermName], work: Decomposition) -> dict[str, AblatedPart]:
    """Terms that are one tensor of the model, or a part of one; blocks, biases and sums of neurons are none."""
    sites = {term.name: term.plus[0] for term in work.terms if not term.minus}
    parts = {}
    for term in names:
        if term.kind == "head":
            parts[term.name] = AblatedPart(f"z.{term.layer}", head=term.index)
        elif term.kind == "neuron":
            parts[term.name] = AblatedPart(f"mlp_post.{term.layer}", index=term.index)
        elif term.name in sites:
            parts[term.name] = AblatedPart(sites[term.name])
    return parts


def _table(names: Sequence[TermName], data: Any) -> pd.DataFrame:
    """One line a term, in the order of the forward pass."""
    table = pd.DataFrame(
        {
            "term": [term.name for term in names],
            "kind": [term.kind for term in names],
            "layer": pd.array([term.layer for term in names], dtype="Int64"),
            "index": pd.array([term.index for term in names], dtype="Int64"),
        }
    )
    columns = {"contribution": "contribution", "low": "contribution_low", "high": "contribution_high"}
    columns |= {name: name for name in ("absolute", "control", "control_low", "control_high")}
    columns |= {name: name for name in ("ablated", "ablated_low", "ablated_high", "direct") if name in data}
    return table.assign(**{column: data[name].to_numpy() for column, name in columns.items()})
