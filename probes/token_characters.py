"""Characters in tokens: can probes read from a token's embedding which letters it is spelled with?

A model never sees the letters of a token. For each letter a probe is trained on embeddings of tokens that are letters
alone, to tell if the letter occurs: logistic regression, and the network of Kaushal and Mahowald (2022). As many tokens
with as without it; four fifths of the word stems train, a fifth tests. `f1` is the mean of the F1 of both classes.
Controls: the same on random vectors (0.5), and with the labels of another token of equal length and first letter, which
keeps what these alone tell: selectivity = f1 − f1_matched. Stems stand in place of WordNet's lemmas, which need a
download; words with common endings on both sides share letters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from workbench.probing import (
    NEUTRAL,
    Model,
    RequestError,
    Result,
    Store,
    Variable,
    Vocabulary,
    WeightsProbe,
    category_points,
    check_fields,
    counted,
    dataset,
    fit_classes,
    plain_torch,
    read_vocabulary,
    with_note,
    with_progress,
)

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")

_WORD = re.compile(r" ?([a-zA-Z]{2,})")
_SUFFIXES = ("ingly", "edly", "ments", "ment", "ness", "less", "able", "ings", "ers", "ies", "ied", "est", "ful", "ing")
_SUFFIXES += ("ed", "er", "es", "ly", "s")
_STEM = 3  # letters at least
_TEST = 0.2
_WIDTH, _DROPOUT, _BATCH, _RATE = 256, 0.1, 64, 1e-3
_LEAST = 8  # positives on either side
_TOKENS = 100
_PROBES = ("linear", "MLP")
_PAIR = ("probe", "letter")

VARIABLES = (
    Variable("f1", _PAIR, "macro F1", "of the probe that tells tokens with the letter, on stems not trained on", "0.5"),
    Variable("f1_control", _PAIR, "macro F1", "the same with random vectors in place of embeddings", "0.5"),
    Variable("f1_matched", _PAIR, "macro F1", "with the labels of another token of equal length and first letter"),
    Variable("selectivity", _PAIR, "macro F1", "f1 less f1_matched", "0"),
    Variable("tested", ("letter",), "tokens", "tokens on which f1 is measured, half of them with the letter"),
    Variable("first_letter", ("vectors",), "share of test tokens", "accuracy of a linear probe of the first letter"),
    Variable("first_letter_majority", (), "share of test tokens", "accuracy of the most frequent first letter"),
    Variable("length_r2", ("vectors",), "1", "R² of a linear map to the number of letters, on test stems", "0"),
    Variable("tokens", (), "tokens", "tokens of two letters or more and nothing else"),
)


@dataclass(frozen=True)
class TokenCharacters(WeightsProbe):
    """Reads the letters, the first letter and the length of tokens from their embeddings, beside three controls."""

    name: ClassVar[str] = "token-characters"
    needs_model: ClassVar[bool] = True
    needs_store: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = ("Kaushal and Mahowald 2022, arXiv 2206.02608",)
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {
        "f1_control": "random vectors in place of embeddings: 0.5",
        "f1_matched": "labels of another token of equal length and first letter: what those two tell of a letter",
        "first_letter_majority": "accuracy of the most frequent first letter",
    }

    case_sensitive: bool = False
    """Letters are told apart by case, in labels and in balancing alike; then only lower-case occurrences count."""
    row_limit: int = 2000
    """Maximum number of tokens of each letter's probe, a fifth of them for the test."""
    epochs: int = 8
    """Epochs of the MLP."""
    penalty: float = 0.01
    """Penalty of the linear probes: mean loss plus penalty / 2 · ‖coefficients‖², on standardised embeddings."""
    seed: int = 0
    """Random seed of the split, of the drawn tokens, the random vectors and the MLP."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "row_limit", at_least=100, whole=True)
        check_fields(self, "epochs", at_least=1, at_most=10_000, whole=True)
        check_fields(self, "penalty", above=0)
        check_fields(self, "seed", at_least=0, whole=True)

    @plain_torch()
    def run(self, store: Store | Model, *, model: Model | None = None) -> Result:
        """Trains the probes of a model, or of the model that a store was recorded from.

        Costs 26 letters x 3 label sets x epochs x row_limit x 1,500 d_embed multiplications for the MLP.

        Raises:
            RequestError: Fewer than 100 tokens consist of two letters or more, or the model has no tokenizer.
        """
        vocabulary = read_vocabulary(store, model)
        _ = vocabulary.tokenizer  # refuses a model without one
        items = letter_tokens(vocabulary, self.case_sensitive, self.seed)
        if len(items.words) < _TOKENS:
            raise RequestError(
                f"{counted(len(items.words), 'token')} of this vocabulary consist of two letters or more; "
                "token-characters needs "
                f"{_TOKENS}, so neither a vocabulary of characters nor one of few words can be read"
            )
        x = vocabulary.embedding.numpy()[items.ids]
        noise = np.random.default_rng(self.seed).normal(0, 0.1, x.shape).astype(np.float32)  # variance 0.01
        vectors = {name: standardised(rows, ~items.test) for name, rows in (("embedding", x), ("random", noise))}
        arrays = self._letters(items, vectors)
        few = [letter for letter, number in zip(LETTERS, arrays["tested"], strict=True) if not number]
        notes = ["tokens are divided by stem, not by WordNet's lemmas"]
        notes += [f"fewer than {_LEAST} tokens on a side with or without {', '.join(few)}"] if few else []
        order, training = self._sample(items)
        arrays |= {
            "first_letter": np.array(
                [first_letter_accuracy(v[order], items.first[order], training, self.penalty) for v in vectors.values()]
            ),
            "first_letter_majority": float(
                (items.first[order][training:] == np.bincount(items.first[order][:training]).argmax()).mean()
            ),
            "length_r2": np.array(
                [
                    ridge_r2(v[order], items.lengths[order].astype(float), training, self.penalty)
                    for v in vectors.values()
                ]
            ),
            "tokens": len(items.words),
        }
        data = dataset(
            self.variables, arrays, {"probe": list(_PROBES), "letter": list(LETTERS), "vectors": list(vectors)}
        )
        table = data[[name for name in arrays if data[name].dims == _PAIR]].to_dataframe().reset_index()
        return self.result(store, data, pd.DataFrame(table), notes)

    def _letters(self, items: LetterTokens, vectors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The three kinds of F1 of every letter and probe."""
        names = ("f1", "f1_control", "f1_matched")
        values = {name: np.full((len(_PROBES), len(LETTERS)), np.nan) for name in names}
        tested, partner = np.zeros(len(LETTERS), int), items.partners(self.seed)
        for place, letter in with_progress(list(enumerate(LETTERS)), "letters", "letters"):
            label = items.has(letter)
            for name, source, chosen in (
                ("f1", "embedding", label),
                ("f1_control", "random", label),
                ("f1_matched", "embedding", label[partner]),
            ):
                side = np.where(partner < 0, 0, 1) if name == "f1_matched" else np.ones(len(label), int)
                present = np.flatnonzero(side)
                drawn = balanced(chosen[present], items.test[present], self.row_limit, _LEAST, self.seed + place)
                if drawn is None:
                    continue
                order, training = present[drawn[0]], drawn[1]
                x, y = vectors[source][order], chosen[order]
                values[name][0, place] = linear_f1(x, y, training, self.penalty)
                values[name][1, place] = mlp_f1(x, y, training, self.epochs, self.seed)
                if name == "f1":
                    tested[place] = len(order) - training
        return {**values, "selectivity": values["f1"] - values["f1_matched"], "tested": tested}

    def _sample(self, items: LetterTokens) -> tuple[np.ndarray, int]:
        """Items for the first letter and the length, training items first, and their number."""
        draw = np.random.default_rng(self.seed)
        parts = [draw.permutation(np.flatnonzero(side)) for side in (~items.test, items.test)]
        limits = 4 * self.row_limit, self.row_limit
        samples = [part[:limit] for part, limit in zip(parts, limits, strict=True)]
        return np.concatenate(samples), len(samples[0])

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the mean F1 over letters of both probes beside the controls, and the first letter and length."""
        data = result.data
        means = {name: data[name].mean("letter").to_numpy() for name in ("f1", "f1_control", "f1_matched")}
        letters = int(data["f1"].isel(probe=0).notnull().sum())
        first, length = data["first_letter"].to_numpy(), data["length_r2"].to_numpy()
        parts = [
            f"{probe} {means['f1'][place]:z.2f} (random vectors {means['f1_control'][place]:z.2f}, labels of matched "
            f"tokens {means['f1_matched'][place]:z.2f})"
            for place, probe in enumerate(_PROBES)
        ]
        finding = f"Mean macro F1 of {letters} letters from the embeddings of {counted(data['tokens'], 'token')}: "
        if not letters:
            finding, parts = (
                "No letter is measured: ",
                [f"of {counted(data['tokens'], 'token')} too few have it or lack it"],
            )
        text = (
            f"{finding}{'; '.join(parts)}. First letter: {100 * first[0]:z.0f} % "
            f"(random vectors {100 * first[1]:z.0f} %, most frequent letter "
            f"{100 * float(data['first_letter_majority']):z.0f} %); length: R² {length[0]:z.2f} (random "
            f"{length[1]:z.2f})."
        )
        return with_note(text, result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "letters", the F1 of every letter with its controls, and "selectivity"."""
        data = result.data
        letters = data["letter"].to_numpy().tolist()
        curves = {f"{probe}": data["f1"].sel(probe=probe).to_numpy() for probe in _PROBES}
        matched, random = "linear, labels of matched tokens", "linear, random vectors"
        curves[matched] = data["f1_matched"].sel(probe="linear").to_numpy()
        curves[random] = data["f1_control"].sel(probe="linear").to_numpy()
        about = f"embeddings of {counted(data['tokens'], 'token')}, test on other stems"
        selective = {probe: data["selectivity"].sel(probe=probe).to_numpy() for probe in _PROBES}
        read = category_points(
            curves, letters, title="Letters read from token embeddings", subtitle=about, unit="macro F1", line=0.5
        )
        for name, symbol in ((matched, "circle-open"), (random, "x")):  # controls
            read.update_traces(marker={"color": NEUTRAL, "symbol": symbol}, selector={"name": name})
        return {
            "letters": read,
            "selectivity": category_points(
                selective,
                letters,
                title="Selectivity: F1 less that of matched labels",
                subtitle=f"{about}; matched: another token of equal length and first letter",
                unit="difference of macro F1",
                line=0.0,
            ),
        }


