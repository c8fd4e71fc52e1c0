"""Representation hijacking: whether a word that is used in place of another is represented as the other one.

Sentences that fit a word B are written with a harmless word A in its place, and a question about A follows (the
measurement of arXiv 2512.03771, with harmless pairs only). With h_l the state of layer l at the last token of the last
A, mu_l(W) the mean state of a word in plain sentences, and all states less the mean of all tokens at that layer,

    overwrite(l) = cos(h_l, mu_l(B)) - cos(h_l, mu_l(A))                            from -2 (A) to 2 (B)

The crossing layer is the first from which overwrite stays above 0. Controls: texts with B itself (what is reached at
best), A in sentences that fit it, and A among the same words in random order. With the model, each state is also put
into the prompt "cat->cat; ...; ?" at its own layer (patchscope): ln P(B) - ln P(A) after it, beside random states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, ClassVar

import numpy as np
import plotly.graph_objects as go
import torch
import xarray as xr
from jaxtyping import Float, Int64

from workbench.probing import (
    CATEGORIES,
    IDENTITY_PROMPT,
    LOST_VARIABLES,
    NEUTRAL,
    Band,
    LayerProbe,
    Model,
    RequestError,
    Result,
    Store,
    Variable,
    check_fields,
    clustered_ends,
    clustered_means,
    counted,
    dataset,
    first_token,
    interval_suffix,
    intervals,
    label,
    layer_bands,
    model_label,
    plain_torch,
    random_states,
    read_states,
    recorded_ends,
    recorded_model,
    target_prompt,
    with_interval,
    with_note,
    with_progress,
)

CONDITIONS = ("substituted", "original", "own", "shuffled")
_CELL = ("condition", "sentences", "layer")
_TITLES = {
    "substituted": "in sentences of the other word",
    "original": "the other word itself",
    "own": "in its own sentences",
    "shuffled": "among shuffled words",
}
VARIABLES = (
    *with_interval(
        Variable(
            "overwrite", _CELL, "cosine", "cosine with the other word less that with its own, -2 to 2", "that of own"
        )
    ),
    Variable(
        "crossing", ("condition", "sentences"), "layer", "first layer from which overwrite stays above 0; NaN: none"
    ),
    *with_interval(
        Variable("reading", _CELL, "nats", "ln P(other word) - ln P(own) after the patchscope's prompt, by layer")
    ),
    *with_interval(Variable("reading_random", ("layer",), "nats", "the same for random states of equal norm")),
    Variable("texts", ("condition", "sentences"), "texts", "texts of each kind"),
)


@dataclass(frozen=True)
class RepresentationHijacking(LayerProbe):
    """Measures whether a word in sentences of another word is represented as the other one, by layer."""

    name: ClassVar[str] = "representation-hijacking"
    needs_model: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = (
        "In-context representation hijacking, arXiv 2512.03771",
        "Ghandeharioun et al. 2024, Patchscopes, arXiv 2401.06102",
    )
    variables: ClassVar[tuple[Variable, ...]] = (*VARIABLES, *LOST_VARIABLES)
    controls: ClassVar[Mapping[str, str]] = {
        "original": "texts with the other word itself: the largest overwrite to expect",
        "own": "the word in sentences that fit it: the smallest",
        "shuffled": "the word among the same words in random order: what company alone does",
        "reading_random": "random states of equal norm in the patchscope's prompt",
    }

    site: str = "resid_post"
    """Kind of site, of every layer."""
    prompt: str = IDENTITY_PROMPT
    """Prompt of the patchscope; its last token takes the state."""
    model: str | None = None
    """Folder or name of the recorded model, for the patchscope. None: none, unless a loaded model is given."""
    token_limit: int = 4000
    """Maximum number of tokens, drawn at random, whose mean is subtracted."""
    resamples: int = 1000
    """Resamples of texts for the intervals."""
    seed: int = 0
    """Random seed of the drawn tokens, the resamples and the random states."""
    device: str | None = None
    """Device of a model that the probe loads. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "token_limit", "resamples", at_least=1, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads the states of a store of `wb.substitution_texts`.

        Costs one pass of the model over texts x layers x the prompt, where a model is given.

        Raises:
            RequestError: The store has no such texts, the site was not recorded, values are NaN or infinite, or the
                model is another one or has no tokenizer.
        """
        layers, labels = self.recorded(store, self.site)
        rows, condition, count, words = _targets(store)
        background = np.flatnonzero(store.tokens["position"].to_numpy() > 0)
        if len(background) > self.token_limit:
            background = np.sort(np.random.default_rng(self.seed).choice(background, self.token_limit, replace=False))
        finite = self.finite_rows(store, labels, np.union1d(rows, background))
        is_finite, background = np.isin(rows, finite.rows), background[np.isin(background, finite.rows)]
        rows, condition, count, words = (part[is_finite] for part in (rows, condition, count, words))
        word, original = _words(condition, words)
        counts = sorted({int(number) for number in count[condition != "plain"]})
        cells = {
            (i, j): np.flatnonzero((condition == name) & (count == number))
            for i, name in enumerate(CONDITIONS)
            for j, number in enumerate(counts)
        }
        means = {term: (condition == "plain") & (words == term) for term in (word, original)}
        values = np.stack(
            [_overwrite(store, site, rows, background, means[word], means[original]) for site in labels], 1
        )
        arrays: dict[str, Any] = _cells("overwrite", cells, values, len(counts), self.resamples, self.seed)
        arrays["crossing"] = np.apply_along_axis(_crossing, -1, arrays["overwrite"], np.array(layers))
        shape = (len(CONDITIONS), len(counts))
        arrays["texts"] = np.reshape([len(cells[i, j]) for i in range(shape[0]) for j in range(shape[1])], shape)
        if model is not None or self.model is not None:
            model = recorded_model(store, model or self.model, self.device)
            arrays |= self._readings(store, model, labels, rows, cells, (word, original), len(counts))
        coords = {"condition": list(CONDITIONS), "sentences": counts, "layer": layers}
        data = dataset(self.variables, arrays, coords)
        data.attrs |= {"word": word, "original": original}
        names = [name for name in data if data[name].dims == _CELL]
        return self.result(store, data, data[names].to_dataframe().reset_index(), finite)

    def _readings(
        self,
        store: Store,
        model: Model,
        labels: Sequence[str],
        rows: Int64[np.ndarray, " text"],
        cells: Mapping[tuple[int, int], Int64[np.ndarray, " member"]],
        words: tuple[str, str],
        counts: int,
    ) -> dict[str, np.ndarray]:
        """What the model says after the prompt, of each layer's states and of random ones."""
        token, original_token = (first_token(model, f" {word}") for word in words)
        if token == original_token:
            raise RequestError(f"words: {words[0]!r} and {words[1]!r} begin with the same token of this model")
        prompt = target_prompt(model, self.prompt)
        members = np.unique(np.concatenate(list(cells.values())))
        parts, random = [], []
        for site in with_progress(labels, "reading states", "layers"):
            states = store[site][rows[members]].float()
            for drawn, lines in ((states, parts), (random_states(states, self.seed), random)):
                log = read_states(model, prompt, site, drawn)
                lines.append((log[:, original_token] - log[:, token]).numpy())
        values = np.full((len(rows), len(labels)), np.nan)
        values[members] = np.stack(parts, 1)
        by_text = np.stack(random, 1)
        low, high = clustered_ends(by_text, members, resamples=self.resamples, seed=self.seed)
        readings = _cells("reading", cells, values, counts, self.resamples, self.seed)
        readings |= {"reading_random": by_text.mean(0), "reading_random_low": low, "reading_random_high": high}
        return readings

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the overwrite with the most sentences beside all controls, and the crossing layer."""
        data = result.data.isel(sentences=-1)
        number = int(data["sentences"])
        at = data.sel(condition="substituted")
        layer = int(np.nanargmax(at["overwrite"].to_numpy()))
        low, high = (float(at[f"overwrite_{end}"][layer]) for end in ("low", "high"))
        interval = interval_suffix(low, high)
        controls = ", ".join(
            f"{name} {float(data['overwrite'].sel(condition=name)[layer]):z.2f}" for name in CONDITIONS[1:]
        )
        crossing = float(at["crossing"])
        where = (
            "no layer from which it stays above 0" if np.isnan(crossing) else f"above 0 from layer {crossing:z.0f} on"
        )
        text = (
            f"{data.attrs['word']!r} in {counted(number, 'sentence')} of {data.attrs['original']!r}: largest overwrite "
            f"{float(at['overwrite'][layer]):z.2f} at layer {int(data['layer'][layer])}{interval} ({controls}); {where}"
        )
        if "reading" in data:
            ratio = float(at["reading"][layer])
            text += (
                f"; patchscope there: ln P ratio {ratio:z.1f} (random state "
                f"{float(data['reading_random'][layer]):z.1f})"
            )
        return with_note(f"{text}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "overwrite" by layer and condition, "sentences", the same by their number, and "reading"."""
        last = result.data.isel(sentences=-1)
        figures = {
            "overwrite": _drawn(
                result,
                _of_conditions(last, "overwrite"),
                "Is the word read as the other one?",
                f"{counted(last['sentences'], 'sentence')}; 95 % intervals over "
                f"{counted(last['texts'].max(), 'text')} of each condition",
                "overwrite: cosine with the other word less its own",
            )
        }
        if result.data.sizes["sentences"] > 1:
            figures["sentences"] = _by_sentences(result)
        if "reading" in last:
            bands = _of_conditions(last, "reading")
            random = last["reading_random"].to_numpy()
            bands.append(Band("random state", random, recorded_ends(last, "reading_random"), NEUTRAL, "dot"))
            texts = f"{counted(last['texts'].max(), 'text')} of each condition"
            subtitle = f"{counted(last['sentences'], 'sentence')}; {texts}"
            subtitle += "; bands: 95 % intervals over texts" * (recorded_ends(last, "reading") is not None)
            title, unit = "Patchscope: what the model reads", "ln P(other) - ln P(own), nats"
            figures["reading"] = _drawn(result, bands, title, subtitle, unit)
        return figures


