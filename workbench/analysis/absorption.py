"""Absorption by first letter: tokens of a letter on which the letter's own features are silent and others stand in."""

from __future__ import annotations

import string
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from workbench.analysis.logistic import fit_logistic
from workbench.features.feature_store import Features
from workbench.features.promoted import check_sae
from workbench.features.queries import text_rows
from workbench.io.checks import SEEDS, check, whole_number
from workbench.io.errors import RequestError
from workbench.io.torch_state import plain_torch
from workbench.results.bootstrap import clustered_interval
from workbench.sae.autoencoder import Sae
from workbench.sae.decoder import decoder_directions, row_scale

F1_GAIN = 0.03
"""Gain in F1 by which a further feature counts as a split of the letter's feature."""

FULL_COSINE, PARTIAL_COSINE, SHARE, ABSORBERS = 0.025, 0.1, 0.4, 3
"""Smallest cosine of an absorbing feature with the probe, for full absorption and for the fraction; smallest share of
the probe's projection that absorbing features make up; largest number of them in the fraction."""

_SILENT = 1e-8


@plain_torch()
def feature_absorption(
    features: Features, sae: Sae, *, k: int = 10, held_out: float | int = 0.2, least: int = 10, seed: int = 0
) -> pd.DataFrame:
    """Returns how much of the first letter of tokens is absorbed by features of other things, by letter.

    The definition is that of SAEBench, after Chanin et al., arXiv 2409.14507. A linear probe for the letter is trained
    on the activations. The letter's own features are the first k of k-sparse probes, while each adds more than 0.03
    to F1. On each test token that has the letter and for which the probe says so, with projections on the probe's unit
    vector w: absorption is full if none of the own features is active, and the feature with the largest projection has
    a cosine with w of at least 0.025 and makes up at least 0.4 of the activation's projection. The fraction counts up
    to three other features with cosine at least 0.1 that together make up at least 0.4: what they add of the part that
    the own features leave out, over that plus the own features' projection; 1 if the own ones project to 0 or less.

    Differences from SAEBench: one random occurrence of every distinct token of letters in the store's texts stands for
    it, in place of each vocabulary entry in a spelling prompt, so the numbers of the two are not comparable; own
    features are ranked by difference of means, not by an L1 probe; probes are balanced logistic regressions; a
    projection uses the decoder's own length, which SAEBench takes as 1, and none counts where the activation's own is
    negative.

    Cost: reads one row per distinct token, into memory, and fits a probe per letter.

    Args:
        features: The features; their site must be in the store.
        sae: The SAE that made them.
        k: Largest number of own features.
        held_out: Share of the distinct tokens to test on.
        least: Smallest number of distinct training tokens of a letter.
        seed: Random seed of occurrences, split and resamples.

    Returns:
        One line per letter: letter; tokens, distinct test tokens with it; probe_f1, of the linear probe on test tokens;
        sparse_f1, of the own features; features, these; splits, their number - 1; true_positives, test tokens that the
        probe detects; full and fraction, means over these, 0 to 1, with the ends of their 95 % CI over tokens in
        full_low, full_high, ...; absorber, the feature that fully absorbs most often, missing without one. Null: 0. A
        letter whose probe_f1 is low is not represented, and its absorption means nothing.

    Raises:
        RequestError: Another SAE, one that reads one site and writes another, a site that was not recorded, or no
            letter with enough distinct tokens.
    """
    k = whole_number("k", k, at_least=1, at_most=features.shape[1])
    check("held_out", held_out, above=0, below=1)
    least = whole_number("least", least, at_least=1)
    seed = whole_number("seed", seed, at_least=0, below=SEEDS)
    check_sae(features, sae)
    if not sae.reconstructs or sae.sequential:
        raise RequestError(f"SAE {sae.name!r} does not reconstruct the rows that it reads one by one")
    draw = np.random.default_rng(seed)
    rows, letters = _one_row_per_token(features, draw)
    test = np.zeros(len(rows), bool)
    test[draw.permutation(len(rows))[: round(held_out * len(rows))]] = True
    data = _Data(features, sae, rows, test)
    lines = []
    for letter in string.ascii_lowercase:
        has = letters == letter
        if has[~test].sum() >= least and has[test].any() and not has.all():
            lines.append({"letter": letter} | data.letter(has, k, seed))
    if not lines:
        raise RequestError(f"least is {least}: no first letter has as many distinct training tokens; record more texts")
    return pd.DataFrame(lines).astype({"absorber": "Int64"})


def _one_row_per_token(features: Features, draw: np.random.Generator) -> tuple[Int64[np.ndarray, " token"], np.ndarray]:
    """One random row for each distinct token that is made of letters, and its first letter in lower case."""
    texts, rows = features.texts, draw.permutation(np.flatnonzero(text_rows(features.store)))
    words = [word.strip() for word in texts.words]
    usable = np.array([bool(word) and word.isascii() and word.isalpha() for word in words])
    rows = rows[usable[texts.codes[rows]]]
    codes, first = np.unique(texts.codes[rows], return_index=True)
    return rows[first], np.array([words[code][0].lower() for code in codes])


