"""Prediction of the model's later output: inputs and baselines that the probes of Pal et al. (arXiv 2311.04897) share.

T is the token whose state is used, N = 0 the ordinary next token; the target at horizon N is the model's own top token
at T+N, its prediction of token t+N+1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int

from workbench.analysis.future import Bigram, FutureRows, bigrams, future_rows, model_tokens
from workbench.analysis.lens import log_probabilities
from workbench.analysis.rows import blocks, next_tokens
from workbench.analysis.store_probe import StoreProbe
from workbench.io.checks import check_fields
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.model.unembed import Unembed
from workbench.results.bootstrap import clustered_means, intervals
from workbench.store.lost_values import FiniteRows
from workbench.store.reader import ActivationArray, Store

_FEW_DOCUMENTS = 10  # fewer make an interval over documents unreliable


@dataclass(frozen=True)
class FutureSplit:
    """Tokens and documents of a future probe: which are read, and how many are tested and validated on."""

    horizons: int
    where: str | None
    held_out: float
    validation: float
    seed: int

    def __post_init__(self) -> None:
        check_fields(self, "horizons", at_least=1, at_most=1000)
        check_fields(self, "held_out", "validation", above=0, below=1)
        check_fields(self, "seed", at_least=0)
        if not self.held_out + self.validation < 1:
            raise RequestError(
                f"held_out {self.held_out} and validation {self.validation} leave no document to train on; "
                "their sum must be less than 1"
            )


@dataclass(frozen=True)
class FutureTask:
    """Inputs of a future probe, the same for all layers and methods."""

    final: ActivationArray
    """resid_post of the last block."""
    unembed: Unembed
    rows: FutureRows
    model_top: Int[np.ndarray, " row"]
    """The model's own top token at each row; -1 where it is not needed."""
    text_next: Int[np.ndarray, " row"]
    """The text's next token after each row; -1 at the end of a document or sequence."""
    token: Int[np.ndarray, " row"]
    checked: FiniteRows
    """The rows that are read, after the gate."""

    def surprisal(
        self, predictions: Int[np.ndarray, "map row"], rows: Int[np.ndarray, " row"], horizon: int
    ) -> Float[np.ndarray, " map"]:
        """Returns the mean -ln p of predicted tokens under the model at T+N."""
        total = np.zeros(len(predictions))
        for block in blocks(len(rows), self.unembed.vocab):
            log = log_probabilities(self.unembed, self.final[rows[block] + horizon])
            predicted = torch.from_numpy(predictions[:, block].T.astype(np.int64)).to(log.device)
            total -= log.gather(1, predicted).cpu().double().sum(0).numpy()
        return total / len(rows)

    def bigram(self, rows: Int[np.ndarray, " row"], horizon: int, known: int = 0) -> Bigram:
        """Returns the bigram baseline: the training rows' most frequent target at T+N after the token at T+known."""
        training = self.rows.at("training", horizon)
        return bigrams(self.token[training + known], self.model_top[training + horizon], self.token[rows + known])

    def gain(
        self,
        hits: Bool[np.ndarray, "map row"],
        baseline: Bool[np.ndarray, "... row"],
        rows: Int[np.ndarray, " row"],
        seed: int,
        counted: Bool[np.ndarray, " row"] | None = None,
    ) -> dict[str, Float[np.ndarray, " map"]]:
        """Returns the accuracy above a baseline and its 95 % interval over documents, NaN for a single document.

        Only the rows of `counted` count; None: all.
        """
        document, difference = self.rows.document[rows], hits.astype(float) - baseline
        values = difference if counted is None else np.where(counted, difference, np.nan)
        gain, resampled = clustered_means(values.T, document, seed=seed)
        low, high = intervals(resampled, len(np.unique(document if counted is None else document[counted])))
        return {"gain": gain, "gain_low": low, "gain_high": high}

    def counts(self, horizons: int) -> dict[str, Int[np.ndarray, ...]]:
        """Returns numbers of tokens by horizon, and of test documents."""
        parts = {
            part: [self.rows.at(part, horizon) for horizon in range(horizons)]
            for part in ("training", "validation", "test")
        }
        training, validation, tested = (np.array([len(rows) for rows in part]) for part in parts.values())
        return {
            "training_rows": training,
            "validation_rows": validation,
            "rows": tested,
            "text_rows": np.array([(self.text_next[rows + n] >= 0).sum() for n, rows in enumerate(parts["test"])]),
            "left_out": len(self.rows.test) - tested,
            "documents": np.array(len(np.unique(self.rows.document[self.rows.test]))),
        }