def stem(word: str) -> str:
    """Returns a word in lower case without one English ending, a doubled last consonant and a final e or y.

    It is cruder than WordNet's lemmas, which need a download: "went" is not "go", and "reader" and "red" both end as
    "read" and "red".
    """
    word = word.lower()
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= _STEM and not (suffix == "s" and word.endswith("ss")):
            word = word.removesuffix(suffix)
            if len(word) > _STEM and word[-1] == word[-2] and word[-1] not in "aeiouls":
                word = word[:-1]
            break
    return word[:-1] if len(word) > _STEM and word[-1] in "eyi" else word


@dataclass(frozen=True, eq=False)
class LetterTokens:
    """Tokens of two letters or more and nothing else, a leading space aside, divided by stem."""

    ids: Int[np.ndarray, " item"]
    words: tuple[str, ...]
    """Texts without the space; in lower case unless letters are told apart by case."""
    test: Bool[np.ndarray, " item"]
    """True for the items of a fifth of the stems: all forms of a word are on one side."""

    @cached_property
    def lengths(self) -> Int[np.ndarray, " item"]:
        """Number of letters."""
        return np.array([len(word) for word in self.words])

    @cached_property
    def first(self) -> Int[np.ndarray, " item"]:
        """Index of the first letter in `LETTERS`, whatever its case."""
        return np.array([LETTERS.index(word[0].lower()) for word in self.words])

    def has(self, letter: str) -> Bool[np.ndarray, " item"]:
        """Returns which items contain a letter."""
        return np.array([letter in word for word in self.words])

    def partners(self, seed: int) -> Int[np.ndarray, " item"]:
        """Returns for each item another one of equal length and first letter on its side; -1 where there is none."""
        draw, partner = np.random.default_rng(seed), np.full(len(self.words), -1)
        groups = (self.lengths * len(LETTERS) + self.first) * 2 + self.test
        for group in np.unique(groups):
            members = draw.permutation(np.flatnonzero(groups == group))
            if len(members) > 1:
                partner[members] = np.roll(members, 1)
        return partner


