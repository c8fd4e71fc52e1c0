"""Export of features to other tools: delphi's latent cache and SAEDashboard's batches for Neuronpedia.

The files follow the layout that these tools write, so that their readers open them; each function cites its source.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int64
from numpy.typing import ArrayLike
from torch import Tensor

from workbench.features.feature_store import Features
from workbench.features.index import entry_rows
from workbench.features.promoted import check_sae, check_writes_residual
from workbench.features.queries import Context, feature_contexts, feature_histogram
from workbench.io import files
from workbench.io.checks import as_path, check_kind, whole_number
from workbench.io.errors import RequestError
from workbench.io.progress import progress
from workbench.io.tensors import new_arrays
from workbench.model.unembed import Unembed, load_unembed
from workbench.sae.autoencoder import Sae
from workbench.sae.decoder import decoder_logits, extreme_tokens

DELPHI_CONFIG: Mapping[str, Any] = {
    "dataset_repo": "",
    "dataset_split": "",
    "dataset_name": "",
    "dataset_column": "",
    "batch_size": 32,
}
"""Settings of delphi's cache that do not apply to a store: tokens are in the files, no dataset is read."""

_BLOCK = 1 << 18  # entries in memory, some 200 bytes each
_OPEN_FILES = 64  # written in one pass over the entries
_FLOAT16 = float(np.finfo(np.float16).max)


def export_delphi(
    features: Features, out: str | os.PathLike[str], *, splits: int = 5, show_progress: bool = True
) -> Path:
    """Writes the features as delphi's cached latents under `out`/SITE and returns that folder.

    Each of `splits` ranges of features becomes a file FIRST_LAST.safetensors: `locations` [entry, (sequence, position,
    feature - FIRST)] in row order, uint16 or, if too narrow, uint32; `activations` [entry] in float16; `tokens`
    [sequence, position], the same in each file. config.json is written beside them.

    delphi requires sequences of equal length: shorter ones are padded with their first token, or token 0, without
    activations. Values beyond float16 become its largest; entries that are 0 in float16 are left out, as delphi leaves
    out those below 1e-5. Memory: the padded tokens, 16 bytes a row, and about 100 MB, whatever the splits.

    Layout: `save_splits` and `save_config` of delphi/latents/cache.py and the reader in delphi/latents/loader.py, 2025.

    Args:
        features: The features.
        out: Folder to write to.
        splits: Number of files, 1 to the number of features.
        show_progress: Show progress.

    Raises:
        RequestError: A folder that is not empty, or splits out of range.
    """
    count = features.shape[1]
    splits = whole_number("splits", splits, at_least=1, at_most=count)
    folder = as_path("out", out).resolve() / features.record.site
    files.check_writable(folder)
    _check_empty(folder)
    store = features.store
    sequence, position, tokens = _rectangle(features)
    bounds = np.linspace(0, count, splits + 1).astype(np.int64)
    place = {"sequence": sequence, "position": position, "tokens": tokens}
    with (
        files.explain_full_disk(str(folder), "run the same command again"),
        files.replace_folder(folder, ()) as new,
        progress("writing delphi's cache", count, "features", show=show_progress) as advance,
    ):
        for first in range(0, splits, _OPEN_FILES):
            part = bounds[first : first + _OPEN_FILES + 1]
            _write_delphi_splits(features, part, new, **place)
            advance(int(part[-1] - part[0]))
        config = {
            **DELPHI_CONFIG,
            "cache_ctx_len": tokens.shape[1],
            "n_tokens": store.rows,
            "n_splits": splits,
            "model_name": store.manifest.model.name,
        }
        files.write_file(new / "config.json", json.dumps(config, indent=4).encode())
    return folder


def _write_delphi_splits(
    features: Features,
    bounds: Int64[np.ndarray, " bound"],
    folder: Path,
    *,
    sequence: Int64[np.ndarray, " row"],
    position: Int64[np.ndarray, " row"],
    tokens: Int[np.ndarray, "sequence position"],
) -> None:
    """Writes the splits between `bounds`, in one pass over the entries in row order, as delphi's files are ordered."""
    with ExitStack() as stack:
        written = []
        for first, after in itertools.pairwise(bounds.tolist()):
            kind = "uint16" if max(*tokens.shape, after - first) <= 1 << 16 else "uint32"
            entries = _entries_in_float16(features, first, after)
            layout = {"locations": (kind, (entries, 3)), "activations": ("float16", entries)}
            path = folder / f"{first}_{after - 1}.safetensors"
            written.append((stack.enter_context(new_arrays(path, layout | {"tokens": ("int64", tokens.shape)})), kind))
            written[-1][0].append("tokens", tokens)
        for start in range(0, features.record.entries, _BLOCK):
            stop = min(start + _BLOCK, features.record.entries)
            feature = features.by_row["feature"][start:stop]
            value = _float16(features.by_row["value"][start:stop])
            split = np.searchsorted(bounds, feature, side="right") - 1
            split[value == 0] = -1
            row = entry_rows(features.by_row["indptr"], start, stop)
            for number, (file, kind) in enumerate(written):
                chosen = np.flatnonzero(split == number)
                at, latent = row[chosen], feature[chosen] - bounds[number]
                file.append("locations", np.stack([sequence[at], position[at], latent], axis=1).astype(kind))
                file.append("activations", value[chosen])


def _entries_in_float16(features: Features, first: int, after: int) -> int:
    """Number of entries of the features from `first` up to `after` that are not 0 in float16."""
    begin, end = map(int, features.by_feature["indptr"][[first, after]])
    parts = (slice(start, min(start + _BLOCK, end)) for start in range(begin, end, _BLOCK))
    return sum(int(np.count_nonzero(_float16(features.by_feature["value"][part]))) for part in parts)


