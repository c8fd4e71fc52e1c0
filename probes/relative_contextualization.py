"""Relative contextualization: how far a head's scores of a prompt exceed those of the text after it (RCStat, 2025).

f(i, j) is the score of query j and key i, before the softmax, as the model has it. With P the prompt's tokens and G the
ones after it,

    rc          = mean over j in G of the mean over i in P, i' in G, i' <= j of max(f(i, j) - f(i', j), 0)
    rc_marginal = mean over x, y of max(x - y, 0), x any f of P and G, y any f within G
    attribution of i in P = mean over j, i' of max(f(i, j) - f(i', j), 0), averaged over heads with the most rc

(arXiv 2506.19549; conditioning and scaling are our choice, as the paper's text was not at hand). Sinks are left out
of P by default: with them both measure the sink. The control has the keys of another text's prompt in place of P's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.probing import (
    LOST_VARIABLES,
    LayerProbe,
    Model,
    RequestError,
    Result,
    ScoreRule,
    Store,
    Variable,
    attention_scores,
    axis_title,
    check_fields,
    clustered_means,
    colour_limits,
    conditional_excess,
    counted,
    dataset,
    head_grid,
    head_hover,
    head_name,
    interval_suffix,
    intervals,
    label,
    marginal_excess,
    plain_torch,
    recorded_rules,
    require_causal,
    stack_heads,
    token_strip,
    whole_sequences,
    with_interval,
    with_note,
    with_progress,
)

_HEAD, _TOKEN = ("layer", "head"), ("token",)
_VARIABLES: tuple[Variable, ...] = (
    *with_interval(Variable("rc", _HEAD, "score", "mean excess of the prompt's scores over newer ones, by query", "0")),
    *with_interval(Variable("rc_marginal", _HEAD, "score", "the same over all pairs of scores, of any queries", "0")),
    Variable("rc_other", _HEAD, "score", "rc with the keys of another sequence's prompt at the same positions"),
    Variable("excess", _HEAD, "score", "rc less rc_other: what is owed to this prompt", "0"),
    Variable("attribution", _TOKEN, "score", "of tokens of the shown prompts, mean over the heads with the most rc"),
    Variable("text", _TOKEN, "text", "text of that token"),
    Variable("place", _TOKEN, "position", "position of that token"),
    Variable("sequence", _TOKEN, "sequence", "sequence of that token"),
    Variable("sinks", _HEAD, "share of keys", "keys of the prompt that are left out as sinks"),
    Variable("sequences", (), "sequences", "sequences that count"),
    *LOST_VARIABLES,
)


@dataclass(frozen=True)
class RelativeContextualization(LayerProbe):
    """Measures by how much each head scores a prompt's tokens above the tokens after it, and which tokens."""

    name: ClassVar[str] = "relative-contextualization"
    needs_model: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = _VARIABLES
    sources: ClassVar[tuple[str, ...]] = ("RCStat 2025, arXiv 2506.19549",)
    controls: ClassVar[Mapping[str, str]] = {
        "rc_other": "keys of another sequence's prompt at the same positions: what any prompt gives",
        "random weights": "the same architecture with random weights",
    }

    prompt: int | None = None
    """First tokens of each sequence that are the prompt. None: what comes before the first token with `generated` in a
    store of generations, else half of `length`."""
    length: int = 64
    """Tokens of each sequence that count, from its first on."""
    where: str | None = None
    """SQL over the token table: a sequence counts if the condition holds for its first token. None: all."""
    leave_out_sinks: bool = True
    """True leaves the first key, and keys with a mean attention above sink_threshold, out of the prompt, by head."""
    sink_threshold: float = 0.3
    """Mean attention from the newer tokens from which on a key is a sink."""
    heads: int = 10
    """Heads with the most rc whose attribution is averaged."""
    shown: int = 4
    """Sequences whose tokens get an attribution, from the first on."""
    model: str | None = None
    """Folder or name of the recorded model, for a store that does not hold its attention's scales. None: its name."""
    resamples: int = 1000
    """Resamples of documents for the intervals."""
    seed: int = 0
    """Random seed of the bootstrap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "length", at_least=4, whole=True)
        check_fields(self, "prompt", at_least=2, whole=True, optional=True)
        check_fields(self, "heads", "resamples", at_least=1, whole=True)
        check_fields(self, "shown", "seed", at_least=0, whole=True)
        check_fields(self, "sink_threshold", above=0, at_most=1)
        if self.prompt is not None and self.prompt >= self.length:
            raise RequestError(f"prompt {self.prompt} leaves no newer token of length {self.length}")

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads queries and keys, after rotation, once, twice for the control.

        Costs layers x sequences x heads x newer tokens x length x (d_head + log length).

        Raises:
            RequestError: Queries and keys were not recorded, no sequence is long enough, values are NaN or infinite, or
                the model is not causal.
        """
        require_causal(store, self.name)
        rules = recorded_rules(store, model or self.model, self.layers)
        texts = _Texts.choose(self, store)
        sites = [site for rule in rules.values() for site in (rule.queries, rule.keys)]
        rows = self.finite_rows(store, sites, np.concatenate([part.rows for part in texts]))
        texts = [part for part in texts if not np.isin(part.rows, rows.left_out).any()]
        heads, tokens = {}, {}
        for layer, rule in with_progress(list(rules.items()), "relative contextualization", "layers"):
            heads[layer], tokens[layer] = _read(self, store, rule, texts)
        layers = list(rules)
        arrays: dict[str, Any] = stack_heads(
            layers, heads, [variable.name for variable in _VARIABLES if variable.dims == _HEAD]
        )
        coords: dict[str, Any] = {"layer": layers, "head": np.arange(arrays["rc"].shape[1])}
        arrays |= _attributions(self, store, texts[: self.shown], arrays["rc"], layers, tokens)
        arrays["sequences"] = len(texts)
        data = dataset(_VARIABLES, {name: np.asarray(array) for name, array in arrays.items()}, coords)
        documents = len({part.document for part in texts})
        few = f"intervals over {counted(documents, 'document')}, fewer than 10" * (documents < 10)
        single = "rc_other not computed: it needs two sequences" * (len(texts) < 2)
        return self.result(store, data, _table(data), rows, [few, single])

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the head with the most rc beside its control, and the tokens with the most attribution."""
        data, best = result.data, result.table.iloc[0]
        interval = interval_suffix(best["rc_low"], best["rc_high"])
        control = "" if np.isnan(best["rc_other"]) else f", other prompts {best['rc_other']:z.2f}"
        text = (
            f"Most relative contextualization: {head_name(int(best['layer']), int(best['head']))}, "
            f"{best['rc']:z.2f} in "
            f"units of its scores{interval}{control}, marginal {best['rc_marginal']:z.2f}; {int(data['sequences'])} "
            "sequences"
        )
        if not bool(result.table["excess"].isna().all()):
            beyond = result.table.loc[result.table["excess"].idxmax()]
            text += (
                f". Most beyond other prompts: {head_name(int(beyond['layer']), int(beyond['head']))}, "
                f"{beyond['rc']:z.2f} and {beyond['rc_other']:z.2f}"
            )
        if data.sizes.get("token"):
            values = data["attribution"].to_numpy()
            most = np.argsort(-np.nan_to_num(values, nan=-1), kind="stable")[:3]
            named = ", ".join(f"{str(data['text'].to_numpy()[index])!r} {values[index]:z.2f}" for index in most)
            text += f". Tokens with the most attribution: {named}"
        return with_note(f"{text}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "heads", rc by layer and head, and "tokens", a prompt coloured by attribution."""
        figures = {"heads": _heads(result)}
        return {**figures, "tokens": _tokens(result)} if result.data.sizes.get("token") else figures


