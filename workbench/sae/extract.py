"""From a store's activations to sparse features: encoded block by block, committed as a whole."""

from __future__ import annotations

import os
import re
import warnings
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import DataError, RequestError
from workbench.progress import progress
from workbench.sae.arrays import ArrayFile, map_arrays
from workbench.sae.features import (
    BY_FEATURE,
    BY_ROW,
    RECORD,
    Features,
    FeaturesRecord,
    SaeRecord,
    by_feature_layout,
    by_row_layout,
    open_features,
    read_record,
)
from workbench.sae.index import invert
from workbench.sae.load import Sae
from workbench.sites import full_name
from workbench.store import files
from workbench.store.manifest import FileRecord
from workbench.store.parse import to_json
from workbench.store.reader import ActivationArray, Store

FOLDER = "features"
_LATENT_BYTES = 64 << 20  # of one block's dense activations in float32
_COPY_ENTRIES = 1 << 22

DTYPES = ("float32", "float16")
"""Stored types of activations."""


def extract_features(
    store: Store,
    sae: Sae,
    site: str | tuple[str, int] | None = None,
    *,
    name: str | None = None,
    out: str | os.PathLike[str] | None = None,
    batch_rows: int | None = None,
    dtype: str = "float32",
    force: bool = False,
    show_progress: bool = True,
) -> Features:
    """Encodes every row of a site and keeps what is not 0: the same support and values as `sae.encode` in float32.

    Args:
        store: Its rows become the features' rows, special tokens' (BOS) too: rows are dense. Their activations are
            often the largest; `Features.enrichment` and `sae_metrics` leave them out.
        sae: From `load_sae`; computes where it was loaded to.
        site: The site to read. None: the one that the SAE was trained on.
        name: Folder under the store's `features/`. None: the site and the SAE's name.
        out: Another folder instead.
        batch_rows: Rows encoded at a time. None: as many as make 64 MiB of dense activations.
        dtype: Stored type of activations: float32, or float16 in half the bytes, where values beyond its range are
            stored as its largest and counted.
        force: Use an SAE of another site or model.
        show_progress: Say how far it is.

    Costs one product with the encoder; memory is a few dense blocks, the index needs twice the features' bytes on the
    disk while it is built. Interrupted, it leaves nothing that opens. Features of the same SAE, store and settings are
    opened instead of made again.

    Raises RequestError: a site that was not recorded or is not as wide as the SAE's input; another site or model than
    the SAE's, unless `force`; a name taken by other features. Raises DataError: activations that are not finite, a
    full disk.
    """
    if dtype not in DTYPES:
        raise RequestError(f"dtype must be {' or '.join(DTYPES)}, not {dtype!r}")
    if batch_rows is not None and batch_rows < 1:
        raise RequestError(f"batch_rows must be at least 1, not {batch_rows}")
    array = matching_site(store, sae, site, force=force)
    target = _target(store, name, out, default=f"{array.site.label}-{sae.name}")
    asked = SaeRecord(sae.name, sae.fingerprint(), sae.config())
    if _holds_same(target, asked, array, dtype):
        return open_features(target, store)
    partial = target.with_name(f".{target.name}{files.PARTIAL}")
    full = files.explain_full_disk(f"features {target}", "nothing was kept; free space and run again")
    with files.locked(partial), full:
        try:
            for leftover in partial.iterdir():
                files.remove(leftover)
            _write(partial, target, array, sae, asked, batch_rows, dtype, show_progress)
            files.rename_durably(partial, target)
        finally:
            files.remove(partial)
    features = open_features(target, store)
    if overflow := features.record.overflow:
        warnings.warn(
            f"{overflow} activations are beyond float16's range and stored as its largest; dtype='float32' keeps them",
            stacklevel=2,
        )
    return features


