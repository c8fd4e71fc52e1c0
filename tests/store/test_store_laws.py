"""Laws of a store: random histories against plain NumPy arrays with the same history."""

import contextlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_example import as_numpy, part_of, token_table, values, write_segment, writing

from workbench.store.manifest import SiteRecord
from workbench.store.reader import Rows, Store, open_store

DTYPES = ("float16", "bfloat16", "float32")
sequences = st.lists(st.integers(1, 8), min_size=1, max_size=4)
parts = st.lists(sequences, max_size=4)
sites = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 4), min_size=1, max_size=2)), min_size=1, max_size=3
)


def site_records(drawn) -> list[SiteRecord]:
    return [
        SiteRecord(f"blocks.{i}.hook", f"resid_post.{i}", ("row", "a", "b")[: len(shape) + 1], tuple(shape), dtype)
        for i, (dtype, shape) in enumerate(drawn)
    ]


class StoreHistory(RuleBasedStateMachine):
    """Record, stop half way, resume, append, read: the store holds what a list of arrays would."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "x.acts"
        self.lengths: list[list[int]] = []  # of the committed segments
        self.left: list[list[int]] = []  # segments of the last part not yet committed
        self.part: list[list[int]] = []
        self.parts = 0

    def teardown(self):
        shutil.rmtree(self.folder)

    @initialize(drawn=sites, part=parts, commit=st.integers(0, 4))
    def record(self, drawn, part, commit):
        self.sites = site_records(drawn)
        self._begin(part, commit, append=False)

    @precondition(lambda self: not self.left)
    @rule(part=parts, commit=st.integers(0, 4))
    def append(self, part, commit):
        self._begin(part, commit, append=True)

    @precondition(lambda self: self.left)
    @rule(commit=st.integers(0, 4))
    def resume(self, commit):
        with writing(self.path, sites=self.sites) as store:
            committed = store.begin(part_of(self.part), append=self.parts > 1)
            assert committed == len(self.part) - len(self.left)
            self._commit(store, commit)

    @precondition(lambda self: self.left)
    @rule()
    def fail(self):
        with writing(self.path, sites=self.sites) as store:
            lengths, rows = self.left[0], sum(self.left[0])
            tokens = token_table(lengths, store.manifest.rows, sum(map(len, self.lengths)))
            site = self.sites[0]
            with contextlib.suppress(InterruptedError), store.segment(rows, len(lengths), "", tokens) as segment:
                segment.write(site.name, 0, values(site, store.manifest.rows, rows))
                raise InterruptedError

    def _begin(self, part, commit, append):
        with writing(self.path, sites=self.sites) as store:
            assert store.begin(part_of(part), append=append) == 0
            if append and not part[:commit]:
                return  # the store lists the part with its first segment
            self.part, self.left, self.parts = part, list(part), self.parts + 1
            self._commit(store, commit)

    def _commit(self, store, count):
        for lengths in self.left[:count]:
            write_segment(store, lengths)
            self.lengths.append(lengths)
        self.left = self.left[count:]

    @invariant()
    def holds_what_was_committed(self):
        if not self.parts:
            return
        store, rows = open_store(self.path), sum(map(sum, self.lengths))
        assert (store.rows, store.manifest.complete, len(store.manifest.parts)) == (rows, not self.left, self.parts)
        for site in self.sites:
            assert np.array_equal(as_numpy(store[site.name][:]), values(site, 0, rows))
        flat = [n for lengths in self.lengths for n in lengths]
        if flat:
            expected = token_table(flat)
            assert store.tokens.select(expected.column_names).to_pylist() == expected.to_pylist()
        assert "error" not in set(store.verify()["severity"])


StoreHistory.TestCase.settings = settings(max_examples=15, stateful_step_count=5, deadline=None)
TestStoreHistory = StoreHistory.TestCase

SEGMENTS = [[3, 2], [4], [1], [1, 1, 5], [6]]
ROWS = 23


@pytest.fixture(scope="module")
def read_store(tmp_path_factory) -> Store:
    path = tmp_path_factory.mktemp("stores") / "x"
    records = site_records([(dtype, [3]) for dtype in DTYPES])
    with writing(path, sites=records) as store:
        store.begin(part_of(SEGMENTS), append=False)
        for lengths in SEGMENTS:
            write_segment(store, lengths)
    return open_store(path)


bounds = st.none() | st.integers(-30, 30)
slices = st.builds(slice, bounds, bounds, st.none() | st.integers(-5, 5).filter(bool))
row_ids = st.lists(st.integers(-ROWS, ROWS - 1), max_size=40)


@given(site=st.integers(0, 2), index=slices | row_ids.map(lambda ids: np.array(ids, np.int64)))
def test_reading_equals_indexing_an_array(read_store, site, index):
    array = read_store["resid_post", site]
    assert np.array_equal(as_numpy(array[index]), values(array.site, 0, ROWS)[index])


@given(first=row_ids, second=row_ids)
def test_selections_combine_as_sets(read_store, first, second):
    a, b = (Rows(read_store, np.array([i % ROWS for i in ids], np.int64)) for ids in (first, second))
    left, right = set(a.ids.tolist()), set(b.ids.tolist())
    assert (a & b).ids.tolist() == sorted(left & right)
    assert (a | b).ids.tolist() == sorted(left | right)
    assert (a - b).ids.tolist() == sorted(left - right)
    assert a.tokens["row"].to_pylist() == sorted(left)


@settings(max_examples=30)
@given(low=st.integers(-5, 30), high=st.integers(-5, 30), word=st.sampled_from([" Monday", "it's", "a\0b", "🙂", "x"]))
def test_where_is_a_filter(read_store, low, high, word):
    quoted = word.replace("'", "''")
    rows = read_store.where(f"row BETWEEN {low} AND {high} AND token != '{quoted}'")
    tokens = read_store.tokens["token"].to_pylist()
    assert rows.ids.tolist() == [i for i in range(ROWS) if low <= i <= high and tokens[i] != word]
