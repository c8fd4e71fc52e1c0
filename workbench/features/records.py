"""Records of extracted features: `features.json`, parsed strictly, and the arrays of both orders."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.io.errors import DataError, RequestError
from workbench.io.parse import check_checksum, parse, read_json
from workbench.store.manifest import FileRecord

FORMAT, VERSION = "workbench.features", 2
AGAIN = "extract the features again"
RECORD, BY_ROW, BY_FEATURE = "features.json", "by_row.safetensors", "by_feature.safetensors"

_NARROW = 1 << 16  # features that fit in uint16
_SHORT = 1 << 31  # rows that fit in int32


@dataclass(frozen=True)
class SaeRecord:
    """The autoencoder that made the features."""

    name: str
    fingerprint: str
    """SHA-256 of its weights and of the settings that change the mathematics."""
    config: dict[str, Any]
    """Its `cfg.json`, metadata included."""


@dataclass(frozen=True)
class SiteFeatures:
    """Features that read one site: all of most autoencoders, those of one layer where each layer has its own."""

    site: str
    """TransformerLens name."""
    first: int
    stop: int
    """Ids of the features: first to stop - 1."""


@dataclass(frozen=True)
class FeaturesRecord:
    """`features.json`: contents of the folder and their provenance."""

    sae: SaeRecord
    site: str
    """TransformerLens name of the site that was read; of several a name for all: `blocks.0-25.hook_resid_mid`."""
    reads: tuple[SiteFeatures, ...]
    """The sites that were read, and the features that read each."""
    store: str
    """Path of the store, relative to this folder."""
    store_fingerprint: str
    """Fingerprint of the store's manifest: appending to the store changes it."""
    rows: int
    features: int
    entries: int
    """Number of stored activations."""
    dtype: str
    """Type of the stored activations: float32 or float16."""
    overflow: int
    """Number of activations beyond the range of `dtype`, stored as its largest value."""
    files: dict[str, FileRecord]
    environment: dict[str, str]
    """Library versions at the time of the extraction."""
    format: str = FORMAT
    version: int = VERSION

    @property
    def by_row(self) -> dict[str, tuple[str, int]]:
        """(type, length) of each array of `by_row.safetensors`."""
        return by_row_layout(self.rows, self.features, self.entries, self.dtype)

    @property
    def by_feature(self) -> dict[str, tuple[str, int]]:
        """(type, length) of each array of `by_feature.safetensors`."""
        return by_feature_layout(self.rows, self.features, self.entries, self.dtype)


def by_row_layout(rows: int, features: int, entries: int, dtype: str) -> dict[str, tuple[str, int]]:
    """Returns the arrays of the order by row: `indptr` [row + 1]; per entry `feature`, ascending, and `value`."""
    return {
        "indptr": ("int64", rows + 1),
        "feature": (feature_type(features), entries),
        "value": (dtype, entries),
    }


def feature_type(features: int) -> str:
    """Returns the stored type of feature ids."""
    return "uint16" if features <= _NARROW else "int32"


def by_feature_layout(rows: int, features: int, entries: int, dtype: str) -> dict[str, tuple[str, int]]:
    """Returns the arrays of the order by feature: `indptr` [feature + 1]; per entry `row`, `value`, largest first."""
    kind = "int32" if rows < _SHORT else "int64"
    return {"indptr": ("int64", features + 1), "row": (kind, entries), "value": (dtype, entries)}


def read_record(path: Path) -> FeaturesRecord:
    """Returns the record of the features in the folder `path`; raises as `open_features` does."""
    source = path / RECORD
    if not os.path.lexists(source):
        raise RequestError(f"no features at {path}: no {RECORD}; make them with workbench features")
    value = read_json(source, AGAIN)
    if value.get("format") != FORMAT:
        raise DataError(f"{source}: format is {value.get('format')!r}, expected {FORMAT!r}; name a folder of features")
    if isinstance(value.get("version"), int) and value["version"] > VERSION:
        raise RequestError(f"{source} has format version {value['version']}; upgrade the workbench")
    if value.get("version") == 1:  # which has no checksum, and read one site
        value.setdefault("reads", [{"site": value.get("site"), "first": 0, "stop": value.get("features")}])
    else:
        check_checksum(value, source, AGAIN)
    return parse(FeaturesRecord, value, str(source))
