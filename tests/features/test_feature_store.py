"""Reading of sparse features: indexing, top rows, enrichment, and refusal of damaged files."""

import json
import pickle
import shutil
from dataclasses import replace
from inspect import unwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from features_example import HEADS, ROWS, SEGMENTS, SITE, TRAINED, extracted
from refusals import refused
from sae_example import save_sae, set_weights
from safetensors.numpy import load_file
from scipy.sparse import csr_array
from store_example import MODEL, part_of, token_table, values, write_segment, write_store, writing

from workbench.features.feature_store import Features, open_features
from workbench.features.index import feature_groups
from workbench.io.errors import DataError, RequestError
from workbench.io.parse import to_checked_json
from workbench.io.tensors import map_arrays
from workbench.sae.load import load_sae
from workbench.store.reader import open_store


@pytest.mark.parametrize(
    "index",
    [
        slice(None),
        slice(5, 40, 7),
        slice(40, 3, -2),
        slice(60, 90),
        [50, 0, 3, 3, -1],
        [],
        np.array([4, 9], np.uint8),
        np.arange(ROWS) % 4 == 0,
        torch.tensor([2, -51]),
    ],
    ids=str,
)
def test_indexing_equals_numpy(features, index):
    dense = features[:].toarray()
    expected = dense[np.array(index, int) if isinstance(index, list) else index]
    selected = features[index]
    assert isinstance(selected, csr_array)
    assert (selected.dtype, selected.shape) == (np.float32, expected.shape)
    assert np.array_equal(selected.toarray(), expected)


def test_one_row_is_a_matrix_of_one(features):
    assert np.array_equal(features[7].toarray(), features[:].toarray()[[7]])


def test_rows_of_a_query_select_features(features, example, store):
    rows = example.where("token = ' Monday'")
    assert np.array_equal(features[rows].toarray(), features[:].toarray()[rows.ids])
    assert "these rows are of" in refused(RequestError, lambda: features[store.where("true")])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (51, "row 51 is out of range: there are 51"),
        ([0, -52], "row -52 is out of range: there are 51"),
        (1.0, "features are indexed by row: whole numbers, slices, a mask of 51, or Rows"),
        ([[1]], "features are indexed by row: whole numbers, slices, a mask of 51, or Rows"),
        ([True], "features are indexed by row: whole numbers, slices, a mask of 51, or Rows"),
    ],
)
def test_an_invalid_index_is_refused(features, index, message):
    assert refused(IndexError, lambda: features[index]) == message


def test_features_are_described_by_their_repr(features):
    assert (features.shape, len(features)) == ((51, 20), 51)
    active = features[:].nnz / 51
    assert repr(features) == f"features of {SITE.name} (row 51, feature 20), {active:.1f} active per row"


def test_top_lists_the_strongest_rows_with_their_text(features, example):
    dense, tokens = features[:].toarray(), token_table([7, 9, 12, 3, 1, 14, 5]).to_pandas()
    feature = int(features.counts.argmax())
    order = np.lexsort((np.arange(ROWS), -dense[:, feature]))
    order = order[dense[order, feature] > 0]
    table = features.top(feature, k=100, context=2)
    assert list(table) == ["activation", "row", "sequence", "position", "token", "context"]
    assert table["row"].tolist() == order.tolist()
    assert np.array_equal(table["activation"], dense[order, feature])
    for name in ("sequence", "position", "token"):
        assert table[name].tolist() == tokens[name].astype(object).iloc[order].tolist()
    for row, context in zip(table["row"], table["context"], strict=True):
        near = tokens[(tokens["row"] - row).abs() <= 2]
        assert context == "".join(near[near["sequence"] == tokens["sequence"][row]]["token"])
    assert features.top(feature, k=2, context=2).equals(table.head(2))
    assert features.top(feature, k=3, context=0)["context"].tolist() == table["token"].head(3).tolist()
    assert len(features.top(feature)) == min(20, len(order))
    whole = "".join(tokens[tokens["sequence"] == table["sequence"][0]]["token"])
    assert features.top(feature)["context"][0] in whole
    assert len(features.top(feature)["context"][0]) >= len(table["context"][0])


