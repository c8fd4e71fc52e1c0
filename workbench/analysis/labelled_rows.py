"""Labels of tokens for probes: a column as classes, rows divided by document, and the controls of Hewitt & Liang."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int, Int64

from workbench.analysis.rows import split_by_document
from workbench.corpus.places import NEXT, PLACE_SCHEMA
from workbench.features.queries import coded_labels, label_columns, text_rows
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.store.reader import Store
from workbench.store.token_table import COLUMNS

_USES = "to train on, to choose the penalty by and to test on"


@dataclass(frozen=True)
class LabelledRows:
    """Tokens with a label: those to train on first, then those to choose settings on, then those to test on."""

    label: str
    """Name of the column."""
    values: tuple[str, ...]
    """Values of the label, as text, in ascending order."""
    rows: Int64[np.ndarray, " row"]
    codes: Int64[np.ndarray, " row"]
    """Index of each row's value."""
    document: Int64[np.ndarray, " row"]
    token_id: Int64[np.ndarray, " row"]
    training: int
    """Number of rows to train on."""
    validation: int
    """Number of rows to choose settings on."""
    notes: tuple[str, ...]
    """What was left out, as phrases."""

    @property
    def fitted(self) -> int:
        """Number of rows before the test rows: the whole training part."""
        return self.training + self.validation

    @property
    def test_document(self) -> Int64[np.ndarray, " test_row"]:
        """The document of each test row."""
        return self.document[self.fitted :]


def labelled_rows(
    store: Store,
    label: str | None,
    selected: Int[np.ndarray, " row"],
    *,
    least: int,
    most: int,
    row_limit: int,
    held_out: float,
    seed: int,
) -> LabelledRows:
    """Returns the selected tokens of text that have a value of `label`, divided by document.

    Args:
        store: The recorded activations.
        label: A column of texts, integers or booleans. None: the first one that describes the texts.
        selected: Ids of the rows to choose among; special tokens and rows without a value are left out.
        least: Smallest number of tokens of a value.
        most: Largest number of values: the most frequent ones.
        row_limit: Largest number of rows, drawn at random.
        held_out: Share of the documents to test on; half as many choose settings.
        seed: Random seed of the draw and of the split.

    Raises:
        RequestError: No such column, one of another type, fewer than two values in both training and test documents,
            or fewer than three documents.
    """
    label, column = _column(store, label)
    text = text_rows(store) & np.isin(np.arange(store.rows), selected)
    _, values, codes = coded_labels(label, column, text, least)
    notes, order = [], np.argsort(-np.bincount(codes[codes >= 0], minlength=len(values)), kind="stable")
    if len(order) > most:
        notes.append(f"{most} most frequent of {len(order)} values of {label} used; raise `most` for more")
    codes = np.where(np.isin(codes, order[:most]), codes, -1)
    rows = np.flatnonzero(codes >= 0)
    if len(rows) > row_limit:
        notes.append(f"{row_limit:,} of {counted(len(rows), 'token')} used, drawn at random")
        rows = np.sort(np.random.default_rng(seed).choice(rows, row_limit, replace=False))
    if len(order) < 2:
        tokens = f"{least} tokens or more, and not all, of the {int(text.sum()):,} selected tokens of text"
        raise RequestError(f"label {label!r} has {len(order)} values with {tokens}; two are needed")
    codes, document = codes[rows], store.tokens["document"].to_numpy()[rows]
    parts = split_by_document(document, held_out, purpose="a linear probe", uses=_USES, seed=seed)
    usable = sorted(_usable(label, codes, parts), key=lambda value: values[value])
    if dropped_count := len(np.unique(codes)) - len(usable):
        notes.append(f"{dropped_count} values of {label} left out: not in both training and test documents")
    usable_rows = [np.flatnonzero(part & np.isin(codes, usable)) for part in parts]
    index, new_codes = np.concatenate(usable_rows), np.full(len(values), -1)
    new_codes[usable] = np.arange(len(usable))
    return LabelledRows(
        label,
        tuple(str(values[value]) for value in usable),
        rows[index],
        new_codes[codes[index]],
        document[index].astype(np.int64),
        store.tokens["token_id"].to_numpy()[rows[index]].astype(np.int64),
        len(usable_rows[0]),
        len(usable_rows[1]),
        tuple(notes),
    )