@dataclass(frozen=True)
class _Texts:
    """One sequence."""

    rows: Int[np.ndarray, " row"]
    prompt: int
    """First tokens that are the prompt."""
    document: int

    @staticmethod
    def choose(probe: RelativeContextualization, store: Store) -> list[_Texts]:
        """Sequences with a prompt of two tokens or more and a newer token."""
        sequences = whole_sequences(store, probe.where)
        generated = None
        if probe.prompt is None and "generated" in store.tokens.column_names:
            generated = store.tokens["generated"].fill_null(False).to_numpy()
        texts = []
        for start, length, document in zip(sequences.starts, sequences.lengths, sequences.document, strict=True):
            rows = start + np.arange(min(int(length), probe.length))
            prompt = probe.prompt or probe.length // 2
            if generated is not None:
                prompt = int(generated[rows].argmax()) if generated[rows].any() else 0
            elif len(rows) < probe.length:
                continue
            if 2 <= prompt < len(rows):
                texts.append(_Texts(rows, prompt, int(document)))
        if not texts:
            raise RequestError(
                f"no selected sequence has {probe.length} tokens, or a prompt and generated tokens; give a smaller "
                "length"
            )
        return texts


def _read(
    probe: RelativeContextualization, store: Store, rule: ScoreRule, texts: list[_Texts]
) -> tuple[dict[str, np.ndarray], list[Float[np.ndarray, "head key"]]]:
    """Measures of the heads of one layer, and attributions of the shown prompts."""
    values: dict[str, list[Tensor]] = {"rc": [], "rc_marginal": [], "rc_other": [], "sinks": []}
    tokens = []
    for number, (text, partner) in enumerate(_pairs(texts)):
        query, key = store[rule.queries][text.rows[text.prompt :]], store[rule.keys][text.rows]
        scores, earlier, newer, sinks = _parts(probe, rule, query, key, text.prompt)
        rc, by_key = conditional_excess(scores, earlier, newer)
        values["rc"].append(rc)
        values["rc_marginal"].append(marginal_excess(scores, earlier, newer))
        values["sinks"].append(sinks)
        if number < probe.shown:
            tokens.append(by_key[:, : text.prompt].numpy())
        shared = 0 if partner is None else min(text.prompt, partner.prompt)
        if partner is not None and shared > 1:
            foreign = key.clone()
            foreign[:shared] = store[rule.keys][partner.rows[:shared]]
            parts = _parts(probe, rule, query, foreign, text.prompt)
            inside = torch.arange(len(text.rows)) < shared
            values["rc_other"].append(conditional_excess(parts[0], parts[1] & inside, parts[2])[0])
        else:
            values["rc_other"].append(torch.full_like(rc, torch.nan))
    documents = np.array([text.document for text in texts])
    means: dict[str, np.ndarray] = {}
    for name, parts in values.items():
        stacked = torch.stack(parts).double().numpy()
        mean, resampled = clustered_means(stacked, documents, resamples=probe.resamples, seed=probe.seed)
        means[name] = mean
        if name in ("rc", "rc_marginal"):
            means[f"{name}_low"], means[f"{name}_high"] = intervals(resampled)
    return means | {"excess": means["rc"] - means["rc_other"]}, tokens


