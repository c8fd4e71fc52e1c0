"""Text of a CSV is never a formula of a spreadsheet, and numbers stay numbers."""

import csv
import io

import pandas as pd
import pytest

from workbench.io.spreadsheet import csv_text


@pytest.mark.parametrize("dtype", [object, "str", "category"])
@pytest.mark.parametrize("cell", ["=1+1", "+1", "-2", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("x")'])
def test_text_that_begins_as_a_formula_gets_an_apostrophe(cell, dtype):
    table = pd.DataFrame({cell: pd.Series([cell, " =", "a=", None], dtype=dtype), "n": [-1.5, 2, -3, None]})
    lines = list(csv.reader(io.StringIO(csv_text(table), newline="")))
    assert lines == [[f"'{cell}", "n"], [f"'{cell}", "-1.5"], [" =", "2.0"], ["a=", "-3.0"], ["", ""]]
    assert list(table.columns) == [cell, "n"]


def test_numbers_dates_and_flags_are_written_as_they_are():
    table = pd.DataFrame(
        {"i": [-1], "b": [True], "d": pd.to_datetime(["2020-01-01"]), "o": pd.Series([-7], dtype=object)}
    )
    assert csv_text(table) == table.to_csv(index=False)
