"""Under-trained tokens: vocabulary entries that training hardly touched, found in the weights and verified by prompts.

An untrained row keeps its initial value, or decays to a common one, so one number for each token ranks the vocabulary;
lower means less trained (Land and Bartolo 2024):

    embedding_norm           ‖e_t‖ of the input embedding: the indicator where the tables are untied
    unembedding_cosine       1 − cos(u_t, m), m = mean unembedding of tokens that no text contains: where they are tied
    ..._centred              the same after subtraction of the mean row
    ..._without_first        the same without the component along the first principal direction of the rows
    unembedding_distance     ‖u_t − m‖

Tokens that no text contains are ids beyond the tokenizer, reserved names, and bytes that UTF-8 never has. In a tied
model the norm follows frequency and names as well, so a low norm alone is no sign. Candidates are the lowest 2 % of the
tokens that their own text can reach. A candidate is verified if the model gives it a probability below 0.01 in three
prompts that ask for nothing but this token; the same is asked of random tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor

from workbench.probing import (
    CATEGORIES,
    NEUTRAL,
    Model,
    RequestError,
    Result,
    Store,
    Variable,
    Vocabulary,
    WeightsProbe,
    check_fields,
    counted,
    dataset,
    labelled_histogram,
    labelled_scatter,
    plain_torch,
    read_vocabulary,
    repetition_probabilities,
    wilson,
    with_note,
)

INDICATORS = (
    "embedding_norm",
    "unembedding_cosine",
    "unembedding_cosine_centred",
    "unembedding_cosine_without_first",
    "unembedding_distance",
)
PROMPTS = ("copy", "explain", "repeat")
_CONSTANT = 1e-3  # spread of the norms, relative to their mean, below which rows are normalised
_VERIFIED = 0.01
_SHOWN = 5

VARIABLES = (
    Variable(
        "value", ("indicator", "token"), "1", "indicator of each token, lower for less training; NaN where undefined"
    ),
    Variable("kind", ("token",), "text", "round trip of the token: ok, special, unreachable, undecodable, unused"),
    Variable("never_seen", ("token",), "1 or 0", "1 for a token that no text contains: the reference"),
    Variable("candidate", ("token",), "1 or 0", "1 for the tokens with the lowest values of the chosen indicator"),
    Variable("threshold", (), "1", "largest value of the chosen indicator among the candidates"),
    Variable(
        "auc",
        ("indicator",),
        "probability",
        "that a token no text contains, left out of its own reference, has a lower value than an ok token",
        "0.5",
    ),
    Variable("probability", ("prompt", "token"), "probability", "largest at 3 greedy positions; NaN: not tested"),
    Variable(
        "verified",
        ("group",),
        "share of tested tokens",
        f"share with a probability below {_VERIFIED} in every prompt, of the lowest candidates and of random tokens",
        "that of random tokens",
    ),
    Variable("tested", ("group",), "tokens", "tokens that were tested by the prompts"),
)


@dataclass(frozen=True)
class UnderTrainedTokens(WeightsProbe):
    """Lists tokens that training hardly touched, by their weights, and verifies them by three prompts."""

    name: ClassVar[str] = "under-trained-tokens"
    needs_model: ClassVar[bool] = True
    needs_store: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = ("Land and Bartolo 2024, arXiv 2405.05417",)
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {
        "verified": "of random tokens beside the candidates: a model that does not repeat tokens verifies all of them",
        "auc": "tokens that no text contains against ok tokens, each left out of its own reference",
        "random weights": "a model of the same shape with random weights: an AUC of 0.5",
    }

    indicator: str = "auto"
    """Indicator that chooses the candidates. auto: embedding_norm of untied tables, unembedding_cosine of tied ones."""
    share: float = 0.02
    """Share of the ok tokens that are candidates."""
    tested: int = 50
    """Number of candidates, the lowest first, and of random ok tokens that are verified by prompts. 0: none."""
    seed: int = 0
    """Random seed of the drawn tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "indicator", one_of=("auto", *INDICATORS))
        check_fields(self, "share", above=0, at_most=1)
        check_fields(self, "tested", at_least=0, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)

    @plain_torch()
    def run(self, store: Store | Model, *, model: Model | None = None) -> Result:
        """Ranks the vocabulary of a model, or of the model that a store was recorded from.

        Costs a pass over about 220 positions for each tested token, twice 50 by default, and d_model² operations a
        token.

        Raises:
            RequestError: The model has no tokenizer, or the chosen indicator needs a reference that it lacks.
        """
        vocabulary = read_vocabulary(store, model)
        kinds, unseen = vocabulary.kinds, vocabulary.never_seen
        values = _indicators(vocabulary, unseen)
        ok = (kinds == "ok") & ~unseen
        chosen, notes = self._choose(vocabulary, values, unseen)
        candidates = _lowest(values[chosen], ok | ((kinds == "special") & ~unseen), self.share) if chosen else ()
        candidates = np.asarray(candidates, np.int64)
        loaded, reason = vocabulary.loaded if self.tested else (None, "")
        groups = {"candidate": candidates[: self.tested], "random": self._drawn(ok, candidates)}
        groups = {name: ids if loaded else ids[:0] for name, ids in groups.items()}
        probability = np.full((len(PROMPTS), len(vocabulary)), np.nan)
        tested = np.concatenate(list(groups.values()))
        if loaded and len(tested):
            by_prompt = repetition_probabilities(loaded, tested)
            probability[:, tested] = np.stack([by_prompt[name] for name in PROMPTS])
        else:
            notes.append("no token was verified, so the candidates are a list of suspects")
            notes += [f"verification needs the model: {reason}"] if reason else []
        arrays = {
            "value": np.stack([values[name] for name in INDICATORS]).astype(np.float32),
            "kind": kinds,
            "never_seen": unseen.astype(np.int8),
            "candidate": np.isin(np.arange(len(vocabulary)), candidates).astype(np.int8),
            "threshold": values[chosen][candidates].max() if chosen and len(candidates) else np.nan,
            "auc": np.array([_auc(values[name][unseen], values[name][ok]) for name in INDICATORS]),
            "probability": probability.astype(np.float32),
            "verified": np.array([_share_below(probability[:, ids]) for ids in groups.values()]),
            "tested": np.array([len(ids) for ids in groups.values()]),
        }
        coords = {"indicator": list(INDICATORS), "prompt": list(PROMPTS), "group": list(groups)}
        coords["text"] = ("token", np.array(vocabulary.texts, dtype=object))
        data = dataset(self.variables, arrays, coords)
        data.attrs |= {"indicator": chosen or "none", "tied": int(vocabulary.tied)}
        rows = np.concatenate([candidates, groups["random"]])
        return self.result(store, data, _table(data, rows, candidates), notes)

    def _choose(
        self, vocabulary: Vocabulary, values: Mapping[str, np.ndarray], unseen: Bool[np.ndarray, " token"]
    ) -> tuple[str | None, list[str]]:
        """The indicator, None where none says anything, and notes."""
        norms = values["embedding_norm"][~unseen]
        constant = float(norms.std()) < _CONSTANT * float(norms.mean())
        reference = bool(np.isfinite(values["unembedding_distance"]).any())
        zero = reference and not np.isfinite(values["unembedding_cosine"]).any()
        if self.indicator != "auto":
            if self.indicator == "embedding_norm" or (reference and np.isfinite(values[self.indicator]).any()):
                return self.indicator, []
            raise RequestError(
                f"indicator={self.indicator!r} needs tokens that no text contains, with rows other than 0, and an "
                "unembedding; this model has none; choose embedding_norm"
            )
        if not vocabulary.tied and not constant:
            return "embedding_norm", []
        if reference and not zero:
            return "unembedding_cosine", []
        if constant:
            return None, ["the rows of the embedding have one norm, and no token is known to be unseen: no candidates"]
        unseen_rows = "the rows of tokens that no text contains are 0" if zero else "no token is known to be unseen"
        return "embedding_norm", [
            f"the tables are tied and {unseen_rows}, so the norm chose the candidates; in tied models a low norm marks "
            "frequent tokens and names as well"
        ]

    def _drawn(self, ok: Bool[np.ndarray, " token"], candidates: np.ndarray) -> np.ndarray:
        pool = np.setdiff1d(np.flatnonzero(ok), candidates)
        return np.sort(np.random.default_rng(self.seed).choice(pool, min(self.tested, len(pool)), replace=False))

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the share of verified candidates beside that of random tokens, the lowest tokens, and the AUC."""
        data, indicator = result.data, result.data.attrs["indicator"]
        if indicator == "none":
            return with_note("No indicator ranks the vocabulary of this model.", result)
        table = result.table.loc[result.table["group"] == "candidate"]
        names = ", ".join(repr(text) for text in table["token"].head(_SHOWN))
        tied = "tied" if data.attrs["tied"] else "untied"
        text = f"{len(table):,} candidates by {indicator} ({tied} tables), lowest: {names}"
        number, random_number = (int(count) for count in data["tested"])
        if number:
            share, random = (float(value) for value in data["verified"])
            low, high = (max(0.0, 100 * float(end[0])) for end in wilson(np.array([share]), np.array([number])))
            text += (
                f"; {100 * share:z.0f} % of the {number} lowest are verified (p < {_VERIFIED}, 95 % CI [{low:z.0f}, "
                f"{high:z.0f}]), of {random_number} random tokens {100 * random:z.0f} %"
            )
        auc = float(data["auc"].sel(indicator=indicator))
        known = int(data["never_seen"].sum())
        text += f"; AUC of {counted(known, 'token')} that no text contains: {auc:z.2f}." if known else "."
        return with_note(text, result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "indicator", its distribution by kind of token, and "verification", where tokens were tested."""
        data, name = result.data, result.data.attrs["indicator"]
        name = "embedding_norm" if name == "none" else name
        unit = name.replace("_", " ").replace("cosine", "cosine distance")
        values, kind = data["value"].sel(indicator=name).to_numpy(), data["kind"].to_numpy()
        unseen = data["never_seen"].to_numpy() == 1
        groups = {"ok": (kind == "ok") & ~unseen, "special, unreachable, undecodable": (kind != "ok") & ~unseen}
        groups["no text contains it"] = unseen
        figures = {
            "indicator": labelled_histogram(
                {group: values[mask & np.isfinite(values)] for group, mask in groups.items() if mask.any()},
                mark=float(data["threshold"]),
                mark_name=f"lowest {100 * result.provenance['settings']['share']:g} %",
                title="Indicator of training, by kind of token",
                subtitle=f"{counted(len(values), 'token')}; lower values mean less training",
                unit=unit,
            )
        }
        tested = result.table[result.table["probability"].notna()]
        if len(tested):
            parts = {"random tokens": "random", "lowest candidates": "candidate"}
            tables = {title: tested.loc[tested["group"] == group] for title, group in parts.items()}
            figures["verification"] = labelled_scatter(
                {
                    title: (part[name].to_numpy(), part["probability"].clip(1e-8).to_numpy(), part["token"].tolist())
                    for title, part in tables.items()
                },
                title="Does the model repeat the token?",
                subtitle=f"a token is verified below the line, at {_VERIFIED}",
                names=(unit, "largest probability in three prompts"),
                line=_VERIFIED,
                log=True,
            )
            points: Any
            for points in figures["verification"].data:  # random tokens are the control
                random = str(points.name).startswith("random tokens")
                points.update(marker={"color": NEUTRAL if random else CATEGORIES[0]})
        return figures