def test_a_dead_feature_has_an_empty_table(example, tmp_path):
    save_sae(tmp_path / "sae", **TRAINED)
    set_weights(tmp_path / "sae", b_enc=np.where(np.arange(20) == 6, -1e6, 0))
    features = extracted(example, load_sae(tmp_path / "sae", device="cpu"), out=tmp_path / "f")
    assert len(features.top(6)) == 0
    assert (features.counts[6], features.max[6], features.mean[6]) == (0, 0, 0)


def test_without_a_tokenizer_ids_are_separated_by_spaces(tmp_path, sae):
    bare = replace(MODEL, tokenizer_fingerprint=None)
    store = open_store(write_store(tmp_path / "x.acts", [[4]], sites=(SITE,), model=bare))
    features = extracted(store, sae)
    line = features.top(features[0].indices[0], k=1)["context"][0]
    assert line == " ".join(store.tokens["token"].to_pylist())


def test_statistics_equal_those_of_the_dense_matrix(features, monkeypatch):
    dense = features[:].toarray().astype(np.float64)
    counts = (dense != 0).sum(0)
    assert np.array_equal(features.counts, counts)
    assert np.array_equal(features.max, dense.max(0).astype(np.float32))
    expected = dense.sum(0) / np.maximum(counts, 1)
    np.testing.assert_allclose(features.mean, expected, rtol=1e-12)
    monkeypatch.setattr(feature_groups, "__defaults__", (9,))  # entry by entry as in one piece
    np.testing.assert_allclose(open_features(features.path, features.store).mean, expected, rtol=1e-12)


def test_enrichment_counts_by_hand(features, example):
    tokens, dense = example.tokens.to_pandas(), features[:].toarray()
    text = ~tokens["is_special"].to_numpy()
    label = (tokens["source"] == "wiki").to_numpy()
    table = features.enrichment("source = 'wiki'")
    assert list(table) == ["feature", "active", "hits", "precision", "recall", "f1"]
    assert sorted(table["feature"]) == list(range(20))
    for line in table.itertuples():
        active = (dense[:, line.feature] != 0) & text
        hits, positives = (active & label).sum(), (label & text).sum()
        assert (line.active, line.hits) == (active.sum(), hits)
        assert line.recall == hits / positives
        assert line.precision == hits / active.sum() if active.any() else np.isnan(line.precision)
        denominator = line.precision + line.recall if hits else 1
        assert line.f1 == pytest.approx(2 * line.precision * line.recall / denominator if hits else 0, rel=1e-12)
    assert (dense[~text] != 0).any()
    order = sorted(range(20), key=lambda i: (-table["f1"][i], table["feature"][i]))
    assert order == list(range(20))
    assert table.equals(features.enrichment(label))
    assert table.equals(features.enrichment(example.where("source = 'wiki'")))


