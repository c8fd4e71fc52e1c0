"""The table of a result comes back cell by cell, or a column is refused by name."""

from __future__ import annotations

import datetime
import decimal

import numpy as np
import pandas as pd
import pytest

from workbench.io.errors import RequestError
from workbench.results.tables import read_table, write_table

COLUMNS = {
    "text": ["a", "ü\0", ""],
    "missing text": ["a", None, "b"],
    "float16": np.array([0.5, np.nan, 1], "f2"),
    "uint64": np.array([2**64 - 1, 0, 1], "u8"),
    "flags": [True, False, True],
    "category": pd.Categorical(["a", "b", "a"]),
    "nullable": pd.array([2**60 + 1, None, 3], "Int64"),
    "dates": pd.to_datetime(["2020-01-01", None, "2021-05-05"]),
    "durations": pd.to_timedelta([1, 2, None], "ns"),
    "days": pd.Series([datetime.date(2020, 1, 1), None, None], dtype=object),
    "decimals": pd.Series([decimal.Decimal("1.50"), None, None], dtype=object),
    "integers beside a missing one": pd.Series([2**60 + 1, None, 3], dtype=object),
    "integers as objects": pd.Series([1, 2, 3], dtype=object),
    "flags beside a missing one": pd.Series([True, None, False], dtype=object),
    "bytes": [b"\xff", b"", b"a"],
}


def equal_values(first: object, second: object) -> bool:
    return bool(pd.isna(first) and pd.isna(second)) or first == second


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_comes_back_with_its_type(name):
    table = pd.DataFrame({name: COLUMNS[name]})
    again = read_table(write_table(table))
    assert again[name].dtype == table[name].dtype
    assert [equal_values(a, b) for a, b in zip(again[name], table[name], strict=True)] == [True] * 3


@pytest.mark.parametrize("index", [[5, 7], pd.MultiIndex.from_tuples([(1, "a"), (2, "b")], names=["n", "w"])])
def test_an_index_comes_back(index):
    table = pd.DataFrame({"größe": [1, 2]}, index=index)
    pd.testing.assert_frame_equal(read_table(write_table(table)), table)


def test_a_table_without_columns_comes_back():
    assert read_table(write_table(pd.DataFrame())).shape == (0, 0)


@pytest.mark.parametrize(
    ("cells", "text"),
    [
        ([[1], [2]], r"its cells \(\[1\]\) would be read back as array\(\[1\]\)"),
        ([(1, 2), (3, 4)], "would be read back as array"),
        ([np.arange(3), np.arange(2)], "cannot be saved exactly"),
        ([{"a": 1}, {"b": 2}], "would be read back as {'a': 1, 'b': None}"),
        ([1.5, "a"], "cannot be saved .*one kind a column"),
        ([1j, 2j], "cannot be saved .*one kind a column"),
        ([1, 2**70], "cannot be saved .*one kind a column"),
        ([object(), None], "cannot be saved .*one kind a column"),
    ],
)
def test_a_column_that_parquet_changes_is_refused_by_name(cells, text):
    table = pd.DataFrame({"fine": [1, 2], "odd": pd.Series(cells, dtype=object)})
    with pytest.raises(RequestError, match=r"table\['odd'\] " + ".*" + text) as caught:
        write_table(table)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (pd.DataFrame({1: [1]}), "the column name 1 is a int; name each column once, as text"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "the column name 'a' occurs twice"),
        (pd.DataFrame({"a": [1, 2]}, index=["x", 1]), "the index of table cannot be saved"),
    ],
)
def test_names_and_indexes_that_parquet_lacks_are_refused(table, text):
    with pytest.raises(RequestError, match=text):
        write_table(table)
