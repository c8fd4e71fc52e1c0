"""Tests of metadata columns from texts to queries: types, missing values, names, parts with other columns."""

from __future__ import annotations

import tempfile
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_example import BYTE_LEVEL, table
from store_example import SITES, part_of, seal, values, write_store, writing

from workbench.corpus.layout import Layout, plan_sequences
from workbench.corpus.sources import read_documents
from workbench.corpus.tokenizer import AddedTokens
from workbench.io.errors import RequestError
from workbench.store.new_columns import check_new_columns
from workbench.store.reader import Store, open_store
from workbench.store.sql_names import SqlNames


def write(path: Path, columns, *, per_segment: int | None = None, append: bool = False) -> Store:
    """Writes a store of documents of one token each, document i with the i-th value of each column."""
    count = len(next(iter(columns.values())))
    texts = [{"text": "a", **{name: column[i] for name, column in columns.items()}} for i in range(count)]
    with writing(path) as writer, tempfile.TemporaryDirectory() as folder:
        sequences = plan_sequences(read_documents(texts), BYTE_LEVEL, Layout(8, AddedTokens()), folder)
        before, size = writer.manifest.rows, per_segment or count
        check_new_columns(path, writer.manifest, len(writer.manifest.parts), sequences)
        writer.begin(part_of([[1]] * count), append=append)
        for first in range(0, count, size):
            last = min(first + size, count)
            offsets = {f"{name}_offset": before for name in ("row", "sequence", "document")}
            tokens = table(sequences, first=first, last=last, **offsets)
            with writer.segment(last - first, last - first, "", tokens) as segment:
                for site in SITES:
                    segment.write(site.name, 0, values(site, before + first, last - first))
    return open_store(path)


def documents(store: Store, condition: str) -> list[int]:
    return store.where(condition).ids.tolist()


def test_the_answer_of_a_query_does_not_depend_on_the_segments(tmp_path):
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=40).round(1)
    numbers[rng.random(40) < 0.4] = np.nan
    numbers[3], numbers[30] = np.inf, -np.inf
    columns = {"score": numbers, "word": [None if x != x else "xy"[int(x > 0)] for x in numbers]}
    stores = [write(tmp_path / f"{size}", columns, per_segment=size) for size in (40, 7, 1)]
    with np.errstate(invalid="ignore"):
        truth = {
            "score < 0.5": numbers < 0.5,
            "score >= -0.2": numbers >= -0.2,
            "score BETWEEN 0 AND 1": (numbers >= 0) & (numbers <= 1),
            "NOT score < 0": numbers >= 0,
            "score IS NULL": np.isnan(numbers),
            "score = 'inf'": numbers == np.inf,
            "word = 'y'": numbers > 0,
        }
    for condition, mask in truth.items():
        for store in stores:
            assert documents(store, condition) == np.flatnonzero(mask).tolist(), (condition, store.path)


ID = 1413617112501850121


