"""CSV that a spreadsheet shows as it is: text that it would take for a formula begins with an apostrophe."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def csv_text(table: pd.DataFrame) -> str:
    """Returns the CSV of a table without its index.

    Text and column names that begin with = + - @, a tab or a carriage return are prefixed by an apostrophe, because a
    spreadsheet would execute them: a token or a model's name may come from anywhere. Numbers are written as they are.
    """
    plain = table.rename(columns=_neutral)
    for place, kind in enumerate(plain.dtypes):
        if getattr(kind, "kind", "O") not in "biufcmM":
            column = plain.iloc[:, place].astype(object)
            plain.isetitem(place, column.map(_neutral))
    content = plain.to_csv(index=False)
    if "\r" in content:  # which the writer leaves unquoted, and a reader takes for the end of a line
        content = plain.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)
    return content


def _neutral(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