def _of_conditions(last: xr.Dataset, variable: str) -> list[Band]:
    """Curves of all conditions, each in one colour in all figures; the control is grey."""
    bands = []
    for name, colour in zip(CONDITIONS, (*CATEGORIES[:3], NEUTRAL), strict=True):
        at, dash = last.sel(condition=name), "dash" if name == "shuffled" else "solid"
        bands.append(Band(_TITLES[name], at[variable].to_numpy(), recorded_ends(at, variable), colour, dash))
    return bands


def _by_sentences(result: Result) -> go.Figure:
    at = result.data.sel(condition="substituted")
    numbers = at["sentences"].to_numpy().tolist()
    bands = []
    for number, colour in zip(numbers, cycle(CATEGORIES), strict=False):
        part, name = at.sel(sentences=number), counted(number, "sentence")
        bands.append(Band(name, part["overwrite"].to_numpy(), recorded_ends(part, "overwrite"), colour))
    texts = ", ".join(f"{int(number):,}" for number in dict.fromkeys(at["texts"].to_numpy().tolist()))
    subtitle = f"{texts} texts of each number; bands: 95 % intervals over texts"
    return _drawn(result, bands, "Overwrite by number of sentences", subtitle, "overwrite")


def _drawn(result: Result, bands: Sequence[Band], title: str, subtitle: str, unit: str) -> go.Figure:
    """Curves over layers, with the words and the model in the title."""
    data, comma = result.data, "" if title.endswith("?") else ","
    words = f"{label(data.attrs['word'], 20)} for {label(data.attrs['original'], 20)}"
    return layer_bands(
        bands,
        layers=data["layer"].to_numpy().tolist(),
        title=f"{title}{comma} {words}, {model_label(result, 40)}",
        subtitle=subtitle,
        unit=unit,
    )


