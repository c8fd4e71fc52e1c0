"""Tests of the token tables of segments as Parquet files."""

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_example import token_table, write_store

from workbench.io.errors import RequestError
from workbench.store.token_table import check_tokens, encode_tokens


def test_token_tables_open_with_pandas(tmp_path):
    path = write_store(tmp_path / "x.acts", [[3, 2]])
    frame = pd.read_parquet(path / "segments" / "00000" / "tokens.parquet")
    assert frame["token"].tolist() == [" Monday", "日", "%", "", "🙂"]
    assert frame["row"].tolist() == [0, 1, 2, 3, 4]
    assert frame["char_start"].isna().tolist() == [True, False, False, True, False]


def test_token_tables_are_small_and_their_bytes_repeat():
    table = token_table([256] * 200)
    assert encode_tokens(table) == encode_tokens(token_table([256] * 200))
    assert len(encode_tokens(table)) < 2 * table.num_rows
    assert pq.read_table(pa.BufferReader(encode_tokens(table))).equals(table)


def test_a_table_with_other_columns_is_refused():
    table = token_table([3])
    check_tokens(table, 3, 0, None)
    with pytest.raises(
        RequestError, match=r"the token table's columns are row int64, .*; those of its part are row int64"
    ):
        check_tokens(table.drop_columns("source"), 3, 0, table.schema)
    with pytest.raises(RequestError, match="the token table's columns are sequence int64"):
        check_tokens(table.drop_columns("row"), 3, 0, None)
    for rows, first in [(4, 0), (3, 1)]:
        with pytest.raises(RequestError, match=f"must count its rows {first} to {first + rows - 1} without a gap"):
            check_tokens(table, rows, first, None)