def _pairs(texts: list[_Texts]) -> Iterator[tuple[_Texts, _Texts | None]]:
    """Each sequence with the next one, of another document where there is one."""
    for number, text in enumerate(texts):
        partners = [texts[(number + step) % len(texts)] for step in range(1, len(texts))]
        partner = next(
            (candidate for candidate in partners[:8] if candidate.document != text.document),
            partners[0] if partners else None,
        )
        yield text, partner


def _parts(
    probe: RelativeContextualization,
    rule: ScoreRule,
    query: Float[Tensor, "query head d"],
    key: Float[Tensor, "key kv_head d"],
    prompt: int,
) -> tuple[Tensor, Bool[Tensor, "head query key"], Bool[Tensor, "head query key"], Float[Tensor, " head"]]:
    """Scores of newer queries, keys of the prompt that count, newer keys, and the share of the prompt left out."""
    scores = attention_scores(rule, query, key).double()
    places = torch.arange(len(key))
    visible = torch.as_tensor(rule.visible(torch.arange(prompt, prompt + len(query))[:, None], places))
    earlier = (visible & (places < prompt)).expand(scores.shape)
    newer = (visible & (places >= prompt)).expand(scores.shape)
    sinks = torch.zeros(scores.shape[0], dtype=torch.float64)
    if probe.leave_out_sinks:
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        sink = weights.sum(1) / visible.sum(0).clamp(min=1) > probe.sink_threshold
        sink[:, 0] = True
        sinks = sink[:, :prompt].double().mean(1)
        earlier = earlier & ~sink[:, None]
    return scores, earlier, newer, sinks


