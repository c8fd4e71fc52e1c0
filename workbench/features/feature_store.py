"""Sparse features of a store's rows, ordered by row and by feature, memory-mapped.

features = open_features("runs/demo.acts/features/resid_post.3-sae")
features[:100]                 # scipy.sparse.csr_array (100, d_sae)
features.top(17)               # the strongest tokens of feature 17, in context
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int64, Integer
from scipy.sparse import csr_array
from torch import Tensor

from workbench.features.index import feature_groups, feature_sums
from workbench.features.labels import load_labels, with_names
from workbench.features.records import (
    BY_FEATURE,
    BY_ROW,
    RECORD,
    FeaturesRecord,
    read_record,
)
from workbench.io.checks import as_path, check_kind, whole_number
from workbench.io.errors import DataError, RequestError
from workbench.io.files import sha256_file
from workbench.io.tensors import map_arrays
from workbench.sae.autoencoder import Sae
from workbench.store.manifest import FEATURES, MANIFEST
from workbench.store.reader import Rows, Store, open_store


def open_features(path: str | os.PathLike[str], store: Store | str | os.PathLike[str] | None = None) -> Features:
    """Opens extracted features.

    Cost: reads the row pointers of both orders.

    Args:
        path: The features' folder, or a store that contains one.
        store: The store, or its new path if it was moved away from the features.

    Raises:
        RequestError: No features or several, no store, or a store whose rows have changed.
        DataError: A damaged file.
    """
    path = as_path("path", path).absolute()
    if (path / MANIFEST).is_file():
        path = _only_folder(path)
    record = read_record(path)
    if not isinstance(store, Store):
        place = Path(os.path.normpath(path / record.store)) if store is None else as_path("store", store)
        if store is None and not place.is_dir():
            raise RequestError(f"features {path}: there is no store at {place}; give its path as store=")
        store = open_store(place)
    features = Features(path, record, store)
    features._check()
    return features


def _layer(site: str) -> int | None:
    match = re.match(r"blocks\.(\d+)\.", site)
    return int(match[1]) if match else None


def feature_folders(store: Path) -> list[Path]:
    """Returns the folders of features inside a store, by name; they are not opened."""
    return sorted(record.parent for record in store.glob(f"{FEATURES}/[!.]*/{RECORD}"))


def _only_folder(store: Path) -> Path:
    folders = feature_folders(store)
    if len(folders) != 1:
        names = ", ".join(folder.name for folder in folders)
        several = f"has several features in {FEATURES}/; name one: {names}"
        raise RequestError(f"{store} {several if folders else 'has no features; make them with workbench features'}")
    return folders[0]


@dataclass(frozen=True, eq=False, repr=False)
class Features:
    """Sparse features of every row (token) of a store, special tokens included; axes (row, feature).

    An entry is stored for every nonzero activation, so the entries of a row are its active features; an activation too
    small for float16 keeps its entry, with value 0. Pickles as its path.
    """

    path: Path
    record: FeaturesRecord
    store: Store

    __iter__ = None

    def __reduce__(self) -> tuple[Callable[..., Features], tuple[Path, Path]]:
        return open_features, (self.path, self.store.path)

    def __repr__(self) -> str:
        rows, features = self.shape
        active = self.record.entries / rows if rows else 0
        return f"features of {self.record.site} (row {rows:,}, feature {features:,}), {active:.1f} active per row"

    def _repr_html_(self) -> str:
        from workbench.figures.markup import card

        rows, features = self.shape
        summary = {
            "site": self.record.site,
            "sae": self.record.sae.name,
            "row": f"{rows:,}",
            "feature": f"{features:,}, of which {int((self.counts == 0).sum()):,} are never active here",
            "active": f"{self.record.entries / max(1, rows):.1f} per row, stored as {self.record.dtype}",
            "labels": f"{len(self.labels):,} features: {', '.join(self.labels.columns) or 'none'}",
            "folder": self.path,
            "store": self.store.path,
        }
        return card("Features", summary)

    def __len__(self) -> int:
        return self.record.rows

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, d_sae)."""
        return self.record.rows, self.record.features

    @property
    def sites(self) -> pd.DataFrame:
        """One line per site that was read: site, layer, and the ids of its features, first to stop - 1.

        The features of a cross-layer transcoder have ids layer by layer: feature j of a layer is first + j. Those of a
        crosscoder read all of its sites.
        """
        lines = [(reading.site, _layer(reading.site), reading.first, reading.stop) for reading in self.record.reads]
        table = pd.DataFrame(lines, columns=["site", "layer", "first", "stop"])
        return table.astype({"layer": "Int64"})

    def __getitem__(self, index: Any) -> csr_array:
        """Returns features as a float32 matrix (selected, d_sae) in memory.

        Args:
            index: A row, a slice, integers in any order (negative ones count from the end), a mask, or `Rows`.

        Raises:
            IndexError: A row that does not exist, or an index of another kind.
        """
        ids = self._row_ids(index)
        starts = self.by_row["indptr"][ids]
        lengths = self.by_row["indptr"][ids + 1] - starts
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        entries = np.repeat(starts - indptr[:-1], lengths) + np.arange(indptr[-1])
        feature = self.by_row["feature"][entries].astype(np.int32)
        if (
            len(feature) and not 0 <= feature.min() <= feature.max() < self.shape[1]
        ):  # SciPy would read beyond its memory
            raise self._damaged(BY_ROW, "a feature beyond the last")
        values = self.by_row["value"][entries].astype(np.float32)
        return csr_array((values, feature, indptr), shape=(len(ids), self.shape[1]))

    def rows_of(self, feature: int | np.integer) -> tuple[Integer[np.ndarray, " active"], Float[np.ndarray, " active"]]:
        """Returns the rows where a feature is active and its activations, largest first, ties in row order.

        Both are views of the file.

        Raises:
            RequestError: A feature that does not exist.
        """
        check_kind("feature", feature, (int, np.integer), "the number of one")
        if not 0 <= feature < self.shape[1]:
            raise RequestError(f"feature {feature} does not exist; the SAE has features 0 to {self.shape[1] - 1}")
        entries = slice(*self.by_feature["indptr"][feature : feature + 2])
        return self.by_feature["row"][entries], self.by_feature["value"][entries]

    def top(
        self,
        feature: int | np.integer,
        k: int = 20,
        context: int = 10,
        where: str | Rows | Bool[np.ndarray, " row"] | None = None,
    ) -> pd.DataFrame:
        """Returns the `k` rows (tokens) with the largest activations of a feature, in context.

        Cost: the first call reads the token table.

        Args:
            feature: Id of the feature.
            k: Number of rows.
            context: Number of tokens of the same sequence to show on either side.
            where: SQL over tokens, `Rows` or a mask. None: all rows.

        Returns:
            Columns activation, row, sequence, position, token, context; largest activation first. Without a tokenizer,
            token ids replace text.

        Raises:
            RequestError: A feature that does not exist, or settings out of range.
        """
        k = whole_number("k", k, at_least=1)
        context = whole_number("context", context, at_least=0)
        rows, values = self.rows_of(feature)
        if where is not None:
            chosen = self._mask(where)[rows]
            rows, values = rows[chosen], values[chosen]
        rows, values = rows[:k], values[:k]
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise self._damaged(BY_FEATURE, "a row beyond the last")
        texts = self.texts
        return pd.DataFrame(
            {
                "activation": values.astype(np.float32),
                "row": rows.astype(np.int64),
                "sequence": texts.sequence[rows],
                "position": texts.position[rows],
                "token": [texts.words[code] for code in texts.codes[rows]],
                "context": [texts.around(int(row), context) for row in rows],
            }
        )

    def page(self, feature: int | np.integer, *, sae: Sae | None = None, k: int = 10, context: int = 20) -> Any:
        """Returns the page of a feature, which the last line of a notebook cell shows, as `feature_card` does.

        Args:
            feature: Id of the feature.
            sae: The SAE that made the features, for promoted tokens and nearest features.
            k: Number of strongest contexts.
            context: Number of tokens on either side.

        Raises:
            RequestError: A feature that does not exist, or another SAE.
        """
        pages = import_module("workbench.pages.feature_page")  # by name: pages are made of features, not these of them
        return pages.feature_card(self, int(feature), sae=sae, k=k, context=context)

    @cached_property
    def counts(self) -> Int64[np.ndarray, " feature"]:
        """Number of rows on which each feature is active, special tokens included; 0: dead on this store."""
        return np.diff(self.by_feature["indptr"])

    @cached_property
    def max(self) -> Float[np.ndarray, " feature"]:
        """Largest activation of each feature; 0 if it is never active."""
        largest, active = np.zeros(self.shape[1], np.float32), self.counts > 0
        largest[active] = self.by_feature["value"][self.by_feature["indptr"][:-1][active]]
        return largest

    @cached_property
    def mean(self) -> Float[np.ndarray, " feature"]:
        """Mean activation of each feature over its active rows; 0 if it has none. Reads every value."""
        return self._sums(lambda entries: self.by_feature["value"][entries]) / np.maximum(self.counts, 1)

    def enrichment(self, where: str | Rows | Bool[np.ndarray, " row"]) -> pd.DataFrame:
        """Returns how well each feature, taken as active or not, detects the rows that a label selects.

        Special tokens are excluded: features of BOS would otherwise lose precision on every label. Cost: reads every
        entry.

        Args:
            where: The label: SQL over tokens, `Rows` or a mask.

        Returns:
            One line per feature, best f1 first, ties by feature: active, its number of rows; hits, those that the label
            selects; precision, hits / active, NaN without active rows; recall, hits / selected; f1, 2 hits / (active +
            selected), 0 to 1; description of labelled features. Null: the precision of a feature active at random is
            the selected share of rows.

        Raises:
            RequestError: A label that selects no row of text, or all of them.
        """
        ordinary = ~self.store.tokens["is_special"].to_numpy(zero_copy_only=False)
        label = self._mask(where) & ordinary
        selected = int(label.sum())
        if not 0 < selected < ordinary.sum():
            name = repr(where) if isinstance(where, str) else "where"
            many = "all" if selected else "none"
            raise RequestError(f"{name} selects {many} of the {int(ordinary.sum())} rows of text; choose another label")
        active = self._sums(lambda entries: ordinary[self.by_feature["row"][entries]]).astype(np.int64)
        hits = self._sums(lambda entries: label[self.by_feature["row"][entries]]).astype(np.int64)
        table = pd.DataFrame(
            {
                "feature": np.arange(self.shape[1]),
                "active": active,
                "hits": hits,
                "precision": np.divide(hits, active, out=np.full(len(hits), np.nan), where=active > 0),
                "recall": hits / selected,
                "f1": 2 * hits / (active + selected),
            }
        )
        return with_names(table.sort_values("f1", ascending=False, kind="stable", ignore_index=True), self.labels)

    def sites_of(self, feature: int | np.integer) -> tuple[str, ...]:
        """Returns the names of the sites that a feature reads: one, or all of a crosscoder's.

        Raises:
            RequestError: A feature that does not exist.
        """
        self.rows_of(feature)
        return tuple(reading.site for reading in self.record.reads if reading.first <= feature < reading.stop)

    def verify(self) -> None:
        """Reads every byte once and raises DataError for a file whose checksum differs."""
        for name, file in self.record.files.items():
            if sha256_file(self.path / name) != file.sha256:
                raise self._damaged(name, "its checksum differs")

    @cached_property
    def by_row(self) -> dict[str, np.ndarray]:
        """The arrays of `by_row_layout`, memory-mapped."""
        return map_arrays(self.path / BY_ROW, self.record.by_row)

    @cached_property
    def by_feature(self) -> dict[str, np.ndarray]:
        """The arrays of `by_feature_layout`, memory-mapped."""
        return map_arrays(self.path / BY_FEATURE, self.record.by_feature)

    @cached_property
    def labels(self) -> pd.DataFrame:
        """Descriptions and scores that `import_labels` saved: index feature, a column each; no columns without any."""
        return load_labels(self.path, self.record.sae.fingerprint, self.shape[1])

    @cached_property
    def texts(self) -> Texts:
        """Texts and positions of the tokens, read at first use."""
        return Texts.of(self.store)

    def _check(self) -> None:
        """Raises for a store that has changed since, and for damaged row pointers."""
        manifest = self.store.manifest
        if self.record.store_fingerprint != manifest.fingerprint:
            rows_then, rows_now = self.record.rows, self.store.rows
            change = (
                f"had {rows_then:,} rows then and has {rows_now:,} now"
                if rows_then != rows_now
                else "is not the one they were made from"
            )
            raise RequestError(
                f"features {self.path.name}: the store {self.store.path} {change}; extract again under another name"
            )
        for name, arrays in ((BY_ROW, self.by_row), (BY_FEATURE, self.by_feature)):
            indptr = arrays["indptr"]
            if indptr[0] != 0 or indptr[-1] != self.record.entries or (indptr[1:] < indptr[:-1]).any():
                raise self._damaged(name, "its indptr does not rise from 0 to the number of entries")

    def _damaged(self, name: str, problem: str) -> DataError:
        return DataError(f"{self.path / name} is damaged: {problem}; extract the features again")

    def _sums(self, values: Callable[[slice], np.ndarray]) -> Float[np.ndarray, " feature"]:
        """Sum of `values(entries)` over each feature's entries; `entries` is a slice of the order by feature."""
        indptr = self.by_feature["indptr"]
        sums = np.zeros(self.shape[1])
        for group in feature_groups(indptr):
            entries = slice(int(indptr[group.start]), int(indptr[group.stop]))
            sums[group] = feature_sums(values(entries).astype(np.float64), self.counts[group])
        return sums

    def _mask(self, where: Any) -> Bool[np.ndarray, " row"]:
        if isinstance(where, str):
            where = self.store.where(where)
        if isinstance(where, Rows):
            mask = np.zeros(len(self), bool)
            mask[where.ids_in(self.store)] = True
            return mask
        check_kind("where", where, (Sequence, np.ndarray, Tensor, pd.Series), "SQL, rows of the store or a mask")
        mask = np.asarray(where.cpu() if isinstance(where, Tensor) else where)
        if mask.dtype != bool:  # numbers would select by place
            raise RequestError(f"where must be SQL, rows of the store or a mask of True and False, not {mask.dtype}")
        if mask.shape != (len(self),):
            raise RequestError(
                f"where: a mask of shape {mask.shape} does not fit {len(self)} rows; give one value per row"
            )
        return mask

    def _row_ids(self, index: Any) -> Int64[np.ndarray, " row"]:
        rows = len(self)
        if isinstance(index, Rows):
            return index.ids_in(self.store)
        if isinstance(index, slice):
            return np.arange(*index.indices(rows))
        ids = np.atleast_1d(index.cpu().numpy() if isinstance(index, Tensor) else np.asarray(index))
        if ids.dtype == bool and ids.shape == (rows,):
            return np.flatnonzero(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise IndexError(f"features are indexed by row: whole numbers, slices, a mask of {rows}, or Rows")
        ids = ids.astype(np.int64)
        if ids.size and not -rows <= ids.min() <= ids.max() < rows:
            raise IndexError(f"row {ids.min() if ids.min() < -rows else ids.max()} is out of range: there are {rows}")
        return np.where(ids < 0, ids + rows, ids)


@dataclass(frozen=True)
class Texts:
    """Columns of the token table as arrays, for fast lookup of contexts."""

    sequence: Int64[np.ndarray, " row"]
    position: Integer[np.ndarray, " row"]
    codes: Integer[np.ndarray, " row"]
    words: list[str]
    """Text of each code."""
    between: str
    """Separator of tokens: empty, or a space if token ids replace text."""

    @classmethod
    def of(cls, store: Store) -> Texts:
        """Returns the texts of a store's tokens."""
        tokens = store.tokens
        token = tokens["token"].combine_chunks()
        sequence, position = (tokens[name].to_numpy() for name in ("sequence", "position"))
        between = "" if store.manifest.model.tokenizer_fingerprint else " "
        return cls(sequence, position, token.indices.to_numpy(), token.dictionary.to_pylist(), between)

    def near(self, row: int, context: int) -> slice:
        """Returns the rows of the same sequence at most `context` tokens away."""
        first = max(row - context, 0)
        near = np.arange(first, min(row + context + 1, len(self.sequence)))
        together = self.position[near] - self.position[row] == near - row  # rows between may not have been chosen
        offsets = np.flatnonzero(together & (self.sequence[near] == self.sequence[row]))
        return slice(first + int(offsets[0]), first + int(offsets[-1]) + 1)

    def around(self, row: int, context: int) -> str:
        """Returns the text of these rows."""
        return self.between.join(self.words[code] for code in self.codes[self.near(row, context)])
