"""Tests of the reader: many segments as one array, tensors that own their memory, rows selected by a query."""

import inspect
import multiprocessing
import os
import pickle
import threading
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from forks import fork_context
from refusals import refused
from store_example import (
    BRAIN,
    HALF,
    SINGLE,
    SITES,
    WORDS,
    as_numpy,
    part_of,
    token_table,
    values,
    write_segment,
    write_store,
    writing,
)

from workbench.io.errors import DataError, RequestError
from workbench.store.manifest import read_manifest
from workbench.store.maps import SiteMaps
from workbench.store.query import query_tokens, select_rows
from workbench.store.reader import Rows, Store, open_store

SEGMENTS = [[3, 2], [4], [1, 1, 5], [6]]
ROWS = 22


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return open_store(write_store(tmp_path_factory.mktemp("stores") / "x.acts", SEGMENTS))


# ---- arrays -----------------------------------------------------------------------------------------------

INDICES = {
    "all": slice(None),
    "within a segment": slice(6, 8),
    "across segments": slice(3, 17),
    "from the end": slice(-4, None),
    "empty": slice(9, 4),
    "strided": slice(1, 20, 3),
    "backwards": slice(None, None, -2),
    "beyond": slice(15, 99),
    "integer": 7,
    "numpy integer": np.int32(-1),
    "list": [21, 0, 9, 9, -1],
    "empty list": [],
    "int16": np.array([5, 4, 3], np.int16),
    "unsigned": np.array([5, 20], np.uint8),
    "matrix": np.array([[0, 21], [8, -22]]),
    "torch": torch.tensor([20, 3]),
    "mask": np.arange(ROWS) % 3 == 0,
    "torch mask": torch.arange(ROWS) % 5 == 0,
}


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.dtype)
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_indexing_equals_numpy_indexing(store, site, index):
    expected = values(site, 0, ROWS)[np.array(index, int) if isinstance(index, list) else index]
    read = store[site.name][index]
    assert read.dtype == getattr(torch, site.dtype)
    assert read.shape == expected.shape
    assert np.array_equal(as_numpy(read), expected)


def test_an_array_has_a_description(store):
    array = store["pattern", 1]
    assert (array.name, array.axes, array.shape) == (BRAIN.name, ("row", "head", "key"), (22, 2, 4))
    assert (array.dtype, len(array)) == (torch.bfloat16, 22)
    assert repr(array) == "pattern.1 (row 22, head 2, key 4) bfloat16"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (22, "row 22 is out of range: resid_post.0 has 22 rows"),
        (-23, "row -23 is out of range: resid_post.0 has 22 rows"),
        ([0, 99], "row 99 is out of range: resid_post.0 has 22 rows"),
        ([-99, 0], "row -99 is out of range: resid_post.0 has 22 rows"),
        ([True] * 4, "a mask of shape (4,) does not select among the 22 rows of resid_post.0"),
        ([1.0], "rows of resid_post.0 are selected by integers, slices, masks or Rows, not float64 values"),
        ((0, 1), "resid_post.0 is indexed by rows alone: write array[rows][:, ...] for the other axes"),
    ],
)
def test_an_index_that_selects_no_row_is_refused(store, index, message):
    assert refused(IndexError, lambda: store["resid_post.0"][index]) == message


def test_edits_of_tensors_never_reach_the_store(store):
    for index in (slice(None), slice(4, 5), 3, [1, 2], slice(None, None, 2)):
        store["resid_post", 0][index].fill_(99)
    next(store["resid_post", 0].blocks())[1].fill_(99)
    store.where("true")["resid_post", 0].fill_(99)
    assert np.array_equal(store["resid_post", 0][:], values(HALF, 0, ROWS))
    assert np.array_equal(open_store(store.path)["resid_post", 0][:], values(HALF, 0, ROWS))
    with pytest.raises(ValueError, match="read-only"):
        store["resid_post", 0].view(0)[0] = 99


@pytest.mark.parametrize("rows", [1, 4, 22, 8192])
def test_blocks_are_the_array_in_pieces(store, rows):
    pieces = list(store["resid_post", 1].blocks(rows))
    assert [piece for piece, _ in pieces] == [slice(i, min(i + rows, ROWS)) for i in range(0, ROWS, rows)]
    assert np.array_equal(torch.cat([block for _, block in pieces]), values(SINGLE, 0, ROWS))