def test_a_feature_made_for_a_label_is_found(store, tmp_path):
    """Planted: feature 5 is on where d_model 2 exceeds 1, and the label is just that."""
    save_sae(tmp_path / "sae", apply_b_dec_to_input=False, **TRAINED)
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    weights["W_enc"][:, 5], weights["b_enc"][5] = np.eye(8)[2], -1
    sae = load_sae(set_weights(tmp_path / "sae", **weights), device="cpu")
    table = extracted(store, sae).enrichment(values(SITE, 0, ROWS)[:, 2] > 1)
    assert table.iloc[0][["feature", "precision", "recall", "f1"]].tolist() == [5, 1, 1, 1]
    assert 0 < table["f1"][1] < 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.top(20), "feature 20 does not exist; the SAE has features 0 to 19"),
        (lambda f: f.rows_of(-1), "feature -1 does not exist; the SAE has features 0 to 19"),
        (lambda f: f.top(0, k=0), "k must be a whole number, at least 1, not 0"),
        (lambda f: f.top(0, context=-1), "context must be a whole number, at least 0, not -1"),
        (lambda f: f.enrichment("token = 'x'"), "\"token = 'x'\" selects none of the 44 rows of text; choose another"),
        (
            lambda f: f.enrichment("is_special"),
            "'is_special' selects none of the 44 rows of text; choose another label",
        ),
        (lambda f: f.enrichment(np.ones(51, bool)), "where selects all of the 44 rows of text; choose another label"),
        (
            lambda f: f.enrichment(np.ones(5, bool)),
            "where: a mask of shape (5,) does not fit 51 rows; give one value per row",
        ),
        (
            lambda f: unwrap(Features.top)(f, 0, where=np.arange(51) % 2),
            "where must be SQL, rows of the store or a mask of True and False, not int64",
        ),
        (
            lambda f: unwrap(Features.enrichment)(f, ["a"] * 51),
            "where must be SQL, rows of the store or a mask of True and",
        ),
        (lambda f: unwrap(Features.top)(f, 0, where=3), "where must be SQL, rows of the store or a mask, not 3"),
    ],
)
def test_invalid_queries_are_refused(features, call, message):
    assert refused(RequestError, lambda: call(features)).startswith(message)


@pytest.mark.parametrize("kind", [list, torch.from_numpy, lambda mask: pd.Series(mask, index=np.arange(51)[::-1])])
def test_a_mask_selects_rows_by_place_whatever_holds_it(features, kind):
    """A Series has labels of its own, and numbers 0 and 1 would be taken for places."""
    mask = np.arange(51) % 3 == 0
    feature = int(np.argmax(features.counts))
    dense = features[slice(None)].toarray()[:, feature]
    expected = [row for row in np.argsort(-dense, kind="stable") if dense[row] > 0 and mask[row]]
    assert unwrap(Features.top)(features, feature, where=kind(mask))["row"].tolist() == expected[:20]
    assert unwrap(Features.enrichment)(features, kind(mask)).equals(features.enrichment(mask))


def test_features_of_a_store_that_grew_are_refused(store, sae):
    path = extracted(store, sae, name="mine").path
    with writing(store.path, sites=(SITE, HEADS)) as writer:
        writer.begin(part_of([[4]]), append=True)
        write_segment(writer, [4])
    assert refused(RequestError, lambda: open_features(path)) == (
        f"features mine: the store {store.path} had 51 rows then and has 55 now; extract again under another name"
    )


def test_features_of_another_store_are_refused(features, tmp_path):
    other_store = write_store(tmp_path / "y.acts", SEGMENTS, sites=(SITE,))
    assert refused(RequestError, lambda: open_features(features.path, other_store)) == (
        f"features topk: the store {other_store} is not the one they were made from; extract again under another name"
    )


def test_features_move_with_their_store(store, sae, tmp_path):
    first = extracted(store, sae, name="mine")
    apart = extracted(store, sae, out=tmp_path / "apart").path
    moved = shutil.move(store.path, tmp_path / "deeper" / "y.acts")
    again = open_features(Path(moved) / "features" / "mine")
    assert np.array_equal(again[:].toarray(), first[:].toarray())
    assert again.store.path == Path(moved)
    text = refused(RequestError, lambda: open_features(apart))
    assert text == f"features {apart}: there is no store at {tmp_path / 'x.acts'}; give its path as store="
    assert open_features(apart, moved).shape == open_features(apart, open_store(moved)).shape == (51, 20)


def test_features_pickle_as_their_path(features):
    data = pickle.dumps(features)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data)[:].toarray(), features[:].toarray())


@pytest.fixture
def copied(features, tmp_path):
    """The features in a folder of their own, and how to open them."""
    path = shutil.copytree(features.path, tmp_path / "copied")
    return path, lambda: open_features(path, features.store)


def edited(path: Path, **changes) -> None:
    path.write_text(to_checked_json(json.loads(path.read_text()) | changes))