@pytest.mark.parametrize(
    ("column", "kind", "expected"),
    [
        ([ID, float("nan"), ID + 2], pa.int64(), [ID, None, ID + 2]),
        ([2**64 - 1, 0, None], pa.uint64(), [2**64 - 1, 0, None]),
        ([-(2**63), 2**63 - 1], pa.int64(), [-(2**63), 2**63 - 1]),
        ([-1, 2**63], pa.decimal128(38, 0), [Decimal(-1), Decimal(2**63)]),
        ([10**40, 1], pa.string(), [str(10**40), "1"]),
        ([2**53, 0.5], pa.float64(), [2.0**53, 0.5]),
        ([np.int8(3), np.float32(0.5), np.float16("nan")], pa.float64(), [3.0, 0.5, None]),
        ([np.bool_(True), None], pa.bool_(), [True, None]),
        ([Decimal("1.10"), Decimal("-2.345")], pa.decimal128(4, 3), [Decimal("1.1"), Decimal("-2.345")]),
        ([Decimal("1E+3"), 7], pa.decimal128(4, 0), [Decimal(1000), Decimal(7)]),
        ([pd.NA, "x", pd.NaT, None], pa.string(), [None, "x", None, None]),
        ([pd.NA, 3], pa.int64(), [None, 3]),
        ([date(2020, 2, 29), None], pa.date32(), [date(2020, 2, 29), None]),
        ([pd.Timestamp("2020-01-02 03:04:05"), pd.NaT], pa.timestamp("us"), [datetime(2020, 1, 2, 3, 4, 5), None]),
        ([np.datetime64("2020-01-02"), np.datetime64("NaT")], pa.date32(), [date(2020, 1, 2), None]),
        ([np.datetime64("2020-01-02T00:00:00", "ns")], pa.timestamp("us"), [datetime(2020, 1, 2)]),
        ([pd.Timestamp("2020-01-02 00:00:00.000000007")], pa.string(), ["2020-01-02 00:00:00.000000007"]),
        (
            [datetime(2020, 1, 2, tzinfo=timezone(timedelta(hours=5)))],
            pa.timestamp("us", "UTC"),
            [datetime(2020, 1, 1, 19, tzinfo=UTC)],
        ),
        ([time(3, 4), None], pa.time64("us"), [time(3, 4), None]),
        ([date(2020, 1, 2), "soon"], pa.string(), ["2020-01-02", "soon"]),
        ([True, 1, "x"], pa.string(), ["true", "1", "x"]),
        ([{"a": float("nan"), 1: np.arange(2)}, (pd.NA, {1})], pa.string(), ['{"a":null,"1":[0,1]}', "[null,[1]]"]),
        ([None, float("nan")], pa.null(), [None, None]),
    ],
)  # fmt: skip
def test_a_value_is_stored_exactly_or_as_text(column, kind, expected, tmp_path):
    store = write(tmp_path / "s", {"x": column}, per_segment=1)
    actual = store.tokens.schema.field("x").type
    assert (actual.value_type if pa.types.is_dictionary(actual) else actual) == kind
    assert store.tokens["x"].to_pylist() == expected
    present = [i for i, value in enumerate(expected) if value is not None]
    assert documents(store, "x IS NOT NULL") == present
    assert store.where("x IS NULL").tokens.schema == store.tokens.schema


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([2**53 + 1, 0.5], "document 1: column 'x' holds whole numbers and floats such as 9007199254740993; no type"),
        ([0.5, None, -(2**60)], "document 2: column 'x' holds whole numbers and floats such as -11529215046068469"),
        ([Decimal("0.1"), 0.5], "document 1: column 'x' holds floats and decimals; no type of number holds both"),
        ([1, 10**5000], "document 1 (texts[1]): column 'x' holds a number of more than 4,000 digits; give it as a"),
    ],
)
def test_numbers_that_no_type_holds_together_are_refused_by_name(column, message, tmp_path):
    with pytest.raises(RequestError) as caught:
        write(tmp_path / "s", {"x": column})
    assert str(caught.value).startswith(message)


def test_a_container_that_holds_itself_is_refused(tmp_path):
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(
        RequestError, match=r"^document 0 .*: column 'x' holds a value that is nested too deeply or hol"
    ):
        write(tmp_path / "s", {"x": [endless]})


NAMES = [
    "group",
    "order",
    "select",
    "end",
    "user",
    "current_date",
    "rowid",
    "filename",
    "a.b",
    'q"x',
    " ",
    "1st",
    "ß",
    "a\nb",
]


def test_every_name_works_in_quotes_and_none_is_answered_wrongly_without(tmp_path):
    store = write(tmp_path / "s", {name: [6, 7, 8] for name in NAMES})
    for name in NAMES:
        quoted = '"' + name.replace('"', '""') + '"'
        assert documents(store, f"{quoted} = 7") == [1]
        if name in ("group", "order", "select", "end"):
            with pytest.raises(RequestError, match=f"; write {quoted} in double quotes$"):
                store.where(f"{name} = 7")
        elif name in ("user", "current_date", "rowid", "filename", "ß"):
            assert documents(store, f"{name} = 7") == [1]


def test_names_that_differ_by_case_are_different_columns(tmp_path):
    columns = {
        "Position": [7, 8, 9],
        "Tag": [1, 2, 3],
        "tag": [3, 1, 2],
        "tag 2": [0, 0, 5],
        "Ä": [1, 2, 3],
        "ä": [3, 1, 2],
    }
    store = write(tmp_path / "s", columns, per_segment=2)
    frame = store.tokens.to_pandas()
    for name, column in columns.items():
        assert frame[name].tolist() == column
        for value in set(column):
            assert documents(store, f'"{name}" = {value}') == [i for i, x in enumerate(column) if x == value]
    assert documents(store, "Tag = 2 AND tag=1 or Position>8 and position = 0 and Token IN ('a')") == [1, 2]
    assert documents(store, "token = 'Tag' or \"Tag\" = 3") == [2], "text is no name"
    with pytest.raises(RequestError, match=r"^query 'TAG = 1': 'TAG' is neither of the columns 'Tag' and 'tag'"):
        store.where("TAG = 1")


