"""Table of a result on the disk: Parquet that gives every cell back, or a refusal that names the column."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

from workbench.io.errors import RequestError

if TYPE_CHECKING:
    import pandas as pd


def write_table(table: pd.DataFrame) -> bytes:
    """Returns the Parquet file of a table.

    Raises:
        RequestError: A column whose cells Parquet refuses or changes: lists, several types, integers beyond 64 bits.
    """
    names = list(table.columns)
    if wrong := [name for name in names if not isinstance(name, str) or names.count(name) > 1]:
        reason = "occurs twice" if isinstance(wrong[0], str) else f"is a {type(wrong[0]).__name__}"
        raise RequestError(f"table: the column name {wrong[0]!r} {reason}; name each column once, as text")
    try:
        content = _parquet(table)
    except Exception as error:  # Arrow has a kind for each reason; the column is what the caller can mend
        raise RequestError(_unwritable(table, error)) from error
    read_back = read_table(content)
    for place, name in enumerate(names):
        before, after = table.iloc[:, place], read_back.iloc[:, place]
        if not _equal(before, after):
            raise RequestError(
                f"table[{name!r}] cannot be saved exactly: its cells ({_example(before)}) would be read back as "
                f"{_example(after)}; give numbers, text, dates or None, one kind a column"
            )
    if not read_back.index.equals(table.index):
        raise RequestError("the index of table cannot be saved exactly; make it a column by table.reset_index()")
    return content


def read_table(content: bytes) -> pd.DataFrame:
    """Returns the table of which `write_table` returned the bytes."""
    import pyarrow.parquet as pq

    arrow = pq.read_table(io.BytesIO(content))
    table = arrow.to_pandas(integer_object_nulls=True)  # or integers beside a missing one become floats
    known = json.loads((arrow.schema.metadata or {}).get(b"pandas", b"{}")).get("columns", [])
    for column in known:
        name = column["name"]
        if column["numpy_type"] == "object" and name in table.columns and table[name].dtype != object:
            table[name] = table[name].astype(object)
    return table


def _parquet(table: pd.DataFrame) -> bytes:
    file = io.BytesIO()
    table.to_parquet(file)
    return file.getvalue()


def _unwritable(table: pd.DataFrame, error: Exception) -> str:
    for name in table.columns:
        try:
            _parquet(table.loc[:, [name]].reset_index(drop=True))
        except Exception as of_column:
            reason = " ".join(str(of_column.args[0] if of_column.args else of_column).split())[:120]
            return f"table[{name!r}] cannot be saved ({reason}); give numbers, text, dates or None, one kind a column"
    return f"the index of table cannot be saved ({str(error)[:120]}); make it a column by table.reset_index()"


def _equal(first: pd.Series, second: pd.Series) -> bool:
    """Equality of type and cells; missing values of objects are all the same, and lists are never."""
    if first.dtype != second.dtype:
        return False
    missing = first.isna()
    if not missing.equals(second.isna()):
        return False
    if first.dtype != object:
        return first.equals(second)
    pairs = zip(first[~missing], second[~missing], strict=True)
    return all((isinstance(a, str | bytes) or not hasattr(a, "__len__")) and a == b for a, b in pairs)


def _example(column: pd.Series) -> str:
    cells: Any = column.dropna()
    return repr(cells.iloc[0])[:60] if len(cells) else f"{column.dtype}"