def overwritten(path: Path, name: str, entry: int, value: int) -> None:
    """One number of one array in a safetensors file."""
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    part = json.loads(path.read_bytes()[8:header])[name]
    kind = {"U16": "<u2", "I32": "<i4", "I64": "<i8", "F32": "<f4"}[part["dtype"]]
    array = np.memmap(path, kind, "r+", header + part["data_offsets"][0], tuple(part["shape"]))
    array[entry] = value
    array.flush()


@pytest.mark.parametrize("order", ["by_row", "by_feature"])
def test_a_damaged_file_is_named(order, copied):
    path, opened = copied
    file = path / f"{order}.safetensors"
    whole = file.read_bytes()
    for damaged in (b"", whole[:5], whole[:-1], whole + b"x", b"\xff" * len(whole), whole.replace(b"I64", b"I63", 1)):
        file.write_bytes(damaged)
        text = refused(DataError, opened)
        assert text.startswith(f"{file} ")
        assert text.endswith("; extract the features again")
    file.unlink()
    assert refused(DataError, opened).startswith(f"{file} cannot be read: ")


def test_overlapping_arrays_are_refused(tmp_path):
    layout = {"a": ("int32", 2), "b": ("int32", 2)}
    header = {name: {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]} for name in layout}
    text = json.dumps(header).encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    assert "b does not lie where its header says" in refused(DataError, lambda: map_arrays(tmp_path / "f", layout))


@pytest.mark.parametrize(
    ("file", "name", "entry", "value"),
    [("by_row", "indptr", 3, -1), ("by_feature", "indptr", 0, 1), ("by_row", "indptr", -1, 10**9)],
)
def test_damaged_row_pointers_are_refused(copied, file, name, entry, value):
    path, opened = copied
    overwritten(path / f"{file}.safetensors", name, entry, value)
    assert refused(DataError, opened) == (
        f"{path / file}.safetensors is damaged: its indptr does not rise from 0 to the number of entries; extract the "
        "features again"
    )


def test_ids_beyond_the_last_are_refused_when_read(copied):
    path, opened = copied
    features = opened()
    feature = int(features[0].indices[0])
    overwritten(path / "by_row.safetensors", "feature", 0, 20)
    overwritten(path / "by_feature.safetensors", "row", int(features.by_feature["indptr"][feature]), 51)
    assert "by_row.safetensors is damaged: a feature beyond the last" in refused(DataError, lambda: opened()[0])
    text = refused(DataError, lambda: opened().top(feature))
    assert "by_feature.safetensors is damaged: a row beyond the last" in text


def test_verify_finds_a_changed_value(copied):
    path, opened = copied
    opened().verify()
    overwritten(path / "by_feature.safetensors", "value", 0, 3)
    text = refused(DataError, lambda: opened().verify())
    assert text == f"{path / 'by_feature.safetensors'} is damaged: its checksum differs; extract the features again"


def test_a_record_of_version_1_is_read_without_a_checksum(copied):
    path, opened = copied
    value = json.loads((path / "features.json").read_text()) | {"version": 1}
    del value["checksum"]
    (path / "features.json").write_text(json.dumps(value))
    assert (opened().record.version, opened().shape) == (1, (value["rows"], value["features"]))


def test_a_record_that_cannot_be_read_is_refused(copied, tmp_path):
    path, opened = copied
    record = path / "features.json"
    sound = record.read_text()
    edited(record, version=3)
    assert refused(RequestError, opened) == f"{record} has format version 3; upgrade the workbench"
    record.write_text(sound.replace('"overflow": 0', '"overflow": 1'))
    assert refused(DataError, opened).startswith(f"{record} is damaged or was edited: its checksum differs; extract")
    edited(record, version=2, format="other")
    assert "format is 'other', expected 'workbench.features'" in refused(DataError, opened)
    edited(record, format="workbench.features", rows="many")
    assert refused(DataError, opened) == f'{record}: rows: expected a whole number, found "many"'
    record.write_text("{")
    assert "is not JSON" in refused(DataError, opened)
    none = tmp_path / "none"
    assert refused(RequestError, lambda: open_features(none)) == (
        f"no features at {none}: no features.json; make them with workbench features"
    )
