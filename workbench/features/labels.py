"""Labels of features: descriptions and scores, saved beside the features and shown wherever a feature is named."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.io.errors import DataError, RequestError
from workbench.io.parse import check_checksum, parse, read_json, to_checked_json
from workbench.io.saving import save_text

LABELS = "labels.json"
_FORMAT, _VERSION = "workbench.feature_labels", 1
_AGAIN = "remove it and import the labels again"
_NAMES = ("description", "explanation", "label", "name")
"""Columns that say in words what a feature stands for; the first that is there is shown."""


@dataclass(frozen=True)
class _Column:
    name: str
    source: str
    """Name of the file that it was imported from."""
    values: tuple[Any, ...]
    """Text or a number for each labelled feature; null: none."""


@dataclass(frozen=True)
class _Record:
    """`labels.json`: one value per labelled feature in each column."""

    sae: str
    """Fingerprint of the autoencoder that the features are of."""
    feature: tuple[int, ...]
    columns: tuple[_Column, ...]
    format: str = _FORMAT
    version: int = _VERSION


def load_labels(folder: Path, sae: str, features: int) -> pd.DataFrame:
    """Returns the saved labels of the features in `folder`: index feature, ascending; no columns if there are none.

    `attrs["sources"]` has the name of the file that each column was imported from.

    Args:
        folder: Folder of the features.
        sae: Fingerprint of their autoencoder.
        features: Number of features of the autoencoder.

    Raises:
        DataError: A damaged file.
        RequestError: Labels of another autoencoder, or of a newer version.
    """
    path = folder / LABELS
    if not os.path.lexists(path):
        return labels_table({}, {})
    record = _read(path)
    if record.sae != sae:
        raise RequestError(f"{path}: these labels are of another SAE; {_AGAIN}")
    if record.feature and not 0 <= min(record.feature) <= max(record.feature) < features:
        raise DataError(f"{path} names a feature beyond the last; {_AGAIN}")
    values = {column.name: dict(zip(record.feature, column.values, strict=True)) for column in record.columns}
    return labels_table(values, {column.name: column.source for column in record.columns})


def save_labels(folder: Path, sae: str, table: pd.DataFrame) -> None:
    """Replaces the saved labels of the features in `folder` by `table`, of the form that `load_labels` returns."""
    sources = table.attrs["sources"]
    columns = (_Column(name, sources[name], tuple(map(_plain, table[name].tolist()))) for name in table.columns)
    record = _Record(sae, tuple(map(int, table.index)), tuple(columns))
    save_text(folder / LABELS, to_checked_json(record))


def labels_table(columns: Mapping[str, Mapping[int, Any]], sources: Mapping[str, str]) -> pd.DataFrame:
    """Returns values by column and feature as a table; numbers where all values are numbers, else text."""
    features = sorted({feature for values in columns.values() for feature in values})
    index = pd.Index(features, dtype="int64", name="feature")
    table = pd.DataFrame(index=index)
    for name, values in columns.items():
        cells = [values.get(feature) for feature in features]
        known = [cell for cell in cells if cell is not None]
        numbers = bool(known) and all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in known)
        texts = [None if cell is None else str(cell) for cell in cells]
        table[name] = pd.Series(cells, index, dtype="float64") if numbers else pd.Series(texts, index, dtype=object)
    table.attrs["sources"] = dict(sources)
    return table


def _read(path: Path) -> _Record:
    value = read_json(path, _AGAIN)
    if value.get("format") != _FORMAT:
        raise DataError(f"{path}: format is {value.get('format')!r}, expected {_FORMAT!r}; {_AGAIN}")
    if isinstance(value.get("version"), int) and value["version"] > _VERSION:
        raise RequestError(f"{path} has format version {value['version']}; upgrade the workbench")
    check_checksum(value, path, _AGAIN)
    record = parse(_Record, value, str(path))
    if any(len(column.values) != len(record.feature) for column in record.columns):
        raise DataError(f"{path}: a column has not one value per feature; {_AGAIN}")
    if list(record.feature) != sorted(set(record.feature)):
        raise DataError(f"{path}: its features do not ascend; {_AGAIN}")
    if any(isinstance(cell, dict | list) for column in record.columns for cell in column.values):
        raise DataError(f"{path}: a value is neither text nor a number; {_AGAIN}")
    return record


def _plain(value: Any) -> Any:
    """A value as JSON knows it; NaN and infinite numbers are missing."""
    value = value.item() if hasattr(value, "item") else value
    return None if value is pd.NA or (isinstance(value, float) and not math.isfinite(value)) else value


# ---- names ------------------------------------------------------------------------------------------------


def names_of(labels: pd.DataFrame) -> dict[int, str]:
    """Returns the words for each labelled feature: its description, or the first column of text."""
    texts = [name for name in labels.columns if any(isinstance(value, str) for value in labels[name].tolist())]
    column = next((name for name in _NAMES if name in texts), texts[0] if texts else None)
    if column is None:
        return {}
    cells = zip(labels.index.tolist(), labels[column].tolist(), strict=True)
    return {feature: text for feature, text in cells if isinstance(text, str)}


def with_names(
    table: pd.DataFrame, labels: pd.DataFrame, column: str = "feature", into: str = "description"
) -> pd.DataFrame:
    """Returns a table of features with their words in one more column after the others; unchanged without labels.

    A cell of several features gets the words of those that have some, as "days of the week (17); months (40)".
    """
    names = names_of(labels)
    if not names:
        return table

    def words(cell: Any) -> str | None:
        if isinstance(cell, tuple):
            return "; ".join(f"{names[feature]} ({feature})" for feature in cell if feature in names) or None
        return None if cell is pd.NA else names.get(cell)

    return table.assign(**{into: pd.Series(list(map(words, table[column].tolist())), table.index, dtype=object)})


def title_of(feature: int, labels: pd.DataFrame) -> str:
    """Returns the feature's number, words and scores as one line: "feature 17: days of the week (fuzz_f1 0.91)"."""
    names = names_of(labels.loc[labels.index == feature])
    values = labels.loc[feature] if feature in labels.index else {}
    numbers = [f"{name} {value:.3g}" for name, value in values.items() if _is_number(value)]
    scores = f" ({', '.join(numbers)})" if numbers else ""
    return f"feature {feature}{f': {names[feature]}' if feature in names else ''}{scores}"


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool | str) and value is not None and math.isfinite(value)