def test_sql_names_never_coincide():
    names = SqlNames(["a", "A", "a 2", "A 2", "b", "B", "B 2"])
    spelled = {names.quoted(name).lower() for name in names.names}
    assert len(spelled) == 7
    assert not SqlNames(["ä", "Ä"]).differ


@pytest.mark.parametrize("name", ["", "TRUE", "false", "Null", "a\0b", "token", "char_end"])
def test_a_name_that_no_query_could_use_is_refused(name):
    with pytest.raises(RequestError, match=r"^texts\[0\]: a metadata column cannot be called .*; rename it, or name"):
        list(read_documents([{"text": "a", name: 1}]))


def test_a_part_may_lack_columns_and_whole_numbers_become_floats_beside_floats(tmp_path):
    path = tmp_path / "s"
    write(path, {"score": [1, 2], "tag": [None, None], "first": ["x", "y"]})
    write(path, {"score": [0.5, None], "tag": ["b", None], "new": [date(2020, 1, 1), None]}, append=True)
    store = write(path, {"new": [None], "score": [2]}, append=True)
    assert store.tokens.select(["score", "tag", "first", "new"]).to_pydict() == {
        "score": [1.0, 2.0, 0.5, None, 2.0],
        "tag": [None, None, "b", None, None],
        "first": ["x", "y", None, None, None],
        "new": [None, None, date(2020, 1, 1), None, None],
    }
    expected = {"score >= 1": [0, 1, 4], "tag = 'b'": [2], "first IS NULL": [2, 3, 4], "new > '2019-12-31'": [2]}
    assert {condition: documents(store, condition) for condition in expected} == expected
    assert store.where("row = 0").tokens.schema == store.tokens.schema
    assert store.verify().query("severity == 'error'").empty


@pytest.mark.parametrize(
    ("recorded", "added"),
    [
        (["a"], [1]),
        ([1], ["a"]),
        ([2**60], [0.5]),
        ([0.5], [2**60]),
        ([True], [1]),
        ([date(2020, 1, 1)], [datetime(2020, 1, 1)]),
        ([Decimal("0.5")], [0.5]),
    ],
)
def test_a_part_whose_values_do_not_fit_is_refused_and_the_store_is_as_before(recorded, added, tmp_path):
    path = tmp_path / "s"
    store = write(path, {"x": recorded})
    with pytest.raises(RequestError, match=r"^append: column 'x' holds .*, in the store .*, and no type holds all of"):
        write(path, {"x": added}, append=True)
    assert open_store(path).manifest == store.manifest
    assert write(path, {"x": recorded}, append=True).tokens["x"].to_pylist() == 2 * store.tokens["x"].to_pylist()


def test_the_order_in_which_parts_come_does_not_matter(tmp_path):
    kinds = {"null": [None], "int": [2], "float": [0.5], "uint": [2**63], "decimal": [Decimal("1.5")]}
    for left, right in (("null", "int"), ("int", "float"), ("int", "uint"), ("uint", "decimal"), ("null", "decimal")):
        types, values = set(), set()
        for first, second in ((left, right), (right, left)):
            path = tmp_path / f"{first}-{second}"
            write(path, {"x": kinds[first]})
            store = write(path, {"x": kinds[second]}, append=True)
            types.add(store.tokens.schema.field("x").type)
            values.add(tuple(sorted(store.where("x > 1").tokens["x"].to_pylist())))
        assert len(types) == len(values) == 1, (left, right)


def test_not_a_number_in_an_older_store_is_null(tmp_path):
    path = write_store(tmp_path / "s", [[3]])
    file = path / "segments" / "00000" / "tokens.parquet"
    tokens = pq.read_table(file)
    pq.write_table(tokens.append_column("score", pa.array([0.2, float("nan"), 0.4])), file)
    seal(path)
    store = open_store(path)
    assert store.tokens["score"].to_pylist() == [0.2, None, 0.4]
    assert documents(store, "score < 0.5") == [0, 2]
