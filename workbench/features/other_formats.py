"""Features in other tools' formats: delphi's latent cache and SAEDashboard's batches, which Neuronpedia takes in.

Written as those tools write them, so that their own readers open them; each function says what it read that from.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int, Int64
from safetensors.numpy import save_file

from workbench.features.feature_store import Features
from workbench.features.promoted import check_sae, check_writes_residual
from workbench.features.queries import Context, feature_contexts, feature_histogram
from workbench.io import files
from workbench.io.errors import RequestError
from workbench.io.progress import progress
from workbench.model.unembed import load_unembed
from workbench.sae.decoder import decoder_logits, extreme_tokens
from workbench.sae.load import Sae

DELPHI_CONFIG: Mapping[str, Any] = {
    "dataset_repo": "",
    "dataset_split": "",
    "dataset_name": "",
    "dataset_column": "",
    "batch_size": 32,
}
"""Settings of delphi's cache that a store has no answer to: its tokens are in the files, no dataset is read."""

_FLOAT16 = float(np.finfo(np.float16).max)


def export_delphi(
    features: Features, out: str | os.PathLike[str], *, splits: int = 5, show_progress: bool = True
) -> Path:
    """Writes the features as delphi's cached latents under `out`/SITE, and gives that folder.

    A file FIRST_LAST.safetensors for each of `splits` ranges of features: `locations` [entry, (sequence, position,
    feature - FIRST)] in uint16, or uint32 where that is too narrow, in order of rows; `activations` [entry] in float16;
    `tokens` [sequence, position], the same in each. Beside them config.json.

    delphi knows sequences of one length only: shorter ones are filled up with the token that a sequence begins with
    here, or token 0, on which nothing is active. Values beyond float16 become its largest. Entries that are 0 in it are
    left out, as delphi leaves out those below 1e-5.

    Layout: `save_splits` and `save_config` of delphi/latents/cache.py and the reader in delphi/latents/loader.py, 2025.
    Memory: the tokens, and one split at a time. Raises RequestError for a folder that holds something, or a number of
    splits that there cannot be.
    """
    count = features.shape[1]
    if not 1 <= splits <= count:
        raise RequestError(f"splits must be from 1 to the {count} features, not {splits}")
    folder = Path(out) / features.record.site
    _check_empty(folder)
    store = features.store
    sequence, position, tokens = _rectangle(features)
    bounds = np.linspace(0, count, splits + 1).astype(np.int64)
    with (
        files.explain_full_disk(f"{folder}", "remove it, free space and run again"),
        progress("writing delphi's cache", count, "features", shown=show_progress) as advance,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        for first, after in itertools.pairwise(bounds.tolist()):
            entries = slice(*map(int, features.by_feature["indptr"][[first, after]]))
            row = np.asarray(features.by_feature["row"][entries])
            value = features.by_feature["value"][entries].clip(-_FLOAT16, _FLOAT16).astype(np.float16)
            latent = np.repeat(np.arange(after - first), features.counts[first:after])
            order = np.lexsort((latent, row))
            order = order[value[order] != 0]
            place = np.stack([sequence[row], position[row], latent], axis=1)[order]
            narrow = place.max(initial=0) < 1 << 16
            arrays = {
                "locations": place.astype(np.uint16 if narrow else np.uint32),
                "activations": value[order],
                "tokens": tokens,
            }
            save_file(arrays, str(folder / f"{first}_{after - 1}.safetensors"))
            advance(after - first)
        config = {
            **DELPHI_CONFIG,
            "cache_ctx_len": tokens.shape[1],
            "n_tokens": store.rows,
            "n_splits": splits,
            "model_name": store.manifest.model.name,
        }
        files.replace_file(folder / "config.json", json.dumps(config, indent=4).encode())
    return folder


def export_neuronpedia(
    features: Features,
    sae: Sae,
    out: str | os.PathLike[str],
    *,
    ids: Sequence[int] | None = None,
    sae_set: str | None = None,
    k: int = 20,
    context: int = 20,
    batch: int = 128,
    show_progress: bool = True,
) -> Path:
    """Writes dashboards of features as SAEDashboard does for Neuronpedia: `out`/batch-0.json, batch-1.json, ...

    Args:
        features: Their strongest contexts, histogram and share of active tokens are written.
        sae: The one that made them: tokens promoted and suppressed, by `decoder_logits`.
        out: A folder that holds no batches yet.
        ids: Which features. None: all that are ever active.
        sae_set: What Neuronpedia is to call the set. None: the SAE's name.
        k: Contexts a feature.
        context: Tokens on either side.
        batch: Features a file.
        show_progress: Say how far it is.

    Fields of SAEDashboard's that compare features with neurons are empty lists, which is what it writes without them.
    Layout: `NeuronpediaDashboardBatch` of sae_dashboard/neuronpedia/neuronpedia_dashboard.py and the fields that
    `_process_batch` of neuronpedia_export.py reads, 2025. Numbers are rounded to 3 decimals, as there.

    Raises RequestError as `promoted_tokens` does, for features there are not, or a folder with batches in it.
    """
    for name, value in (("k", k), ("context", context), ("batch", batch)):
        if value < 1:
            raise RequestError(f"{name} must be at least 1, not {value}")
    chosen = np.flatnonzero(features.counts) if ids is None else np.asarray(ids, np.int64)
    if len(chosen) and not 0 <= chosen.min() <= chosen.max() < features.shape[1]:
        raise RequestError(f"ids: the SAE has features 0 to {features.shape[1] - 1}, not {chosen.max()}")
    check_sae(features, sae)
    check_writes_residual(features, sae)
    out = Path(out)
    if any(out.glob("batch-*.json")):
        raise RequestError(f"{out} holds batches already; choose another folder")
    unembed = load_unembed(features.store.path)
    layer = re.match(r"blocks\.(\d+)\.", features.record.site)
    about = {
        "model_id": features.store.manifest.model.name,
        "layer": int(layer[1]) if layer else 0,
        "sae_set": sae_set or sae.name,
    }
    sequences = int(features.texts.sequence[-1]) + 1 if len(features) else 0
    common = {
        "n_prompts_total": sequences,
        "n_tokens_in_prompt": int(features.texts.position.max(initial=-1)) + 1,
        "dataset": str(features.store.path.name),
    }
    out.mkdir(parents=True, exist_ok=True)
    with progress("writing dashboards", len(chosen), "features", shown=show_progress) as advance:
        for number, first in enumerate(range(0, len(chosen), batch)):
            own = chosen[first : first + batch].tolist()
            effects = decoder_logits(sae, unembed, own)
            dashboards = [
                _dashboard(features, feature, extreme_tokens(line, unembed, 10), line.cpu().numpy(), k, context)
                | common
                for feature, line in zip(own, effects, strict=True)
            ]
            text = json.dumps(about | {"features": dashboards})
            files.replace_file(out / f"batch-{number}.json", text.encode())
            advance(len(own))
    return out


def _dashboard(
    features: Features, feature: int, tokens: pd.DataFrame, effects: np.ndarray, k: int, context: int
) -> dict[str, Any]:
    """What SAEDashboard tells of one feature."""
    rows, _ = features.rows_of(feature)
    contexts = feature_contexts(features, feature, rows[: 4 * k], context)[:k]
    counts, edges = feature_histogram(features, feature)
    logits, logit_edges = np.histogram(effects, 40)
    up, down = tokens.head(10), tokens.tail(10)[::-1]
    nothing = ("neuron_alignment", "correlated_neurons", "correlated_features")
    parts = (("indices", "values", "l1"), ("indices", "pearson", "l1"), ("indices", "pearson", "l1"))
    return {
        "feature_index": feature,
        **{f"{name}_{part}": [] for name, own in zip(nothing, parts, strict=True) for part in own},
        "neg_str": down["token"].tolist(),
        "neg_values": _rounded(down["logit"]),
        "pos_str": up["token"].tolist(),
        "pos_values": _rounded(up["logit"]),
        "frac_nonzero": int(features.counts[feature]) / max(1, len(features)),
        "freq_hist_data_bar_values": _rounded((edges[:-1] + edges[1:]) / 2),
        "freq_hist_data_bar_heights": counts.tolist(),
        "logits_hist_data_bar_values": _rounded((logit_edges[:-1] + logit_edges[1:]) / 2),
        "logits_hist_data_bar_heights": logits.tolist(),
        "decoder_weights_dist": [],
        "activations": [_activation(part, float(features.max[feature])) for part in contexts],
    }


def _activation(context: Context, largest: float) -> dict[str, Any]:
    """One context; -1 below and within, with the largest activation above, mark it as one of the strongest."""
    return {
        "bin_min": -1,
        "bin_max": round(largest, 3),
        "bin_contains": -1,
        "qualifying_token_index": context.at,
        "tokens": list(context.tokens),
        "values": _rounded(context.activations),
    }


def _rounded(values: Any) -> list[float]:
    return np.round(np.asarray(values, np.float64), 3).tolist()


def _rectangle(
    features: Features,
) -> tuple[Int64[np.ndarray, " row"], Int64[np.ndarray, " row"], Int[np.ndarray, "sequence position"]]:
    """The sequence of each row, counted from 0, its place there, and the token ids of all sequences in one array."""
    table = features.store.tokens
    ids, sequence = table["token_id"].to_numpy(), table["sequence"].to_numpy()
    begins = np.append(True, sequence[1:] != sequence[:-1])[: len(sequence)]
    number = np.cumsum(begins) - 1
    starts = np.flatnonzero(begins)
    place = np.arange(len(sequence)) - starts[number]
    prefix = features.store.manifest.tokens_added["prefix"]
    shape = (len(starts), int(place.max(initial=-1)) + 1)
    tokens = np.full(shape, prefix[0] if prefix else 0, np.int64)
    tokens[number, place] = ids
    return number.astype(np.int64), place.astype(np.int64), tokens


def _check_empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise RequestError(f"{folder} is not empty; choose another out")