def matching_site(
    store: Store, sae: Sae, site: str | tuple[str, int] | None = None, *, force: bool = False
) -> ActivationArray:
    """The array of `store` that `sae` encodes, by default that of the SAE's own site.

    The residual stream before a block is the one after the block before: an SAE of either reads both. Raises
    RequestError naming both sides where width, site or model differ; `force` allows all but the width.
    """
    own = full_name(sae.site) if sae.site else None
    if site is None:
        if own is None:
            raise RequestError(f"site: SAE {sae.name!r} does not say where it was trained; give site=")
        recorded = {record.name for record in store.sites}
        site = next((name for name in _names(own) if name in recorded), own)
    array = store[site]
    width = prod(array.site.shape)
    if width != sae.d_in:
        raise RequestError(
            f"SAE {sae.name!r} takes rows of {sae.d_in} numbers and {array.site.label} of {store.path} has {width}"
        )
    if force:
        return array
    if own and array.name not in _names(own):
        raise RequestError(
            f"SAE {sae.name!r} was trained on {own} and site is {array.name}; leave site out, or force=True"
        )
    model = store.manifest.model.name
    if sae.model_name and not _same_model(sae.model_name, model):
        raise RequestError(
            f"SAE {sae.name!r} was trained on the model {sae.model_name} and {store.path} is of {model}; "
            "if they are the same, force=True"
        )
    return array