def load_future_task(
    store: Store, split: FutureSplit, unembed: Unembed, top_k: int, *, probe: StoreProbe, sites: Sequence[str]
) -> FutureTask:
    """Returns the inputs of a future probe from a store.

    Args:
        store: The recorded activations.
        split: Tokens and documents.
        unembed: The unembedding.
        top_k: Number of predictions that count as first.
        probe: The probe, whose gate the rows pass.
        sites: Sites that the probe reads; the last resid_post is read in any case.

    Raises:
        RequestError: `top_k` is larger than the vocabulary, a site is missing, values are NaN or infinite, the model is
            not causal, fewer than three documents are selected, or none is long enough.
    """
    last = f"resid_post.{store.manifest.model.n_layers - 1}"
    final = store[last]
    if top_k > unembed.vocab:
        raise RequestError(f"top_k is {top_k} and the vocabulary has {unembed.vocab}; give at most that")
    shares = {"held_out": split.held_out, "validation": split.validation, "seed": split.seed}
    check = partial(probe.finite_rows, store, [*sites, last])
    rows, checked = future_rows(store, split.horizons, split.where, **shares, check=check)
    token = store.tokens["token_id"].to_numpy().astype(np.int64)
    return FutureTask(final, unembed, rows, model_tokens(final, unembed, rows), next_tokens(store), token, checked)


def choose_layer(
    validation: Float[np.ndarray, "choice layer horizon"], own_output: int | None
) -> tuple[Int[np.ndarray, " horizon"], Int[np.ndarray, " horizon"]]:
    """Returns the choice (method, prompt) and the index of the layer with the best validation accuracy at each horizon.

    Args:
        validation: Accuracy on the validation rows.
        own_output: Index of the layer whose state is the model's own output at N = 0 by definition: it is not chosen
            there unless it is the only one. None: no layer's is.
    """
    validation = validation.copy()
    if own_output is not None:
        validation[:, own_output, 0] = -1.0
    choice, layer = np.unravel_index(validation.reshape(-1, validation.shape[2]).argmax(0), validation.shape[:2])
    return choice, layer


def own_output(store: Store, site: str, layers: Sequence[int]) -> int | None:
    """Returns the index of the layer whose state at `site` is the model's own output at N = 0; None where none is."""
    last = store.manifest.model.n_layers - 1
    return layers.index(last) if site == "resid_post" and last in layers else None


def note_own_output(output: int | None, layers: Sequence[int]) -> str:
    """Returns a note where the only layer's state is the model's own output at t+1, else ""."""
    single = output is not None and len(layers) == 1
    return "the only layer is the model's own output: at t+1 nothing is read" if single else ""


def note_few_documents(documents: int) -> str:
    """Returns a note where an interval is over fewer than 10 test documents, else ""."""
    few = f"intervals over {counted(documents, 'test document')}, fewer than {_FEW_DOCUMENTS}"
    return few if documents < _FEW_DOCUMENTS else ""


def precision_table(data: xr.Dataset, names: Sequence[str], axes: Sequence[str], **more: xr.DataArray) -> pd.DataFrame:
    """Returns a tidy table over `axes` of some variables, of `more`, and of precision at 1 and at the largest k."""
    columns = {f"precision_{k}": data["precision"].sel(k=k, drop=True) for k in sorted({1, data.sizes["k"]})}
    return data[list(names)].assign(columns | more).to_dataframe(dim_order=list(axes)).reset_index()