def letter_tokens(vocabulary: Vocabulary, case_sensitive: bool, seed: int) -> LetterTokens:
    """Returns the tokens of letters, with a fifth of their stems for the test."""
    ids, words = [], []
    for id in np.flatnonzero(vocabulary.ordinary):
        if match := _WORD.fullmatch(vocabulary.texts[id]):
            ids.append(int(id))
            words.append(match[1] if case_sensitive else match[1].lower())
    stems = np.array([stem(word) for word in words], dtype=object)
    unique, index = np.unique(stems, return_inverse=True) if words else (stems, np.zeros(0, int))
    is_test = np.random.default_rng(seed).random(len(unique)) < _TEST
    return LetterTokens(np.array(ids, np.int64), tuple(words), is_test[index])


def balanced(
    label: Bool[np.ndarray, " item"], test: Bool[np.ndarray, " item"], limit: int, least: int, seed: int
) -> tuple[Int[np.ndarray, " chosen"], int] | None:
    """Returns items with as many positives as negatives, training items first, and the number of training items.

    At most `limit` items, a fifth of them for the test. None where a side has fewer than `least` of either kind.
    """
    draw, parts = np.random.default_rng(seed), []
    for side, most in ((~test, round(limit * (1 - _TEST))), (test, round(limit * _TEST))):
        kinds = [draw.permutation(np.flatnonzero(side & (label == kind))) for kind in (True, False)]
        number = min(len(kinds[0]), len(kinds[1]), most // 2)
        if number < least:
            return None
        parts.append(np.concatenate([kind[:number] for kind in kinds]))
    return np.concatenate(parts), len(parts[0])


def macro_f1(predicted: Bool[np.ndarray, " item"], label: Bool[np.ndarray, " item"]) -> float:
    """Returns the mean of the F1 of both classes."""
    scores = []
    for kind in (True, False):
        hits = int(((predicted == kind) & (label == kind)).sum())
        scores.append(2 * hits / max(1, int((predicted == kind).sum()) + int((label == kind).sum())))
    return float(np.mean(scores))


def linear_f1(x: Float[np.ndarray, "item d"], label: Bool[np.ndarray, " item"], training: int, penalty: float) -> float:
    """Returns the macro F1, on the items after `training`, of a logistic regression on the first ones."""
    fit = fit_classes(x[:training], label[:training].astype(int), 2, penalty, tolerance=1e-3)
    scores = fit.log_probabilities(x[training:])
    return macro_f1(scores[:, 1] > scores[:, 0], label[training:])


def mlp_f1(
    x: Float[np.ndarray, "item d"], label: Bool[np.ndarray, " item"], training: int, epochs: int, seed: int
) -> float:
    """Returns the same of the network of Kaushal and Mahowald, of width 256: linear, SELU, linear, tanh, linear."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(x.shape[1], _WIDTH),
            nn.SELU(),
            nn.Linear(_WIDTH, _WIDTH),
            nn.Tanh(),
            nn.Dropout(_DROPOUT),
            nn.Linear(_WIDTH, 1),
        )
        adam = torch.optim.Adam(net.parameters(), lr=_RATE)
        items, target = torch.as_tensor(x), torch.as_tensor(label, dtype=torch.float32)
        with torch.enable_grad():
            for _ in range(epochs):
                for batch in torch.randperm(training).split(_BATCH):
                    loss = nn.functional.binary_cross_entropy_with_logits(net(items[batch])[:, 0], target[batch])
                    adam.zero_grad()
                    loss.backward()
                    adam.step()
        net.eval()
        with torch.no_grad():
            predicted = net(items[training:])[:, 0].numpy() > 0
    return macro_f1(predicted, label[training:])


def first_letter_accuracy(
    x: Float[np.ndarray, "item d"], codes: Int[np.ndarray, " item"], training: int, penalty: float
) -> float:
    """Returns the accuracy, on the items after `training`, of a multinomial logistic regression on the first ones."""
    fit = fit_classes(x[:training], codes[:training], len(LETTERS), penalty, tolerance=1e-3)
    return float((fit.log_probabilities(x[training:]).argmax(1) == codes[training:]).mean())


def ridge_r2(x: Float[np.ndarray, "item d"], y: Float[np.ndarray, " item"], training: int, penalty: float) -> float:
    """Returns R² on the items after `training` of a ridge regression on the first ones; below 0: the mean is better."""
    a, b = x[:training].astype(np.float64), y[:training]
    mean, centre = b.mean(), a.mean(0)
    a = a - centre
    weights = np.linalg.solve(a.T @ a / training + penalty * np.eye(a.shape[1]), a.T @ (b - mean) / training)
    rest = y[training:] - (mean + (x[training:] - centre) @ weights)
    return float(1 - np.square(rest).sum() / np.square(y[training:] - mean).sum())


def standardised(x: Float[np.ndarray, "item d"], training: Sequence[int] | np.ndarray) -> Float[np.ndarray, "item d"]:
    """Returns columns of mean 0 and standard deviation 1 on the training items."""
    mean, spread = x[training].mean(0, dtype=np.float64), x[training].std(0, dtype=np.float64)
    return ((x - mean) / np.where(spread > 0, spread, 1)).astype(np.float32)
