"""Extraction of sparse features from a store's activations."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import NoneType

import numpy as np

from workbench.features.encoding import EncodingSettings, StoreEncoder
from workbench.features.extraction_folder import (
    ExtractionFolder,
    ExtractionRecord,
    Stage,
    exclusive_turn,
    extraction_record,
    is_complete,
    locked_folder,
    read_folder,
    target_path,
)
from workbench.features.feature_store import Features, open_features
from workbench.features.index import INDEX_MEMORY
from workbench.features.merging import merge_segments, write_index
from workbench.features.records import SaeRecord, SiteFeatures
from workbench.io import files
from workbench.io.checks import as_path, check, check_kind
from workbench.io.errors import RequestError
from workbench.io.tasks import ThisProcess, Workers
from workbench.io.torch_state import plain_torch
from workbench.sae.autoencoder import Sae
from workbench.sae.input_rows import Reading, reading_of
from workbench.sae.layered import LayeredSae
from workbench.sae.ruled import RULE, RuledSae, ruled_fingerprint, ruled_name
from workbench.sae.site import matching_site, not_finite
from workbench.sae.sparsity import SPARSITY_RULES, SparsityRule, sparsity_record
from workbench.store.lost_values import lost_values
from workbench.store.reader import ActivationArray, StoreOrPath

_LOG = logging.getLogger(__name__)

_COUNTED_ROWS = 1 << 16
DTYPES = ("float32", "float16")
"""Stored types of activations."""


@plain_torch()
def extract_features(
    store: StoreOrPath,
    sae: Sae,
    site: str | tuple[str, int] | Sequence[str] | None = None,
    *,
    name: str | None = None,
    out: str | os.PathLike[str] | None = None,
    batch_rows: int | None = None,
    dtype: str = "float32",
    sparsity: SparsityRule | None = None,
    precision: str | None = None,
    index_memory: int = INDEX_MEMORY,
    force: bool = False,
    workers: Workers | None = None,
    show_progress: bool = True,
) -> Features | None:
    """Encodes every row (token) of a site and stores the nonzero activations, those of `sae.encode` in float32.

    An interrupted or killed extraction resumes if the same call is repeated; committed segments are kept. Complete
    features of the same SAE, store and settings are opened instead.

    Cost: one product with the encoder; memory for a few dense blocks and a segment. While the index is built, the disk
    holds the features nearly twice; before that, under MutualChoice and FeatureChoice, up to ten times.

    Args:
        store: The recording, or its path. All its rows are encoded, special tokens (BOS) too, whose activations are
            often the largest; `Features.enrichment` and `sae_metrics` leave them out.
        sae: The autoencoder, from `load_sae`; computes on its device.
        site: The site to read, or a list of several. None: those that the SAE was trained on.
        name: Folder under the store's `features/`. None: made of the site and the SAE's name.
        out: Another folder, instead of `name`.
        batch_rows: Rows encoded at a time. None: four dense blocks of 40 to 80 MiB or 64 rows each; for a temporal SAE
            the sequences that fit, at least one.
        dtype: Stored type of activations: float32, or float16, where values beyond its range are clipped and counted.
        sparsity: Rule that selects pre-activations above 0: TopK(k) in each row, MutualChoice(k) or FeatureChoice(k)
            over all rows. None: the SAE's activation function.
        precision: "float32", or "bfloat16" for bounds first; the features are identical. None: the faster one.
        index_memory: Megabytes in which the index by feature is built, however many rows and frequent a feature.
        force: Allow an SAE of another site or model.
        workers: `RayWorkers` or `Share`, which encode in several processes. None: this process.
        show_progress: Show progress.

    Returns:
        The opened features. None in a process of a `Share` that leaves rows to others: the last one has the features.

    Raises:
        RequestError: A site that was not recorded or has another width; another site or model than the SAE's, unless
            `force`; a name that other features have; a sparsity rule for an SAE without pre-activations.
        DataError: Activations that are not finite, or a full disk.
    """
    array = matching_site(store, sae, site, force=force)
    encoding = StoreEncoder(array, sae, EncodingSettings(sparsity, batch_rows, precision, index_memory), show_progress)
    return extract_array(encoding, dtype, workers, name=name, out=out)


def extract_array(
    encoding: StoreEncoder,
    dtype: str,
    workers: Workers | None = None,
    *,
    name: str | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Features | None:
    """Encodes every row of an array of a store, as `extract_features` describes."""
    array = encoding.array
    _check_choices(encoding.sae, dtype, encoding.settings.sparsity, name, out)
    with ThreadPoolExecutor(1) as pool:  # the fingerprint takes as long as the preparation of the encoder
        requested = pool.submit(_request, encoding, dtype)
        encoding.check()
        _check_rows(encoding)
        request = requested.result()
    place = target_path(array.store.path, array.site, request.sae.name, name)
    return make_features(encoding, place if out is None else as_path("out", out).absolute(), request, workers)


def _check_choices(
    sae: Sae, dtype: str, sparsity: SparsityRule | None, name: str | None, out: str | os.PathLike[str] | None
) -> None:
    """Refuses a wrong type, two rules of sparsity, and two places."""
    check("dtype", dtype, one_of=DTYPES)
    check_kind("sparsity", sparsity, (NoneType, *SPARSITY_RULES.values()), "a rule, such as TopK(32)")
    if sparsity is not None and isinstance(sae, RuledSae):
        raise RequestError(f"sparsity: SAE {sae.name!r} has a rule; leave sparsity out, or give the SAE alone")
    if out is not None and name is not None:
        raise RequestError("give name, a folder in the store, or out, a folder anywhere, but not both")


def _request(encoding: StoreEncoder, dtype: str) -> ExtractionRecord:
    array, sae = encoding.array, encoding.sae
    manifest, reads = array.store.manifest, sites_read(reading_of(array), sae)
    record = sae_record(sae, encoding.settings.sparsity)
    return extraction_record(record, array.name, reads, manifest.fingerprint, array.store.rows, dtype)


def _check_rows(encoding: StoreEncoder) -> None:
    """Refuses rows that are not finite before hours of work, and warns of clipped values."""
    array = encoding.array
    for site in reading_of(array).recorded:
        values = lost_values(array.store, [site.name]).get(site.label)
        if values is None:
            continue
        if values.nonfinite:
            part = ActivationArray(array.store, site)
            raise not_finite(part, encoding.sae, int(values.nonfinite_rows[0]), features=False)
        _LOG.warning(
            f"clipped values at {values.site}: {values.clipped:,}, stored as ±{values.limit:,.6g}; features of their "
            "rows are those of the stored values; record in bfloat16 or float32 to keep them"
        )


def make_features(
    encoding: StoreEncoder, target: Path, request: ExtractionRecord, workers: Workers | None = None
) -> Features | None:
    """Returns the features at `target`, opened if complete, else made from where an earlier call stopped.

    Args:
        encoding: Array, autoencoder and settings.
        target: Place of the features.
        request: The features to make.
        workers: Processes that encode. None: this one.

    Returns:
        The features; None if other processes that share the work have rows left.
    """
    workers = workers or ThisProcess()
    store, shared = encoding.array.store, workers.shared
    if is_complete(target, request):
        return open_features(target, store)
    resume = "run the same command to resume"
    with (
        files.explain_full_disk(f"features {target}", resume, "what is committed stays"),
        locked_folder(target, shared),
    ):
        with exclusive_turn(target, shared):
            folder = read_folder(target, request).begin(shared)
        if folder.stage is Stage.COMPLETE:
            return open_features(target, store)
        if folder.stage is Stage.ENCODING:
            encoding.encode(folder.segments, workers)
        with exclusive_turn(target, shared):
            if shared:  # meanwhile others may have encoded, merged or finished
                folder = read_folder(target, request).begin(shared)
            folder = _finish(encoding, folder)
    if folder.stage is not Stage.COMPLETE:
        return None
    features = open_features(target, store)
    _warn_of_negative(features, encoding)
    if overflow := features.record.overflow:
        _LOG.warning(
            f"{overflow} activations are beyond the range of float16 and stored as its largest value; give "
            "dtype='float32' to keep them"
        )
    return features


def _warn_of_negative(features: Features, encoding: StoreEncoder) -> None:
    """Warns of rows with fewer than k features of a TopK without ReLU, which would keep negative ones too."""
    sae = encoding.sae
    parts = sae.parts if isinstance(sae, LayeredSae) else (sae,)
    if encoding.settings.sparsity is not None or not any(part.metadata.get("keeps_negative") for part in parts):
        return
    starts = np.array(sae.firsts if isinstance(sae, LayeredSae) else (0,))
    k, fewer = np.array([part.module.cfg.k for part in parts]), np.zeros(len(parts), np.int64)
    indptr, feature = features.by_row["indptr"], features.by_row["feature"]
    for first in range(0, len(features), _COUNTED_ROWS):
        ends = indptr[first : first + _COUNTED_ROWS + 1]
        rows = len(ends) - 1
        row = np.repeat(np.arange(rows), np.diff(ends))
        part = np.searchsorted(starts, feature[ends[0] : ends[-1]], side="right") - 1
        counts = np.bincount(row * len(parts) + part, minlength=rows * len(parts)).reshape(rows, -1)
        fewer += (counts < k).sum(0)
    for number, part_sae, least in zip(fewer, parts, k, strict=True):
        if number:
            _LOG.warning(
                f"{number:,} of {len(features):,} rows have fewer than {least} activations of {part_sae.name!r} "
                "above 0; its library also keeps negative ones there, which are not stored"
            )


def sites_read(reading: Reading, sae: Sae) -> tuple[SiteFeatures, ...]:
    """Returns the sites that `sae` reads, with its features that read each."""
    names = [part.site.name for part in reading.parts] if sae.n_sites > 1 else [reading.site.name]
    if isinstance(sae, LayeredSae):
        sizes = zip(sae.firsts, sae.parts, strict=True)
        return tuple(
            SiteFeatures(name, first, first + part.d_sae) for name, (first, part) in zip(names, sizes, strict=True)
        )
    return tuple(SiteFeatures(name, 0, sae.d_sae) for name in names)


def sae_record(sae: Sae, sparsity: SparsityRule | None) -> SaeRecord:
    """Returns the record of an autoencoder; with a sparsity rule, which changes the features, it is another one."""
    if sparsity is None:
        return SaeRecord(sae.name, sae.fingerprint(), sae.config())
    rule = sparsity_record(sparsity)
    fingerprint = ruled_fingerprint(sae.fingerprint(), rule)
    return SaeRecord(ruled_name(sae.name, sparsity), fingerprint, sae.config() | {RULE: rule})


def _finish(encoding: StoreEncoder, folder: ExtractionFolder) -> ExtractionFolder:
    """Merges, indexes and names what is encoded; does nothing if rows are left to other processes."""
    features = encoding.sae.d_sae
    if folder.stage is Stage.ENCODING:
        if folder.segments.missing_spans(encoding.spans()):
            return folder
        folder = merge_segments(folder, features, encoding.quotas())
    if folder.stage is Stage.MERGED:
        folder = write_index(folder, features, encoding.array.store.path, encoding.settings.index_memory)
    return folder.commit() if folder.stage is Stage.INDEXED else folder