def test_a_segment_is_viewed_without_a_copy(store):
    view = store["pattern", 1].view(2)
    assert np.array_equal(view, values(BRAIN, 9, 7))
    assert store["pattern", 1].view(2).__array_interface__["data"] == view.__array_interface__["data"]


def test_numpy_gets_all_rows(store):
    assert np.array_equal(np.asarray(store["resid_post", 0]), values(HALF, 0, ROWS))
    brain = (values(BRAIN, 0, ROWS).astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(np.asarray(store["pattern", 1]), brain)
    assert np.asarray(store["resid_post", 0]).dtype == np.float16  # as stored, not four times as large
    assert np.asarray(store["pattern", 1]).dtype == np.float32
    assert np.asarray(store["resid_post", 0], np.float64).dtype == np.float64
    with pytest.raises(ValueError, match=r"resid_post.0 is not in memory and cannot become an array without a copy"):
        np.array(store["resid_post", 0], copy=False)


def test_more_segments_than_may_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.store.reader._OPEN_MAPS", 6)
    store = open_store(write_store(tmp_path / "x", [[2]] * 5))
    for _ in range(2):
        for site in SITES:
            assert np.array_equal(as_numpy(store[site.name][[9, 0, 4]]), values(site, 0, 10)[[9, 0, 4]])
    assert store._maps.cache_info().currsize == 1


def test_reading_holds_no_file_open(store):
    before = len(os.listdir("/proc/self/fd"))
    fresh = open_store(store.path)
    arrays = [fresh[site.name] for site in SITES]
    copy = [array.view(segment) for array in arrays for segment in range(4)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(copy) == 12


def test_a_file_that_contradicts_the_manifest_is_refused(tmp_path):
    path = write_store(tmp_path / "x", [[3], [2]])
    file = path / "segments" / "00001" / "resid_post.0.safetensors"
    file.write_bytes((path / "segments" / "00000" / "resid_post.0.safetensors").read_bytes())
    message = refused(DataError, lambda: open_store(path)["resid_post", 0][:])
    assert message == (
        f"{file} holds (3, 3) float16, the manifest has (2, 3) float16; run workbench verify on its store"
    )
    file.unlink()
    message = refused(DataError, lambda: open_store(path)["resid_post", 0][:])
    assert message == f"{file} cannot be read: No such file or directory; run workbench verify on its store"


def test_a_gather_never_leaves_the_maps(store):
    files = [store.path / "segments" / segment.name / HALF.file for segment in store.manifest.segments]
    maps = SiteMaps(files, store.manifest.starts, HALF.shape, HALF.dtype)
    for ids in ([-1], [22], [0, 1 << 40]):
        assert "are not within 0 to 21" in refused(IndexError, lambda ids=ids: maps.gather(np.array(ids)))


def test_threads_may_share_an_array(store):
    expected, wrong = values(HALF, 0, ROWS), []
    for _ in range(20):
        array = open_store(store.path)["resid_post", 0]
        barrier = threading.Barrier(4)

        def read(seed, array=array, barrier=barrier):
            ids = np.random.default_rng(seed).integers(0, ROWS, 50)
            barrier.wait()
            if not np.array_equal(array[ids], expected[ids]):
                wrong.append(seed)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# ---- stores -----------------------------------------------------------------------------------------------


def test_a_site_has_three_names(store):
    for site in (("resid_post", 1), "resid_post.1", "blocks.1.hook_resid_post"):
        assert store[site].site == SINGLE
    assert (len(store), store.rows, store.sites) == (ROWS, ROWS, SITES)
    assert repr(store).startswith(f"store    {store.path}\nmodel    demo (GPT2LMHeadModel")


@pytest.mark.parametrize(
    ("site", "tail"),
    [
        (("mlp_out", 1), "; to add it: workbench add {} --sites mlp_out.1"),
        ("embed", "; to add it: workbench add {} --sites embed"),
        ("resid_pst.1", "; nearest: resid_post.1, resid_post.0, blocks.1.hook_resid_post"),
        ("xyz", ""),
    ],
)
def test_a_site_that_was_not_recorded_is_refused_with_the_command_that_records_it(store, site, tail):
    label = site if isinstance(site, str) else ".".join(map(str, site))
    recorded = "recorded are 3: resid_post.0, resid_post.1, pattern.1"
    assert refused(RequestError, lambda: store[site]) == (
        f"{label} is not recorded in {store.path}; {recorded}{tail.format(store.path)}"
    )


def test_a_long_list_of_sites_is_shortened(tmp_path):
    sites = [replace(HALF, name=f"blocks.{i}.hook_resid_post", short=f"resid_post.{i}") for i in range(12)]
    store = open_store(write_store(tmp_path / "x", [[2]], sites=sites))
    assert "recorded are 12: resid_post.0, resid_post.1, " in refused(RequestError, lambda: store["xyz"])
    assert "resid_post.5, ..., resid_post.11" in refused(RequestError, lambda: store["xyz"])


def test_stores_and_selections_are_not_iterated_row_by_row(store):
    for source in (store, store.where("true")):
        with pytest.raises(TypeError, match="not iterable"):
            iter(source)


def test_pickles_are_paths(store, monkeypatch, tmp_path):
    rows = store.where("position = 1")
    store.tokens, store["resid_post", 0][[0, 21]]
    monkeypatch.chdir(tmp_path)
    for source in (store, store["resid_post", 0], rows):
        assert len(pickle.dumps(source)) < 1500
    assert np.array_equal(pickle.loads(pickle.dumps(store["resid_post", 0]))[:], values(HALF, 0, ROWS))
    assert np.array_equal(pickle.loads(pickle.dumps(rows))["resid_post", 0], rows["resid_post", 0])
    assert len(pickle.loads(pickle.dumps(rows)) & rows) == len(rows)


def test_a_relative_path_survives_a_change_of_folder(store, monkeypatch, tmp_path):
    monkeypatch.chdir(store.path.parent)
    relative = open_store(store.path.name)
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(relative["resid_post", 0][:], values(HALF, 0, ROWS))


def _read_in_child(array, ids, queue):
    queue.put(as_numpy(array[ids]).tolist())


@pytest.mark.parametrize("context", [multiprocessing.get_context("fork"), fork_context()], ids=["fork", "forkserver"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # what torch's loaders do
def test_worker_processes_read_the_same(store, context):
    array = store["resid_post", 0]
    array[:]  # open in the parent
    queue = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(array, [20, 1, 7], queue))
    child.start()
    assert queue.get() == values(HALF, 0, ROWS)[[20, 1, 7]].tolist()
    child.join()


def test_readers_work_while_a_writer_commits(tmp_path):
    """An opened store is complete, and does not change while more is committed."""
    plan, failures, counts = [[3, 2]] * 30, [], set()
    with writing(tmp_path / "x") as store:
        store.begin(part_of(plan), append=False)
        finished = threading.Event()

        def read():
            while not finished.is_set():
                snapshot = open_store(tmp_path / "x")
                counts.add(snapshot.rows)
                if not np.array_equal(snapshot["resid_post", 0][:], values(HALF, 0, snapshot.rows)):
                    failures.append(snapshot.rows)
                if snapshot.tokens.num_rows != snapshot.rows or len(snapshot.where("true")) != snapshot.rows:
                    failures.append(snapshot.rows)

        reader = threading.Thread(target=read)
        reader.start()
        early = open_store(tmp_path / "x")
        for lengths in plan:
            write_segment(store, lengths)
        finished.set()
        reader.join()
    assert not failures
    assert len(counts) > 1
    assert (early.rows, open_store(tmp_path / "x").rows) == (0, 150)


# ---- selections -------------------------------------------------------------------------------------------

QUERIES = {
    "token = ' Monday'": lambda f: f.token == " Monday",
    "token = 'it''s' OR token = 'say \"hi\"'": lambda f: f.token.isin(["it's", 'say "hi"']),
    "token = 'a\0b'": lambda f: f.token == "a\0b",
    "token IN ('🙂', '日', '')": lambda f: f.token.isin(["🙂", "日", ""]),
    "position > 0 AND source = 'web'": lambda f: (f.position > 0) & (f.source == "web"),
    "row BETWEEN 4 AND 12 AND NOT is_special": lambda f: f.row.between(4, 12) & ~f.is_special,
    "char_start IS NULL": lambda f: f.char_start.isna(),
    "document = 1 AND sequence % 2 = 0": lambda f: (f.document == 1) & (f.sequence % 2 == 0),
    "false": lambda f: f.row < 0,
    "token LIKE '%' AND length(token) > 2 -- a comment": lambda f: f.token.str.len() > 2,
}


@pytest.mark.parametrize("predicate", QUERIES)
def test_where_selects_the_same_rows_as_pandas(store, predicate):
    frame = token_table([n for lengths in SEGMENTS for n in lengths]).to_pandas()
    frame["token"], frame["source"] = frame["token"].astype(object), frame["source"].astype(object)
    expected = frame.row[QUERIES[predicate](frame)].to_numpy()
    rows = store.where(predicate)
    assert np.array_equal(rows.ids, expected)
    assert np.array_equal(rows["resid_post", 0], values(HALF, 0, ROWS)[expected])
    read = query_tokens(store.path, store.manifest, predicate, limit=3)
    assert read["row"].to_pylist() == expected[:3].tolist()
    assert read.column_names == store.tokens.column_names


@pytest.mark.parametrize(
    ("predicate", "reason", "tail"),
    [
        ("tokn = 'x'", 'Referenced column "tokn" not found in FROM clause', "; nearest: token, token_id"),
        (
            "token = tokn",
            'Referenced column "tokn" not found in FROM clause',
            "; a text stands in single quotes: 'tokn'",
        ),
        ('token IN (" Monday")', 'Referenced column " Monday" not', "; a text stands in single quotes: ' Monday'"),
        ("position >", 'syntax error at or near ">"', ""),
        ("token = 1", "Could not convert string '", ""),  # which token, the threads decide
        ("row = 1; DROP TABLE x", "Cannot have any modifiers in the expression list", ""),
        ("row = 1 ORDER BY row", "Cannot have any modifiers in the expression list", ""),
    ],
)
def test_a_query_that_is_refused_names_the_columns(store, predicate, reason, tail):
    columns = "row, sequence, position, document, token_id, token, char_start, char_end, is_special, "
    columns += "sequence_length, position_from_end, is_last, source"
    message = refused(RequestError, lambda: store.where(predicate))
    assert message.startswith(f"query {predicate!r}: {reason}")
    assert message.endswith(f"; columns: {columns}{tail}")


@pytest.mark.parametrize(
    ("predicate", "parameters"),
    [
        ("position = ?", [np.int64(1)]),
        ("position = ?", [torch.tensor(1)]),
        ("position IN ?", [np.array([1, 99])]),
        ("position IN $places", {"places": [np.int32(1)]}),
        ("position = $place AND $now > DATE '2000-01-01'", {"place": 1, "now": pd.Timestamp("2020-01-01")}),
    ],
)
def test_parameters_may_be_values_of_numpy_pandas_and_torch(store, predicate, parameters):
    expected = [row for row, position in enumerate(store.tokens["position"].to_pylist()) if position == 1]
    assert store.where(predicate, parameters).ids.tolist() == expected


def test_a_text_is_no_list_of_parameters(store):
    assert refused(RequestError, lambda: store.where("token = ?", " a")) == (
        "query 'token = ?': parameters must be a list of values, such as [' the'], or a mapping of names to values, "
        "not ' a'"
    )


def test_an_empty_query_is_refused(store):
    message = refused(RequestError, lambda: store.where("  "))
    assert message == "query is empty; give an SQL condition, for example \"token = ' Monday'\""


@pytest.mark.parametrize(
    "predicate",
    [
        "EXISTS (SELECT * FROM read_text('{secret}'))",
        "EXISTS (SELECT * FROM read_parquet('{secret}'))",
        "EXISTS (FROM '{secret}')",
        "EXISTS (SELECT * FROM glob('{folder}/*'))",
        "EXISTS (FROM secret_frame)",
        "row = 1; COPY (SELECT 1) TO '{folder}/written.csv'",
        "row = 1); COPY (SELECT 1) TO '{folder}/written.csv'; SELECT (1",
        "st_area('x') = 1",
    ],
)
def test_a_query_reads_the_tokens_and_nothing_else(store, tmp_path, predicate):
    secret_frame = token_table([2]).to_pandas()
    secret = tmp_path / "secret.parquet"
    secret_frame.to_parquet(secret)
    refused(RequestError, lambda: store.where(predicate.format(secret=secret, folder=tmp_path)))
    assert os.listdir(tmp_path) == ["secret.parquet"]


@pytest.mark.parametrize("name", ["it's.acts", "a*.acts", "a[bc]d.acts", "x=1", "{a,b}", "日 ?", "semi;colon"])
def test_a_path_is_not_read_as_a_pattern(tmp_path, name):
    write_store(tmp_path / "abd.acts", [[3]])
    write_store(tmp_path / "ax.acts", [[3]])
    store = open_store(write_store(tmp_path / name, [[1], [1]]))
    assert store.where("true").ids.tolist() == [0, 1]
    assert query_tokens(store.path, store.manifest, "true").column_names == store.tokens.column_names


def test_damaged_tokens_are_an_error_of_the_data(tmp_path):
    path = write_store(tmp_path / "x", [[3], [4]])
    file = path / "segments" / "00001" / "tokens.parquet"
    file.write_bytes(file.read_bytes()[:-10])
    store = open_store(path)
    for call in (lambda: store.where("row > 0"), lambda: store.tokens, lambda: Rows(store, np.array([5])).tokens):
        assert refused(DataError, call).startswith(f"{file} is damaged: its bytes are not those that were recorded; ")
    assert Rows(store, np.array([1])).tokens.num_rows == 1
    file.unlink()
    assert "cannot be read" in refused(DataError, lambda: store.where("row > 0"))


def test_only_committed_segments_are_queried(tmp_path):
    path = write_store(tmp_path / "x", [[3], [4]])
    manifest = read_manifest(path)
    earlier = replace(manifest, segments=manifest.segments[:1])
    assert select_rows(path, earlier, "true").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("resid_post", "resid_post is recorded by layer in {path}; name one, such as resid_post.0"),
        (("resid_post", 7), "resid_post.7 is no site of demo, whose layers are 0 to 1"),
        (("resid_post", -3), "resid_post.-3 is no site of demo, whose layers are 0 to 1"),
        (
            "resid_pos.0",
            "resid_pos.0 is not recorded in {path}; recorded are 3: resid_post.0, resid_post.1, pattern.1; ",
        ),
        (
            ("mlp_out", 0),
            "mlp_out.0 is not recorded in {path}; recorded are 3: resid_post.0, resid_post.1, pattern.1; to",
        ),
        (0, "0 is not a site; write store['resid_post.0'], and store['resid_post.0'][rows] for rows"),
        (slice(0, 5), "slice(0, 5, None) is not a site; write store['resid_post.0'], and store['resid_post.0'][rows]"),
        (("resid_post", 0, 5), "('resid_post', 0, 5) is not a site; write store['resid_post.0'], and store["),
        (("resid_post", slice(0, 2)), "resid_post.1 has rows of (3,) float32 and resid_post.0 of (3,) float16; read"),
        (("pattern", [1, 0]), "layer 0 of pattern is not recorded in {path}; recorded layers are 1"),
        (("resid_post", slice(2, 2)), "slice(2, 2, None) selects no layer of resid_post; the model has layers 0 to 1"),
    ],
)
def test_a_site_that_is_nearly_right_is_refused_with_what_to_write(store, site, message):
    index = inspect.unwrap(Store.__getitem__)  # the check of types, in tests alone, would refuse some before
    text = refused(RequestError, lambda: index(store, site))
    assert text.startswith(message.format(path=store.path))


def test_selections_are_sets_of_rows(store):
    low, odd = store.where("row < 10"), store.where("row % 2 = 1")
    assert (low & odd).ids.tolist() == [1, 3, 5, 7, 9]
    assert (low | odd).ids.tolist() == [*range(10), 11, 13, 15, 17, 19, 21]
    assert (low - odd).ids.tolist() == [0, 2, 4, 6, 8]
    assert (odd[:3].ids.tolist(), len(odd), repr(odd)) == ([1, 3, 5], 11, f"11 of 22 rows of {store.path}")
    assert Rows(store, np.array([9, 2, 9])).ids.tolist() == [2, 9]
    with pytest.raises(ValueError, match="read-only"):
        low.ids[0] = 5


def test_rows_of_another_store_are_refused(store, tmp_path):
    message = refused(RequestError, lambda: Rows(store, np.array([0, 22])))
    assert message == f"rows 0 to 22 are not within the 22 of {store.path}"
    foreign = open_store(write_store(tmp_path / "y", SEGMENTS)).where("true")
    expected = f"these rows are of {tmp_path}/y, not of {store.path}; select them there"
    for call in (lambda: store["resid_post", 0][foreign], lambda: store.where("true") & foreign):
        assert refused(RequestError, call) == expected


def test_tokens_of_rows_are_those_of_the_store(store):
    for predicate in ("row IN (0, 8, 9, 21)", "source = 'web'", "true", "false"):
        rows = store.where(predicate)
        assert rows.tokens.to_pylist() == store.tokens.take(rows.ids).to_pylist()
    assert store.tokens["token"].to_pylist() == [WORDS[row * 7 % 40 % 8] for row in range(ROWS)]
    assert set(store.tokens.to_pandas()["token"].cat.categories) == set(WORDS)