def _usable(label: str, codes: np.ndarray, parts: Sequence[np.ndarray]) -> list[int]:
    """Values that are in the training and in the test documents."""
    values = np.unique(codes).tolist()
    training, validation, test = parts
    usable = [value for value in values if all((codes[part] == value).any() for part in (training, test))]
    advice = "record more documents of each, or change seed or held_out"
    if len(usable) < 2:
        raise RequestError(
            f"label {label!r}: {len(usable)} of its {len(values)} values is in both training and test documents; "
            f"two are needed: {advice}"
        )
    if not np.isin(codes[validation], usable).any():
        raise RequestError(f"label {label!r} has no value in the documents that choose the penalty; {advice}")
    return usable


def _column(store: Store, label: str | None) -> tuple[str, pa.Array]:
    """Name and values of a label."""
    kinds = {field.name: field.type for field in store.tokens.schema}
    computed = {*COLUMNS.names, *PLACE_SCHEMA.names, NEXT}
    described = [name for name in kinds if name not in computed and not name.endswith("_span")]
    if label is None:
        category_columns = [name for name in described if _is_category(kinds[name])]
        varied = (name for name in category_columns if len(store.tokens[name].unique().drop_null()) > 1)
        label = next(varied, None)
        if label is None:
            raise RequestError(
                "label is needed: no column of the texts has two values; name a column of "
                f"{', '.join(kinds)}, or record texts with one"
            )
    column = label_columns(store, label)[label]
    if not _is_category(column.type):
        raise RequestError(f"label {label!r} has values of type {column.type}; texts, integers or booleans are needed")
    return label, column


def _is_category(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_category(kind.value_type)
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean)
    return any(test(kind) for test in tests)


def shuffle_labels(
    codes: Int[np.ndarray, " row"],
    document: Int[np.ndarray, " row"],
    parts: Sequence[Bool[np.ndarray, " row"]],
    draw: np.random.Generator,
) -> tuple[str, Int[np.ndarray, " row"]]:
    """Returns what is permuted, "documents" or "tokens", and the permuted labels.

    Where every document has one value, whole documents change places, else tokens; always within one of `parts`, so
    that each part keeps its tokens per value, or its documents per value.

    Args:
        codes: Index of each row's value; -1: none.
        document: Number of each row's document, from 0.
        parts: Masks of the rows of each part; rows of none keep their label.
        draw: Random numbers.
    """
    permuted = codes.copy()
    text = np.any(parts, axis=0)
    documents = int(document.max()) + 1
    low, high = np.full(documents, np.iinfo(np.int64).max), np.full(documents, -2)
    np.minimum.at(low, document[text], codes[text])
    np.maximum.at(high, document[text], codes[text])
    whole = bool((low[high > -2] == high[high > -2]).all())
    for part in parts:
        if whole:
            places = np.unique(document[part])
            permutation = np.arange(documents)
            permutation[places] = draw.permutation(places)
            permuted[part] = high[permutation[document[part]]]
        else:
            permuted[part] = draw.permutation(codes[part])
    return ("documents" if whole else "tokens"), permuted


def control_task(
    token_id: Int[np.ndarray, " row"], codes: Int[np.ndarray, " training_row"], draw: np.random.Generator
) -> Int64[np.ndarray, " row"]:
    """Returns the control task of Hewitt & Liang 2019: one random value for each token id, the same in every context.

    Args:
        token_id: Token id of each row.
        codes: Values of the training rows, from whose frequencies the random ones are drawn.
        draw: Random numbers.
    """
    kinds, index = np.unique(token_id, return_inverse=True)
    return draw.choice(codes, size=len(kinds)).astype(np.int64)[index]