def _indicators(vocabulary: Vocabulary, unseen: Bool[np.ndarray, " token"]) -> dict[str, Float[np.ndarray, " token"]]:
    """Values of every indicator; NaN for those that need a reference or an unembedding that is not there."""
    values = {name: np.full(len(vocabulary), np.nan) for name in INDICATORS}
    values["embedding_norm"] = vocabulary.embedding.double().norm(dim=1).numpy()
    rows = vocabulary.unembedding
    if rows is None or not unseen.any():
        return values
    length = min(len(rows), len(vocabulary))
    rows, known = rows[:length].double(), torch.as_tensor(unseen[:length])
    first = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1:]
    spaces = {
        "unembedding_cosine": rows,
        "unembedding_cosine_centred": rows - rows[~known].mean(0),
        "unembedding_cosine_without_first": rows - (rows @ first) @ first.T,
    }
    for name, part in spaces.items():
        values[name][:length] = _against_reference(part, known, _cosine_distance)
    values["unembedding_distance"][:length] = _against_reference(rows, known, lambda a, b: (a - b).norm(dim=1))
    return values


def _against_reference(rows: Tensor, known: Tensor, distance: Any) -> Float[np.ndarray, " token"]:
    """Distance of each row to the mean of the known rows, of which a known row itself is left out; NaN of a single."""
    total, number = rows[known].sum(0), int(known.sum())
    values = distance(rows, (total / number)[None])
    if number == 1:
        values[known] = torch.nan
    else:
        values[known] = distance(rows[known], (total - rows[known]) / (number - 1))
    return values.numpy()


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine; 0 for a row of zeros, NaN to a reference of zeros, which has no direction."""
    size = a.norm(dim=1) * b.norm(dim=1)
    distance = torch.where(size > 0, 1 - (a * b).sum(1) / size.clamp_min(1e-300), torch.zeros_like(size))
    return torch.where(b.norm(dim=1) > 0, distance, torch.nan)


def _lowest(values: np.ndarray, pool: Bool[np.ndarray, " token"], share: float) -> np.ndarray:
    """The share of the pool with the lowest values, the lowest first."""
    ids = np.flatnonzero(pool & np.isfinite(values))
    number = max(1, round(share * len(ids))) if len(ids) else 0
    return ids[np.argsort(values[ids], kind="stable")[:number]]


def _auc(low: np.ndarray, high: np.ndarray) -> float:
    """Probability that a value of `low` is below one of `high`; half for a tie."""
    low, high = low[np.isfinite(low)], high[np.isfinite(high)]
    if not len(low) or not len(high):
        return float("nan")
    ranks = rankdata(np.concatenate([high, low]))[: len(high)].sum() - len(high) * (len(high) + 1) / 2
    return float(ranks / (len(low) * len(high)))


def _share_below(probability: np.ndarray) -> float:
    return float((probability.max(0) < _VERIFIED).mean()) if probability.shape[1] else float("nan")


def _table(data: Any, rows: np.ndarray, candidates: np.ndarray) -> pd.DataFrame:
    """A line for each candidate, the lowest first, and for each random token."""
    probability = data["probability"].to_numpy()[:, rows]
    table = {
        "token_id": rows,
        "token": data["text"].to_numpy()[rows],
        "group": np.where(np.isin(rows, candidates), "candidate", "random").astype(object),
        "kind": data["kind"].to_numpy()[rows],
    }
    table |= {name: data["value"].sel(indicator=name).to_numpy()[rows] for name in INDICATORS}
    table |= {f"probability_{name}": probability[row] for row, name in enumerate(PROMPTS)}
    largest = probability.max(0)  # NaN where the token was not tested
    table |= {"probability": largest, "verified": np.where(np.isnan(largest), None, largest < _VERIFIED)}
    return pd.DataFrame(table)