def _attributions(
    probe: RelativeContextualization,
    store: Store,
    texts: list[_Texts],
    rc: Float[np.ndarray, "layer head"],
    layers: list[int],
    tokens: Mapping[int, list[np.ndarray]],
) -> dict[str, Any]:
    """Attribution of the tokens of the shown prompts."""
    ranked = np.argsort(-np.nan_to_num(rc, nan=-1), axis=None, kind="stable")[: probe.heads]
    best = [np.unravel_index(index, rc.shape) for index in ranked]
    values, rows = [], []
    for number, text in enumerate(texts):
        parts = np.stack([tokens[layers[int(layer)]][number][int(head)] for layer, head in best])
        known = ~np.isnan(parts)
        mean = np.divide(np.nansum(parts, 0), known.sum(0), out=np.full(parts.shape[1], np.nan), where=known.any(0))
        values.append(mean)
        rows.append(text.rows[: text.prompt])
    if not rows:
        return {}
    table = store.tokens.take(np.concatenate(rows))
    arrays = {"attribution": np.concatenate(values), "text": table["token"].to_pylist()}
    return arrays | {"place": table["position"].to_numpy(), "sequence": table["sequence"].to_numpy()}


def _table(data: Any) -> pd.DataFrame:
    """A line for each layer and head, the most rc first."""
    layer, head = (axis.ravel() for axis in np.meshgrid(data["layer"], data["head"], indexing="ij"))
    columns = {name: data[name].to_numpy().ravel() for name in data if data[name].dims == _HEAD}
    table = pd.DataFrame({"layer": layer, "head": head, **columns})
    return table.loc[table["rc"].notna()].sort_values("rc", ascending=False, kind="stable", ignore_index=True)


def _heads(result: Result) -> Any:
    data, layers = result.data, result.data["layer"].to_numpy().tolist()
    lines = {(line["layer"], line["head"]): line for line in result.table.to_dict("records")}

    def hover(layer: int, head: int) -> str:
        line = lines.get((layer, head))
        return "" if line is None else head_hover(line, ("rc", "rc_other", "rc_marginal", "sinks"))

    values = data["rc"].to_numpy()
    return head_grid(
        values,
        hover=[[hover(layer, head) for head in data["head"].to_numpy().tolist()] for layer in layers],
        layers=layers,
        title=f"Relative contextualization in {label(str(result.provenance['model']), 60)}",
        subtitle=f"excess of the prompt's scores over newer ones; {counted(data['sequences'], 'sequence')}",
        unit="score",
        limits=colour_limits(values),
    )


def _tokens(result: Result) -> Any:
    data = result.data
    first = data["sequence"].to_numpy()
    rows = np.flatnonzero(first == first[0])
    return token_strip(
        data["attribution"].to_numpy()[rows],
        tokens=[str(text) for text in data["text"].to_numpy()[rows]],
        positions=data["place"].to_numpy()[rows].tolist(),
        title=f"Attribution of a prompt's tokens in {label(str(result.provenance['model']), 60)}",
        subtitle=f"mean over the {counted(result.provenance['settings']['heads'], 'head')} with the largest relative "
        "contextualization; blank: a sink",
        unit=axis_title(data["attribution"].attrs),
    )