def block_rows(sae: Sae) -> int:
    """Rows whose dense activations make 64 MiB."""
    return max(1, _LATENT_BYTES // (4 * sae.d_sae))


def encode_checked(
    array: ActivationArray, sae: Sae, ids: np.ndarray, values: Float[Tensor, "row ..."]
) -> Float[Tensor, "row feature"]:
    """`sae.encode` of rows `ids`; DataError, with the row, where they or their features are not finite."""
    if (bad := ~values.isfinite().flatten(1).all(1)).any():
        row = ids[int(bad.nonzero()[0])]
        raise DataError(f"row {row} of {array!r} is not finite; run workbench verify {array.store.path}")
    activations = sae.encode(values)
    if (bad := ~activations.isfinite().all(1).cpu()).any():
        row = ids[int(bad.nonzero()[0])]
        raise DataError(f"SAE {sae.name!r} gives row {row} of {array.site.label} features that are not finite")
    return activations


def _write(
    folder: Path,
    target: Path,
    array: ActivationArray,
    sae: Sae,
    asked: SaeRecord,
    batch_rows: int | None,
    dtype: str,
    show_progress: bool,
) -> None:
    """Everything of the features, into the folder that becomes `target`."""
    store = array.store
    lengths, counts, overflow = _encode(folder, array, sae, batch_rows, dtype, show_progress)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    size = (store.rows, sae.d_sae, int(indptr[-1]), dtype)
    layout = by_row_layout(*size)
    with ArrayFile(folder / BY_ROW, layout) as file:
        file.append("indptr", indptr)
        for part in ("feature", "value"):
            _append_spill(file, part, folder / part, layout[part][0])
    by_row = map_arrays(folder / BY_ROW, layout)
    layout = by_feature_layout(*size)
    with ArrayFile(folder / BY_FEATURE, layout) as file:
        invert(indptr, by_row["feature"], by_row["value"], counts, file, folder / "dealt", layout["row"][0])
    record = FeaturesRecord(
        sae=asked,
        site=array.name,
        store=os.path.relpath(store.path, target),
        store_fingerprint=store.manifest.fingerprint,
        rows=store.rows,
        features=sae.d_sae,
        entries=size[2],
        dtype=dtype,
        overflow=overflow,
        files={
            path.name: FileRecord(path.stat().st_size, files.sha256_file(path)) for path in sorted(folder.iterdir())
        },
        environment={library: version(library) for library in ("interp-workbench", "sae-lens", "torch")},
    )
    files.write_durably(folder / RECORD, to_json(record).encode())
    files.fsync(folder)


def _encode(
    folder: Path, array: ActivationArray, sae: Sae, batch_rows: int | None, dtype: str, show_progress: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Entries of all rows, one after the other, into the files `feature` and `value`; entries of each row and of each
    feature, and how many overflowed."""
    kind = by_row_layout(0, sae.d_sae, 0, dtype)["feature"][0]
    lengths, counts, overflow = np.zeros(len(array), np.int64), np.zeros(sae.d_sae, np.int64), 0
    limit = torch.finfo(getattr(torch, dtype)).max
    with (
        open(folder / "feature", "wb") as features,
        open(folder / "value", "wb") as values,
        progress("extracting features", len(array), "rows", shown=show_progress) as advance,
    ):
        for rows, block in array.blocks(batch_rows or block_rows(sae)):
            activations = encode_checked(array, sae, np.arange(rows.start, rows.stop), block)
            active = activations != 0
            found, value = active.nonzero()[:, 1].cpu().numpy(), activations[active]
            overflow += int((value.abs() > limit).sum())
            features.write(found.astype(kind))
            values.write(value.clamp(-limit, limit).to(getattr(torch, dtype)).cpu().numpy())
            lengths[rows] = active.sum(1).cpu().numpy()
            counts += np.bincount(found, minlength=sae.d_sae)
            advance(len(active))
    return lengths, counts, overflow


def _append_spill(file: ArrayFile, part: str, spill: Path, dtype: str) -> None:
    with open(spill, "rb") as source:
        while len(values := np.fromfile(source, dtype, _COPY_ENTRIES)):
            file.append(part, values)
    spill.unlink()


def _target(store: Store, name: str | None, out: str | os.PathLike[str] | None, default: str) -> Path:
    if out is not None and name is not None:
        raise RequestError("give name, a folder in the store, or out, a folder anywhere, not both")
    if out is not None:
        return Path(out).absolute()
    name = re.sub(r"[^\w.-]+", "-", default, flags=re.ASCII) if name is None else name
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise RequestError(f"name {name!r} is no folder's name; letters, digits, '_', '.' and '-' only")
    return store.path / FOLDER / name


def _holds_same(target: Path, asked: SaeRecord, array: ActivationArray, dtype: str) -> bool:
    """Whether `target` holds just these features, or nothing yet; RequestError where it holds anything else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if not (target / RECORD).is_file():
        raise RequestError(f"{target} exists and holds no features; choose another name or out")
    found, manifest = read_record(target), array.store.manifest
    differing = [
        f"{what} is {has}, asked is {wants}"
        for what, has, wants, same in (
            ("SAE", _sae_text(found.sae), _sae_text(asked), found.sae.fingerprint == asked.fingerprint),
            ("site", found.site, array.name, found.site == array.name),
            ("dtype", found.dtype, dtype, found.dtype == dtype),
            (
                "store",
                f"{found.store_fingerprint[:12]} of {found.rows} rows",
                f"{manifest.fingerprint[:12]} of {manifest.rows} rows",
                found.store_fingerprint == manifest.fingerprint,
            ),
        )
        if not same
    ]
    if differing:
        raise RequestError(f"features {target.name} exist and differ: {'; '.join(differing)}; choose another name")
    return True


def _sae_text(sae: SaeRecord) -> str:
    return f"{sae.name} ({sae.fingerprint[:12]})"


def _names(site: str) -> tuple[str, ...]:
    """A residual site's two names, before a block and after the one before it; any other's own."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", site)
    if not found:
        return (site,)
    layer = int(found[1])
    other = f"blocks.{layer - 1}.hook_resid_post" if found[2] == "pre" else f"blocks.{layer + 1}.hook_resid_pre"
    return (site, other)


def _same_model(one: str, other: str) -> bool:
    """Whether two names mean one model: owners differ between hubs, and TransformerLens has names of its own."""
    from transformer_lens.supported_models import MODEL_ALIASES

    def plain(name: str) -> str:
        name = name.casefold()
        official = next((own for own, known in MODEL_ALIASES.items() if name in map(str.casefold, known)), name)
        return official.casefold().rsplit("/", 1)[-1]

    return plain(one) == plain(other)