class _Data:
    """Activations of the site and of the features on one row for each token."""

    def __init__(
        self, features: Features, sae: Sae, rows: Int64[np.ndarray, " token"], test: Bool[np.ndarray, " token"]
    ) -> None:
        features.store.require(features.record.site)
        values = features.store[features.record.site][rows]
        self.test, self.tokens = test, np.arange(len(rows))
        self.x = sae.input_rows(values).cpu().numpy().astype(np.float64)
        self.active = features[rows]
        scale = row_scale(sae, values)
        self.scale = scale.cpu().numpy().ravel() if isinstance(scale, Tensor) else np.ones(len(rows))
        self.used = np.unique(self.active.indices)
        self.directions = decoder_directions(sae, self.used.tolist()).cpu().numpy().astype(np.float64)
        self.norms = np.linalg.norm(self.directions, axis=1)

    def letter(self, has: Bool[np.ndarray, " token"], k: int, seed: int) -> dict[str, Any]:
        """The line of one letter."""
        train = ~self.test
        weight, bias = fit_logistic(self.x[train], has[train])
        says = self.x @ weight + bias > 0
        features, sparse_f1 = self._letter_features(has, k)
        true_positives = np.flatnonzero(self.test & has & says)
        unit = weight / max(np.linalg.norm(weight), 1e-30)
        outcomes = [self._absorbed(int(token), unit, features) for token in true_positives]
        line = {
            "tokens": int((has & self.test).sum()),
            "probe_f1": _f1(says[self.test], has[self.test]),
            "sparse_f1": sparse_f1,
            "features": tuple(map(int, features)),
            "splits": len(features) - 1,
            "true_positives": len(true_positives),
        }
        for index, name in enumerate(("full", "fraction")):
            values = np.array([float(outcome[index]) for outcome in outcomes])
            ends = clustered_interval(values, true_positives, seed=seed) if len(true_positives) else [np.nan] * 3
            line |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
        absorbers = Counter(outcome[2] for outcome in outcomes if outcome[0]).most_common(1)
        return line | {"absorber": absorbers[0][0] if absorbers else None}

    def _letter_features(self, has: Bool[np.ndarray, " token"], k: int) -> tuple[Int64[np.ndarray, " feature"], float]:
        """The letter's own features, and the F1 of the probe on them."""
        train, features, best = ~self.test, np.empty(0, np.int64), -np.inf
        gap = self.active[train & has].mean(0) - self.active[train & ~has].mean(0)
        order = np.argsort(-np.asarray(gap).ravel(), kind="stable")
        columns = self.active.tocsc()
        for size in range(1, k + 1):
            x = columns[:, order[:size]].tocsr()
            weight, bias = fit_logistic(x[train], has[train])
            f1 = _f1(np.asarray(x @ weight + bias > 0)[self.test], has[self.test])
            if f1 <= best + F1_GAIN:
                break
            features, best = order[:size], f1
        return features, float(best)

    def _absorbed(
        self, token: int, unit: Float[np.ndarray, " d_model"], features: Int64[np.ndarray, " feature"]
    ) -> tuple[bool, float, int]:
        """Full absorption, absorption fraction, and the feature with the largest projection on the probe."""
        entries = slice(*self.active.indptr[token : token + 2])
        feature, activation = self.active.indices[entries], self.active.data[entries].astype(np.float64)
        place = np.searchsorted(self.used, feature)
        toward = self.directions[place] @ unit
        cosine = toward / np.maximum(self.norms[place], 1e-30)
        projection = activation * self.scale[token] * toward
        total = float(self.x[token] @ unit)
        of_letter = np.isin(feature, features)
        letter_part = float(projection[of_letter].sum())
        absorbers = ~of_letter & (cosine >= PARTIAL_COSINE) & (projection > 0)
        absorber_part = np.sort(projection[absorbers])[::-1][:ABSORBERS].sum()
        if total <= 0 or letter_part >= total or absorber_part / total < SHARE:
            fraction = 0.0
        elif letter_part <= 0:
            fraction = 1.0
        else:
            absorbed = min(float(absorber_part), total - letter_part)
            fraction = absorbed / (absorbed + letter_part)
        if not len(feature):
            return False, fraction, -1
        top = int(projection.argmax())
        silent = not (np.abs(activation[of_letter]) >= _SILENT).any()
        full = silent and cosine[top] >= FULL_COSINE and total > 0 and projection[top] / total >= SHARE
        return bool(full), fraction, int(feature[top])


def _f1(says: Bool[np.ndarray, " token"], truth: Bool[np.ndarray, " token"]) -> float:
    return 2 * int((says & truth).sum()) / max(1, int(says.sum() + truth.sum()))