def _targets(store: Store) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Row of the last token of each text's target, and condition, number of sentences and word of each text."""
    if missing := {"condition", "sentences", "target"} - set(store.tokens.column_names):
        raise RequestError(
            f"the token table has no column {sorted(missing)[0]!r}; record wb.substitution_texts(...) for this probe"
        )
    table = store.tokens.select(["document", "condition", "sentences", "target"]).to_pandas()
    table = table.loc[table["target"].notna()]
    last = table.groupby("document").tail(1)
    if not {"plain", "substituted", "original"} <= set(last["condition"].astype(str)):
        raise RequestError(
            "texts of the conditions plain, substituted and original are needed: wb.substitution_texts(...)"
        )
    names = last["condition"].astype(str).to_numpy(), last["target"].astype(str).to_numpy()
    return last.index.to_numpy().astype(np.int64), names[0], last["sentences"].to_numpy().astype(int), names[1]


def _words(condition: np.ndarray, words: np.ndarray) -> tuple[str, str]:
    """The word that stands for another, and the other."""
    substitutes, originals = (np.unique(words[condition == name]) for name in ("substituted", "original"))
    if len(substitutes) != 1 or len(originals) != 1:
        raise RequestError("the store has several pairs of words; record one pair in a store")
    for word in (substitutes[0], originals[0]):
        if not ((condition == "plain") & (words == word)).any():
            raise RequestError(f"no plain text of {word!r} is in the store; record all of wb.substitution_texts(...)")
    return str(substitutes[0]), str(originals[0])


def _overwrite(
    store: Store, site: str, rows: np.ndarray, background: np.ndarray, word: np.ndarray, original: np.ndarray
) -> Float[np.ndarray, " text"]:
    """Cosine with the mean state of the original less that with the word's own, of every text at one site."""
    centre = store[site][background].double().mean(0)
    states = store[site][rows].double() - centre
    means = torch.stack([states[torch.from_numpy(mask)].mean(0) for mask in (original, word)])
    cosine = torch.nn.functional.cosine_similarity(states[:, None], means[None], dim=-1)
    return (cosine[:, 0] - cosine[:, 1]).numpy()


def _cells(
    name: str, cells: Mapping[tuple[int, int], np.ndarray], values: np.ndarray, counts: int, resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Means of texts in each cell with their intervals, axes (condition, sentences, layer)."""
    shape = (len(CONDITIONS), counts, values.shape[1])
    arrays = {f"{name}{end}": np.full(shape, np.nan) for end in ("", "_low", "_high")}
    for cell, texts in cells.items():
        if not len(texts):
            continue
        mean, resampled = clustered_means(values[texts], np.arange(len(texts)), resamples=resamples, seed=seed)
        arrays[name][cell] = mean
        arrays[f"{name}_low"][cell], arrays[f"{name}_high"][cell] = intervals(resampled)
    return arrays


def _crossing(curve: Float[np.ndarray, " layer"], layers: np.ndarray) -> float:
    """First layer from which the curve stays above 0; NaN if it ends at or below it."""
    below = np.flatnonzero(~(curve > 0))
    first = 0 if not len(below) else int(below[-1]) + 1
    return float(layers[first]) if first < len(layers) else np.nan