def _float16(values: Float[np.ndarray, " entry"]) -> Float[np.ndarray, " entry"]:
    return values.clip(-_FLOAT16, _FLOAT16).astype(np.float16)


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

    A dashboard has a feature's strongest contexts, histogram, share of active tokens, and tokens promoted and
    suppressed by `decoder_logits`. Fields that compare features with neurons are empty lists. Numbers are rounded to 3
    decimals.

    Layout: `NeuronpediaDashboardBatch` of sae_dashboard/neuronpedia/neuronpedia_dashboard.py and the fields that
    `_process_batch` of neuronpedia_export.py reads, 2025.

    Args:
        features: The features.
        sae: The SAE that made them.
        out: A folder without batches.
        ids: Ids of the features; each is written once. None: all that are active.
        sae_set: Name of the set on Neuronpedia. None: the SAE's name.
        k: Number of contexts per feature.
        context: Number of tokens on either side.
        batch: Number of features per file.
        show_progress: Show progress.

    Raises:
        RequestError: As `promoted_tokens`; ids that do not exist, several sites, or a folder that has batches.
    """
    k, context, batch = (
        whole_number(name, value, at_least=1) for name, value in (("k", k), ("context", context), ("batch", batch))
    )
    chosen = _checked_ids(features, ids)
    _check_one_site(features, sae)
    out = as_path("out", out)
    files.check_writable(out)
    if any(out.glob("batch-*.json")):
        raise RequestError(f"{out} already has batches; choose another out")
    unembed = load_unembed(features.store.path)
    header = _set_fields(features, sae_set or sae.name)
    common = _dataset_fields(features)
    with (
        files.explain_full_disk(str(out), "run the same command again"),
        files.replace_folder(out.resolve(), ("batch-*.json",)) as new,
        progress("writing dashboards", len(chosen), "features", show=show_progress) as advance,
    ):
        for number, first in enumerate(range(0, len(chosen), batch)):
            members = chosen[first : first + batch].tolist()
            pairs = zip(members, decoder_logits(sae, unembed, members), strict=True)
            dashboards = [_dashboard(features, feature, line, unembed, k, context) | common for feature, line in pairs]
            text = json.dumps(header | {"features": dashboards})
            files.write_file(new / f"batch-{number}.json", text.encode())
            advance(len(members))
    return out


def _checked_ids(features: Features, ids: Sequence[int] | None) -> Int64[np.ndarray, " id"]:
    if ids is None:
        return np.flatnonzero(features.counts)
    for number in ids:
        check_kind("ids", number, (int, np.integer), "numbers of features")
        if not 0 <= number < features.shape[1]:
            raise RequestError(f"ids: the SAE has features 0 to {features.shape[1] - 1}, not {number}")
    return np.array(list(dict.fromkeys(map(int, ids))), np.int64)


def _check_one_site(features: Features, sae: Sae) -> None:
    check_sae(features, sae)
    check_writes_residual(features, sae)
    if sae.n_sites > 1:
        raise RequestError(f"SAE {sae.name!r} reads several sites, and a set of Neuronpedia has one; extract one layer")


def _set_fields(features: Features, sae_set: str) -> dict[str, int | str]:
    """The fields of a batch that name the set of features."""
    layer = re.match(r"blocks\.(\d+)\.", features.record.site)
    return {
        "model_id": features.store.manifest.model.name,
        "layer": int(layer[1]) if layer else 0,
        "sae_set": sae_set,
    }


def _dataset_fields(features: Features) -> dict[str, int | str]:
    """The fields of a dashboard that describe the texts."""
    return {
        "n_prompts_total": int(features.texts.sequence[-1]) + 1 if len(features) else 0,
        "n_tokens_in_prompt": int(features.texts.position.max(initial=-1)) + 1,
        "dataset": str(features.store.path.name),
    }


def _dashboard(
    features: Features,
    feature: int,
    line: Float[Tensor, " vocab"],
    unembed: Unembed,
    k: int,
    context: int,
) -> dict[str, Any]:
    """SAEDashboard's record of one feature; `line`: its effects on the logits."""
    tokens, effects = extreme_tokens(line, unembed, 10), line.cpu().numpy()
    rows, _ = features.rows_of(feature)
    contexts = feature_contexts(features, feature, rows[: 4 * k], context)[:k]
    counts, edges = feature_histogram(features, feature)
    logits, logit_edges = np.histogram(effects, 40)
    up, down = tokens.head(10), tokens.tail(10)[::-1]
    empty = ("neuron_alignment", "correlated_neurons", "correlated_features")
    parts = (("indices", "values", "l1"), ("indices", "pearson", "l1"), ("indices", "pearson", "l1"))
    return {
        "feature_index": feature,
        **{f"{name}_{part}": [] for name, columns in zip(empty, parts, strict=True) for part in columns},
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
    """One context; bins -1 to the largest activation mark it as one of the strongest."""
    return {
        "bin_min": -1,
        "bin_max": round(largest, 3),
        "bin_contains": -1,
        "qualifying_token_index": context.at,
        "tokens": list(context.tokens),
        "values": _rounded(context.activations),
    }


def _rounded(values: ArrayLike) -> list[float]:
    return np.round(np.asarray(values, np.float64), 3).tolist()


def _rectangle(
    features: Features,
) -> tuple[Int64[np.ndarray, " row"], Int64[np.ndarray, " row"], Int[np.ndarray, "sequence position"]]:
    """Sequence number and position of each row, and the token ids of all sequences in one padded array."""
    features.store.require_whole_sequences("an export for delphi")
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
