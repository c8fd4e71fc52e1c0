"""Sparse features: what is extracted is what the autoencoder gives, in both orders, committed whole, read safely."""

import fcntl
import itertools
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused
from sae_example import ARCHITECTURES, encode64, save_sae, set_weights
from safetensors.numpy import load_file
from scipy.sparse import csr_array
from store_example import BRAIN, HALF, MODEL, part_of, token_table, values, write_segment, write_store, writing
from warned import warned

import workbench as wb
from workbench.features import encoding, extract, merging
from workbench.features.extract import extract_features, matching_site
from workbench.features.feature_segments import SegmentFolder
from workbench.features.feature_store import by_feature_layout, by_row_layout, open_features
from workbench.features.index import feature_groups, invert
from workbench.io.errors import DataError, RequestError
from workbench.io.tensors import ArrayFile, map_arrays, new_arrays
from workbench.sae.encode import Encoder
from workbench.sae.load import load_sae
from workbench.sae.metrics import sae_metrics
from workbench.sae.sparsity import FeatureChoice, MutualChoice
from workbench.store.manifest import SiteRecord
from workbench.store.reader import open_store

SITE = SiteRecord("blocks.1.hook_resid_post", "resid_post.1", ("row", "d_model"), (8,), "float32")
HEADS = SiteRecord("blocks.1.attn.hook_z", "z.1", ("row", "head", "d_head"), (2, 4), "float16")
SEGMENTS = [[7, 9], [12], [3, 1, 14], [5]]
ROWS = 51
TRAINED = {"hook_name": SITE.name, "model_name": "demo"}


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A store of two sites; tests that change it take a copy."""
    return open_store(write_store(tmp_path_factory.mktemp("stores") / "x.acts", SEGMENTS, sites=(SITE, HEADS)))


@pytest.fixture
def store(example, tmp_path):
    return open_store(shutil.copytree(example.path, tmp_path / "x.acts"))


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    return load_sae(save_sae(tmp_path_factory.mktemp("saes") / "topk", "topk", **TRAINED), device="cpu")


@pytest.fixture(scope="module")
def features(example, sae, tmp_path_factory):
    return extract_features(example, sae, out=tmp_path_factory.mktemp("features") / "topk", show_progress=False)


def loaded(folder: Path, architecture: str = "standard", **settings):
    return load_sae(save_sae(folder, architecture, **{**TRAINED, **settings}), device="cpu")


def taken(store, sae, *arguments, **settings):
    return extract_features(store, sae, *arguments, **{"show_progress": False, **settings})


# ---- what is extracted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_what_saelens_gives(architecture, example, tmp_path):
    sae = loaded(tmp_path / "sae", architecture)
    found = taken(example, sae, out=tmp_path / "f", batch_rows=4)[:].toarray()
    with torch.no_grad():
        dense = sae.module.encode(torch.from_numpy(values(SITE, 0, ROWS))).numpy()
    assert 0 < (dense != 0).sum() < dense.size
    assert np.array_equal(found != 0, dense != 0)
    np.testing.assert_allclose(found, dense, rtol=1e-5, atol=1e-5)
    if architecture != "matching_pursuit":
        np.testing.assert_allclose(found, encode64(tmp_path / "sae", values(SITE, 0, ROWS)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_rows", [1, 13, None])
def test_a_temporal_autoencoder_reads_whole_sequences(batch_rows, example, tmp_path, monkeypatch):
    """Wherever blocks and segments would end by themselves, they end where a sequence does."""
    monkeypatch.setattr(encoding, "SEGMENT_ROWS", 20)
    sae = loaded(tmp_path / "sae", "temporal")
    found = taken(example, sae, out=tmp_path / "f", batch_rows=batch_rows)[:].toarray()
    x = torch.from_numpy(values(SITE, 0, ROWS))
    with torch.no_grad():
        dense = torch.cat(
            [sae.module.encode(part[None])[0] for part in x.split([n for part in SEGMENTS for n in part])]
        ).numpy()
    assert np.array_equal(found != 0, dense != 0)
    np.testing.assert_allclose(found, dense, rtol=1e-5, atol=1e-5)
    text = refused(RequestError, lambda: sae_metrics(example, sae))
    assert text == "SAE 'sae' is temporal: its features alone do not reconstruct a row"


def test_special_rows_are_extracted_too(features, example):
    special = example.where("is_special")
    assert len(special) == 7
    assert (np.diff(features[special].indptr) > 0).all()


def test_float16_activations_of_heads_come_flat(example, tmp_path):
    sae = loaded(tmp_path / "sae", hook_name=HEADS.name, reshape_activations="hook_z")
    flat = load_sae(save_sae(tmp_path / "flat", hook_name=HEADS.name), device="cpu")
    expected = encode64(tmp_path / "sae", values(HEADS, 0, ROWS).reshape(ROWS, 8).astype(np.float32))
    for one in (sae, flat):
        found = taken(example, one, ("z", 1), out=tmp_path / f"of-{one.name}")
        np.testing.assert_allclose(found[:].toarray(), expected, rtol=1e-4, atol=1e-4)


def test_blocks_hold_as_many_rows_as_asked(example, sae, tmp_path, monkeypatch):
    sizes = []
    plain = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, *given: sizes.append(len(given[0])) or plain(self, *given))
    taken(example, sae, out=tmp_path / "one", batch_rows=20)
    assert sizes == [20, 20, 11]
    sizes.clear()
    monkeypatch.setattr(Encoder, "block_rows", 8)
    taken(example, sae, out=tmp_path / "two")
    assert sizes == [32, 19]


def test_float16_keeps_the_support_and_counts_what_overflows(example, tmp_path):
    sae = loaded(tmp_path / "sae")
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    scale = np.ones(20, np.float32)
    scale[:2] = 1e-9, 1e5  # feature 0 rounds to zero, feature 1 is beyond float16
    set_weights(tmp_path / "sae", W_enc=weights["W_enc"] * scale, b_enc=weights["b_enc"] * scale)
    sae = load_sae(tmp_path / "sae", device="cpu")
    whole = taken(example, sae, out=tmp_path / "whole")
    beyond = int((whole[:].toarray() > 65504).sum())
    assert beyond > 5
    with warned(rf"^{beyond} activations are beyond the range of float16 and stored as its larg"):
        half = taken(example, sae, out=tmp_path / "half", dtype="float16")
    assert (half.record.overflow, whole.record.overflow) == (beyond, 0)
    expected = np.minimum(whole[:].toarray(), 65504).astype(np.float16)
    assert np.array_equal(half[:].toarray(), expected.astype(np.float32))
    assert np.array_equal(half[:].indices, whole[:].indices)
    assert (expected[:, 0] == 0).all()
    assert half.counts[0] == whole.counts[0] > 0
    assert half.rows_of(0)[1].dtype == np.float16
    assert half[:].dtype == np.float32
    with warned("beyond the range of float16"):
        taken(example, sae, out=tmp_path / "strict", dtype="float16")
    assert open_features(tmp_path / "strict", example).record == replace(
        half.record, store=os.path.relpath(example.path, tmp_path / "strict")
    )


def test_a_name_is_made_of_the_site_and_the_saes(store, tmp_path):
    sae = replace(loaded(tmp_path / "sae"), name="release é/blocks.1 id")
    assert taken(store, sae).path.name == "resid_post.1-release-blocks.1-id"


def test_progress_is_said_unless_it_is_not_wanted(example, sae, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("workbench.io.progress.EVERY", 0.0)
    extract_features(example, sae, out=tmp_path / "said", batch_rows=30)
    assert "extracting features: 30 of 51 rows" in capsys.readouterr().err
    taken(example, sae, out=tmp_path / "unsaid", batch_rows=30)
    assert capsys.readouterr().err == ""


# ---- both orders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [1, 7, 60, 10_000])
@pytest.mark.parametrize(("kind", "row_type"), [("uint16", "int32"), ("int32", "int64")])
def test_the_index_is_scipys_sorted_by_activation(entries, kind, row_type, tmp_path):
    """Few values, so that ties are everywhere; an empty feature at either end and a dense one among the others."""
    random = np.random.default_rng(3)
    dense = random.integers(0, 4, (40, 11)) * random.integers(0, 2, (40, 11)) * 0.5
    dense[:, [0, 6, 10]], dense[:, 4], dense[5] = 0, 1 + random.integers(0, 2, 40), 0
    matrix = csr_array(dense.astype(np.float32))
    layout = {"indptr": ("int64", 12), "row": (row_type, matrix.nnz), "value": ("float32", matrix.nnz)}
    with new_arrays(tmp_path / "f", layout) as file:
        counts = np.bincount(matrix.indices, minlength=11)
        indptr, feature = matrix.indptr.astype(np.int64), matrix.indices.astype(kind)
        invert(indptr, feature, matrix.data, counts, file, tmp_path / "spill", row_type, entries)
    assert not (tmp_path / "spill").exists()
    found, columns = load_file(tmp_path / "f"), matrix.tocsc()
    assert np.array_equal(found["indptr"], columns.indptr)
    assert (found["row"].dtype, found["value"].dtype) == (np.dtype(row_type), np.float32)
    for first, last in zip(columns.indptr[:-1], columns.indptr[1:], strict=True):
        expected = sorted(zip(-columns.data[first:last], columns.indices[first:last], strict=True))
        assert list(zip(-found["value"][first:last], found["row"][first:last], strict=True)) == expected


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_index_orders_every_kind_of_value(dtype, tmp_path):
    """Ties, both zeros, subnormals, extremes and negative values, of rows far enough apart that few bits are left for
    features: 64 of them in a group where values are float32."""
    rng = np.random.default_rng(0)
    limits = np.finfo(dtype)
    kinds = np.array([0.0, -0.0, 1, -1, limits.max, limits.min, limits.tiny, limits.smallest_subnormal, 0.5], dtype)
    rows, features, last = 1 << 26, 200, 40  # only the last rows have features
    lengths = rng.integers(0, features, last)
    feature = np.concatenate([np.sort(rng.permutation(features)[:n]) for n in lengths]).astype(np.uint16)
    value = np.where(rng.random(len(feature)) < 0.6, rng.choice(kinds, len(feature)), rng.normal(size=len(feature)))
    value = value.astype(dtype)
    with open(tmp_path / "indptr", "wb") as file:
        file.seek(8 * (rows + 1 - last))  # zeros that take no space
        file.write(np.cumsum(lengths))
    indptr = np.memmap(tmp_path / "indptr", np.int64, "r")
    counts = np.bincount(feature, minlength=features)
    layout = {"indptr": ("int64", features + 1), "row": ("int32", len(feature)), "value": (dtype, len(feature))}
    with new_arrays(tmp_path / "f", layout) as file:
        invert(indptr, feature, value, counts, file, tmp_path / "spill", "int32", 500)
    found, row = load_file(tmp_path / "f"), rows - last + np.repeat(np.arange(last), lengths)
    expected = sorted(range(len(feature)), key=lambda n: (feature[n], -float(value[n]), row[n]))
    assert np.array_equal(found["row"], row[expected])
    assert np.array_equal(found["value"], value[expected])
    assert np.array_equal(found["indptr"], np.concatenate([[0], np.cumsum(counts)]))


def test_an_index_of_more_rows_than_its_keys_count_is_refused(tmp_path):
    indptr, none = np.broadcast_to(np.int64(0), (2**32 + 2,)), np.zeros(0, np.float32)
    with open(tmp_path / "f", "wb") as raw:
        file = ArrayFile(raw, "f", {"indptr": ("int64", 4)})
        arguments = (indptr, none.astype(np.uint16), none, np.zeros(3, np.int64), file, tmp_path / "spill", "int64")
        text = refused(RequestError, lambda: invert(*arguments))
    assert text == "4294967297 rows are too many for an index of float32; give dtype='float16'"


def test_groups_hold_at_most_the_entries_allowed():
    indptr = np.array([0, 0, 3, 5, 15, 15, 16, 19, 19])
    groups = list(feature_groups(indptr, 5))
    assert [(group.start, group.stop) for group in groups] == [(0, 3), (3, 4), (4, 8)]
    assert [(group.start, group.stop) for group in feature_groups(indptr, 3)] == [
        (0, 2),
        (2, 3),
        (3, 4),
        (4, 6),
        (6, 8),
    ]
    assert [(group.start, group.stop) for group in feature_groups(indptr, 100)] == [(0, 8)]
    assert [(group.start, group.stop) for group in feature_groups(indptr, 100, most=3)] == [(0, 3), (3, 6), (6, 8)]


def test_the_files_are_safetensors_and_the_orders_agree(features):
    rows, columns = (load_file(features.path / f"by_{order}.safetensors") for order in ("row", "feature"))
    by_row = csr_array((rows["value"], rows["feature"].astype(int), rows["indptr"]), shape=features.shape)
    assert (rows["feature"].dtype, columns["row"].dtype) == (np.uint16, np.int32)
    dense = np.zeros(features.shape, np.float32)
    for feature in range(features.shape[1]):
        own = slice(*columns["indptr"][feature : feature + 2])
        assert np.array_equal(features.rows_of(feature)[0], columns["row"][own])
        dense[columns["row"][own], feature] = columns["value"][own]
    assert np.array_equal(by_row.toarray(), dense)
    assert np.array_equal(features[:].toarray(), dense)
    assert by_row.has_sorted_indices


def test_types_are_as_narrow_as_they_can_be():
    assert by_row_layout(1, 65_536, 1, "float16")["feature"][0] == "uint16"
    assert by_row_layout(1, 65_537, 1, "float16")["feature"][0] == "int32"
    assert by_feature_layout(2**31 - 1, 1, 1, "float16")["row"][0] == "int32"
    assert by_feature_layout(2**31, 1, 1, "float16")["row"][0] == "int64"
    rows, entries = 10**6, 32 * 10**6  # the promise: 400 bytes a row with both orders at 32 active features
    layouts = [layout(rows, 24_576, entries, "float16") for layout in (by_row_layout, by_feature_layout)]
    assert sum(np.dtype(kind).itemsize * n for layout in layouts for kind, n in layout.values()) <= 400 * rows


def test_an_array_file_takes_what_was_promised_and_no_less(tmp_path):
    layout = {"a": ("float16", 3), "b": ("int64", 2)}
    with new_arrays(tmp_path / "f", layout) as file:
        for name, part in (("a", [1, 2]), ("b", [4, 5]), ("a", [3])):
            file.append(name, np.array(part, layout[name][0]))
        for wrong in (np.zeros(1, np.float16), np.zeros(0, np.float32)):
            assert refused(RequestError, lambda part=wrong: file.append("a", part)).startswith("f: a takes 3 of float1")
    assert {name: part.tolist() for name, part in load_file(tmp_path / "f").items()} == {"a": [1, 2, 3], "b": [4, 5]}
    assert {name: part.tolist() for name, part in map_arrays(tmp_path / "f", layout).items()} == {
        "a": [1, 2, 3],
        "b": [4, 5],
    }

    def too_short():
        with new_arrays(tmp_path / "g", layout) as file:
            file.append("b", np.zeros(2, np.int64))

    assert refused(DataError, too_short) == "g: a was not written to its end; nothing was committed"


# ---- asking -----------------------------------------------------------------------------------------------


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
def test_indexing_is_numpys(features, index):
    dense = features[:].toarray()
    expected = dense[np.array(index, int) if isinstance(index, list) else index]
    found = features[index]
    assert isinstance(found, csr_array)
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    assert np.array_equal(found.toarray(), expected)


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
def test_an_index_out_of_place_is_refused(features, index, message):
    assert refused(IndexError, lambda: features[index]) == message


def test_what_features_say_of_themselves(features):
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
    features = taken(example, load_sae(tmp_path / "sae", device="cpu"), out=tmp_path / "f")
    assert len(features.top(6)) == 0
    assert (features.counts[6], features.max[6], features.mean[6]) == (0, 0, 0)


def test_without_a_tokenizer_ids_stand_apart(tmp_path, sae):
    bare = replace(MODEL, tokenizer_fingerprint=None)
    store = open_store(write_store(tmp_path / "x.acts", [[4]], sites=(SITE,), model=bare))
    features = taken(store, sae)
    line = features.top(features[0].indices[0], k=1)["context"][0]
    assert line == " ".join(store.tokens["token"].to_pylist())


def test_statistics_are_the_dense_matrixs(features, monkeypatch):
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
        hits, wanted = (active & label).sum(), (label & text).sum()
        assert (line.active, line.hits) == (active.sum(), hits)
        assert line.recall == hits / wanted
        assert line.precision == hits / active.sum() if active.any() else np.isnan(line.precision)
        both = line.precision + line.recall if hits else 1
        assert line.f1 == pytest.approx(2 * line.precision * line.recall / both if hits else 0, rel=1e-12)
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
    table = taken(store, sae).enrichment(values(SITE, 0, ROWS)[:, 2] > 1)
    assert table.iloc[0][["feature", "precision", "recall", "f1"]].tolist() == [5, 1, 1, 1]
    assert 0 < table["f1"][1] < 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.top(20), "feature 20 does not exist; the SAE has features 0 to 19"),
        (lambda f: f.rows_of(-1), "feature -1 does not exist; the SAE has features 0 to 19"),
        (lambda f: f.top(0, k=0), "k must be at least 1, not 0"),
        (lambda f: f.top(0, context=-1), "context must be at least 0, not -1"),
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
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(features, call, message):
    assert refused(RequestError, lambda: call(features)).startswith(message)


# ---- which SAE on which site ------------------------------------------------------------------------------


def test_the_sae_finds_its_own_site(example, tmp_path):
    for hook_name in (SITE.name, "blocks.2.hook_resid_pre", "resid_post.1"):
        sae = loaded(tmp_path / hook_name, hook_name=hook_name)
        assert matching_site(example, sae).name == SITE.name
        assert matching_site(example, sae, "resid_post.1").name == SITE.name


def test_two_names_of_one_model_agree(tmp_path):
    named = replace(MODEL, name="openai-community/gpt2")
    store = open_store(write_store(tmp_path / "x.acts", [[4]], sites=(SITE,), model=named))
    for model_name in ("gpt2-small", "gpt2", "GPT2", "openai-community/gpt2"):
        assert matching_site(store, loaded(tmp_path / "sae", model_name=model_name)).name == SITE.name
    refused(RequestError, lambda: matching_site(store, loaded(tmp_path / "sae", model_name="gpt2-medium")))


@pytest.mark.parametrize(
    ("settings", "site", "message"),
    [
        ({"d_in": 7}, None, "SAE 'sae' reads rows of width 7, but resid_post.1 of {store} has 8"),
        (
            {"hook_name": "blocks.0.hook_resid_post"},
            "resid_post.1",
            "SAE 'sae' was trained on blocks.0.hook_resid_post, but site is blocks.1.hook_resid_post; leave site out, "
            "or give force=True",
        ),
        (
            {"model_name": "gpt2-small"},
            None,
            "SAE 'sae' was trained on the model gpt2-small, but {store} was recorded from demo; if they are the same",
        ),
        ({"hook_name": None}, None, "site: the files of SAE 'sae' do not record its site; give site="),
        (
            {"hook_name": "blocks.5.hook_mlp_out"},
            None,
            "blocks.5.hook_mlp_out is not recorded in {store}; recorded are",
        ),
    ],
)
def test_what_does_not_fit_is_refused_naming_both_sides(settings, site, message, example, tmp_path):
    sae = loaded(tmp_path / "sae", **settings)
    text = refused(RequestError, lambda: taken(example, sae, site, out=tmp_path / "f"))
    assert text.startswith(message.format(store=example.path))
    assert not (tmp_path / "f").exists()


def test_force_allows_another_site_and_model_but_no_other_width(example, tmp_path):
    other = loaded(tmp_path / "sae", hook_name="blocks.0.hook_resid_post", model_name="gpt2-small")
    assert taken(example, other, "resid_post.1", force=True, out=tmp_path / "f").record.site == SITE.name
    wide = loaded(tmp_path / "wide", d_in=9)
    assert "reads rows of width 9" in refused(RequestError, lambda: taken(example, wide, force=True))
    unsaid = loaded(tmp_path / "unsaid", hook_name=None, model_name=None)
    assert matching_site(example, unsaid, "resid_post.1").name == SITE.name


# ---- names, and what is there already ---------------------------------------------------------------------


def test_features_lie_in_the_store_by_default(store, sae):
    before = store.verify()
    found = taken(store, sae)
    assert found.path == store.path / "features" / "resid_post.1-topk"
    assert taken(store, sae, name="mine").path == store.path / "features" / "mine"
    assert sorted(path.name for path in found.path.iterdir()) == [
        "by_feature.safetensors",
        "by_row.safetensors",
        "features.json",
    ]
    assert store.verify().equals(before)


def test_the_same_features_are_opened_and_not_made_again(store, sae, tmp_path, monkeypatch):
    first = taken(store, sae)
    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("encoded again"))
    again = taken(store, sae, batch_rows=3)
    assert (again.path, again.record) == (first.path, first.record)
    assert again.store is store


def test_other_features_of_that_name_are_refused(store, sae, tmp_path):
    first = taken(store, sae, name="mine")
    other = loaded(tmp_path / "other", seed=1)
    sums = first.record.sae.fingerprint[:12], other.fingerprint()[:12]
    assert refused(RequestError, lambda: taken(store, other, name="mine")) == (
        f"features mine exist and differ: SAE is topk ({sums[0]}), requested is other ({sums[1]}); choose another name"
    )
    text = refused(RequestError, lambda: taken(store, sae, "z.1", force=True, name="mine", dtype="float16"))
    assert f"site is {SITE.name}, requested is {HEADS.name}; dtype is float32, requested is float16" in text
    with writing(store.path, sites=(SITE, HEADS)) as writer:
        writer.begin(part_of([[4]]), append=True)
        write_segment(writer, [4])
    longer = open_store(store.path)
    assert " of 51 rows, requested is " in refused(RequestError, lambda: taken(longer, sae, name="mine"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "a/b"}, "name 'a/b' cannot be a folder; use letters, digits, '_', '.' and '-' only"),
        ({"name": "a", "out": "b"}, "give name, a folder in the store, or out, a folder anywhere, but not both"),
        ({"dtype": "bfloat16"}, "dtype must be one of float32, float16, not 'bfloat16'"),
        ({"batch_rows": 0}, "batch_rows must be at least 1, not 0"),
    ],
)
def test_settings_out_of_range_are_refused(store, sae, settings, message):
    assert refused(RequestError, lambda: taken(store, sae, **settings)) == message


def test_a_folder_of_something_else_is_left_alone(store, sae, tmp_path):
    (tmp_path / "mine").mkdir()
    assert len(taken(store, sae, out=tmp_path / "mine")) == 51  # empty: nothing to lose
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "today").touch()
    text = refused(RequestError, lambda: taken(store, sae, out=tmp_path / "diary"))
    assert text == f"{tmp_path / 'diary'} exists and is not a folder of features; choose another name or out"


# ---- when things go wrong ---------------------------------------------------------------------------------


def broken_store(path: Path, value: float):
    """The example with one value of row 17 changed in its file."""
    store = open_store(write_store(path, [[20]], sites=(SITE,)))
    file = path / "segments" / "00000" / SITE.file
    data = bytearray(file.read_bytes())
    data[len(data) - 4 * (8 * 2 + 5) : len(data) - 4 * (8 * 2 + 4)] = np.float32(value).tobytes()
    file.write_bytes(data)
    return store


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_refused_by_number(value, sae, tmp_path):
    store = broken_store(tmp_path / "x.acts", value)
    text = refused(DataError, lambda: taken(store, sae, batch_rows=5))
    row = "row 17 of resid_post.1 (row 20, d_model 8) float32"
    assert text == f"{row} is not finite; run workbench verify {store.path}"
    assert list((store.path / "features").iterdir()) == []


def test_features_that_are_not_finite_are_refused_by_row(tmp_path):
    sae = loaded(tmp_path / "sae", normalize_activations="constant_norm_rescale")  # divides by the norm of the row
    store = open_store(write_store(tmp_path / "x.acts", [[20]], sites=(SITE,)))
    file = store.path / "segments" / "00000" / SITE.file
    file.write_bytes(file.read_bytes()[: -8 * 4 * 4] + bytes(8 * 4) + file.read_bytes()[-8 * 4 * 3 :])
    text = refused(DataError, lambda: taken(store, sae, batch_rows=3))
    assert text == "features of SAE 'sae' are not finite for row 16 of resid_post.1"


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("segment_rows", [7, 51, 100])
def test_segments_change_nothing(segment_rows, store, features, sae, monkeypatch):
    monkeypatch.setattr(encoding, "SEGMENT_ROWS", segment_rows)
    found = taken(store, sae, name="mine")[:]
    monkeypatch.setattr(encoding, "ENTRIES", 10)
    monkeypatch.setattr(merging, "ENTRIES", 10)
    other = taken(store, sae, name="other", batch_rows=3)[:]
    for one in (found, other):  # a product of other blocks may round otherwise
        assert np.array_equal(one.indices, features[:].indices)
        np.testing.assert_allclose(one.data, features[:].data, rtol=1e-5)


@pytest.mark.parametrize(
    ("sparsity", "place", "after"),
    [
        (None, (SegmentFolder, "write"), 0),
        (FeatureChoice(3), (SegmentFolder, "write"), 2),
        (MutualChoice(3), (merging, "entry_rows"), 1),
        (None, (merging, "invert"), 0),
        (None, (extract.files, "replace_file"), 1),
        (None, (extract.files, "replace_file"), 2),
        (None, (os, "replace"), 6),
    ],
)
def test_killed_anywhere_it_resumes_to_the_same_bytes(place, after, sparsity, store, sae, monkeypatch):
    """The exception that no one catches and cleans up after stands for the kill."""

    class Killed(BaseException):
        pass

    monkeypatch.setattr(encoding, "SEGMENT_ROWS", 12)
    expected = contents(taken(store, sae, name="whole", batch_rows=4, sparsity=sparsity).path)
    owner, name = place
    plain, calls = getattr(owner, name), []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise Killed
        return plain(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, killed)
        with pytest.raises(Killed):
            taken(store, sae, name="mine", batch_rows=4, sparsity=sparsity)
    assert not (store.path / "features" / "mine").exists()
    encoded = []
    again = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, *given: encoded.append(len(given[0])) or again(self, *given))
    found = taken(store, sae, name="mine", batch_rows=4, sparsity=sparsity)
    assert contents(found.path) == {**expected, "features.json": (found.path / "features.json").read_bytes()}
    assert found.record == open_features(store.path / "features" / "whole").record
    assert sorted(path.name for path in (store.path / "features").iterdir()) == ["mine", "whole"]
    if name in ("entry_rows", "invert"):
        assert encoded == []
    if name == "write":
        assert sum(encoded) == ROWS - 12 * after


def test_what_was_begun_otherwise_is_not_thrown_away(store, sae, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "SEGMENT_ROWS", 12)

    def stop(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(merging, "invert", stop)
        with pytest.raises(KeyboardInterrupt):
            taken(store, sae, name="mine")
    partial = store.path / "features" / ".mine.partial"
    assert sorted(path.name for path in partial.iterdir() if path.suffix != ".partial")[-1] == "extraction.json"
    text = refused(RequestError, lambda: taken(store, sae, name="mine", dtype="float16"))
    assert text == (
        "unfinished features mine are others: dtype is float32, requested is float16; repeat their settings to resume, "
        f"choose another name, or remove {partial}"
    )
    state = json.loads((partial / "extraction.json").read_text())
    state["environment"]["torch"] = "1.0"
    (partial / "extraction.json").write_text(json.dumps(state))
    with warned(r"^features mine were started with other library versions"):
        taken(store, sae, name="mine")


def test_what_a_crash_left_is_cleared(store, sae, features):
    left = store.path / "features" / ".mine.partial"
    (left / "deeper").mkdir(parents=True)
    (left / "by_row.safetensors").write_bytes(b"half")
    refused(RequestError, lambda: open_features(left))
    found = taken(store, sae, name="mine")
    assert not left.exists()
    assert found.record.files == features.record.files  # deterministic, to the byte


# ---- several processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["topk", "temporal"])
def test_shares_encode_their_own_rows_and_the_last_has_the_features(architecture, example, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "SEGMENT_ROWS", 10)
    sae = loaded(tmp_path / "sae", architecture)
    whole, encoded = taken(example, sae, out=tmp_path / "one", batch_rows=4), []
    plain = Encoder.__call__
    monkeypatch.setattr(
        Encoder, "__call__", lambda self, rows, *rest: encoded.append(len(rows)) or plain(self, rows, *rest)
    )
    sizes = []
    for rank in (2, 0):
        assert taken(example, sae, out=tmp_path / "f", batch_rows=4, workers=wb.Share(rank, 3)) is None
        sizes.append(sum(encoded))
    found = taken(example, sae, out=tmp_path / "f", batch_rows=4, workers=wb.Share(1, 3))
    assert 0 < sizes[0] < sizes[1] < sum(encoded) == ROWS
    assert found.record == replace(whole.record, store=found.record.store)
    assert found.path == tmp_path / "f"
    assert not (tmp_path / ".f.partial").exists()
    assert taken(example, sae, out=tmp_path / "f", workers=wb.Share(0, 3)).record == found.record
    assert sum(encoded) == ROWS


@pytest.mark.parametrize("sparsity", [MutualChoice(2), FeatureChoice(3)])
def test_rows_that_compete_across_shares_are_cut_as_in_one_process(sparsity, example, sae, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "SEGMENT_ROWS", 8)
    whole = taken(example, sae, out=tmp_path / "one", sparsity=sparsity)
    for rank in (1, 0):
        found = taken(example, sae, out=tmp_path / "f", sparsity=sparsity, workers=wb.Share(rank, 2))
    assert found.record.files == whole.record.files


def test_a_share_that_dies_leaves_what_it_committed_to_whoever_comes_next(example, sae, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "SEGMENT_ROWS", 4)
    whole, plain, calls = taken(example, sae, out=tmp_path / "one"), Encoder.__call__, []

    def dies(self, rows, *rest):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(len(rows))
        return plain(self, rows, *rest)

    monkeypatch.setattr(Encoder, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        taken(example, sae, out=tmp_path / "f", workers=wb.Share(1, 2))
    monkeypatch.setattr(
        Encoder, "__call__", lambda self, rows, *rest: calls.append(len(rows)) or plain(self, rows, *rest)
    )
    assert taken(example, sae, out=tmp_path / "f", workers=wb.Share(0, 4)) is None
    assert taken(example, sae, out=tmp_path / "f").record.files == whole.record.files
    assert ROWS <= sum(calls) <= ROWS + 4  # at most the segment that was being written is encoded twice


def test_what_two_workers_wrote_of_the_same_rows_counts_once(example, sae, tmp_path, monkeypatch):
    """One that was given up and lives on: its segments may be divided otherwise."""
    monkeypatch.setattr(encoding, "SEGMENT_ROWS", 20)
    whole = taken(example, sae, out=tmp_path / "one")
    encoder = encoding.StoreEncoder(example[SITE.name], sae, show_progress=False)
    folder = SegmentFolder(tmp_path / ".f.partial" / "segments")
    assert taken(example, sae, out=tmp_path / "f", workers=wb.Share(1, 2)) is None
    encoder.write_segments(folder, [(0, 12)], lambda rows: None)
    folder.write((5, 30), encoder.encode_rows(5, example[SITE.name][5:30], [25]))
    assert list(folder.spans()) == [(0, 12), (20, 40)]
    assert taken(example, sae, out=tmp_path / "f").record.files == whole.record.files


def test_missing_rows_and_committed_ones_are_all_rows(tmp_path):
    random = np.random.default_rng(0)
    for _ in range(60):
        for path in tmp_path.glob("*"):
            path.unlink()
        for first, length in random.integers(0, 30, (4, 2)):
            (tmp_path / f"{first:012d}-{first + length + 1:012d}.safetensors").touch()
        cuts = [0, *sorted({int(cut) for cut in random.integers(1, 60, 3)}), 60]
        spans = list(itertools.pairwise(cuts))
        there, left = SegmentFolder(tmp_path).spans(), SegmentFolder(tmp_path).missing(spans)
        assert sorted(row for some in (there, left) for span in some for row in range(*span)) == list(range(60))
        assert all(any(first <= begun < ended <= stop for first, stop in spans) for begun, ended in left)


def test_features_finished_while_waiting_for_the_lock_are_opened(store, sae, monkeypatch):
    """Another process ends between the look at the place and the lock."""
    plain = extract.files.locked

    def late(*arguments, **settings):
        monkeypatch.setattr(extract.files, "locked", plain)
        taken(store, sae, name="mine")
        return plain(*arguments, **settings)

    monkeypatch.setattr(extract.files, "locked", late)
    assert taken(store, sae, name="mine").shape == (51, 20)
    assert [path.name for path in (store.path / "features").iterdir()] == ["mine"]


def test_a_full_disk_is_said_in_one_line(store, sae, monkeypatch):
    def full(*_arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(ArrayFile, "append", full)
    text = refused(DataError, lambda: taken(store, sae, name="mine"))
    assert text == (
        f"disk full while writing features {store.path / 'features' / 'mine'} (No space left on device): what is "
        "committed stays; free space and run the same command to resume"
    )
    assert list((store.path / "features").iterdir()) == []


def test_two_at_once_do_not_write_over_each_other(store, sae):
    partial = store.path / "features" / ".mine.partial"
    partial.mkdir(parents=True)
    (partial / "by_row.safetensors").touch()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "is being written by another process" in refused(RequestError, lambda: taken(store, sae, name="mine"))
    assert (partial / "by_row.safetensors").exists()
    os.close(descriptor)
    assert taken(store, sae, name="mine").shape == (51, 20)


def test_features_of_a_store_that_grew_are_refused(store, sae):
    path = taken(store, sae, name="mine").path
    with writing(store.path, sites=(SITE, HEADS)) as writer:
        writer.begin(part_of([[4]]), append=True)
        write_segment(writer, [4])
    assert refused(RequestError, lambda: open_features(path)) == (
        f"features mine: the store {store.path} had 51 rows then and has 55 now; extract again under another name"
    )


def test_features_of_another_store_are_refused(features, tmp_path):
    other = write_store(tmp_path / "y.acts", SEGMENTS, sites=(SITE,))
    assert refused(RequestError, lambda: open_features(features.path, other)) == (
        f"features topk: the store {other} is not the one they were made from; extract again under another name"
    )


def test_features_move_with_their_store(store, sae, tmp_path):
    first = taken(store, sae, name="mine")
    apart = taken(store, sae, out=tmp_path / "apart").path
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
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


def test_arrays_that_overlap_are_damage(tmp_path):
    layout = {"a": ("int32", 2), "b": ("int32", 2)}
    header = {name: {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]} for name in layout}
    text = json.dumps(header).encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    assert "b does not lie where its header says" in refused(DataError, lambda: map_arrays(tmp_path / "f", layout))


@pytest.mark.parametrize(
    ("file", "name", "entry", "value"),
    [("by_row", "indptr", 3, -1), ("by_feature", "indptr", 0, 1), ("by_row", "indptr", -1, 10**9)],
)
def test_pointers_that_lead_astray_are_refused(copied, file, name, entry, value):
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


def test_a_record_that_cannot_be_read_is_refused(copied, tmp_path):
    path, opened = copied
    record = path / "features.json"
    edited(record, version=2)
    assert refused(RequestError, opened) == f"{record} has format version 2; upgrade the workbench"
    edited(record, version=1, format="other")
    assert "format is 'other', expected 'workbench.features'" in refused(DataError, opened)
    edited(record, format="workbench.features", rows="many")
    assert refused(DataError, opened) == f'{record}: rows: expected a whole number, found "many"'
    record.write_text("{")
    assert "is not JSON" in refused(DataError, opened)
    none = tmp_path / "none"
    assert refused(RequestError, lambda: open_features(none)) == (
        f"no features at {none}: no features.json; make them with workbench features"
    )


def test_a_store_without_rows_has_no_features(tmp_path, sae):
    store = open_store(write_store(tmp_path / "x.acts", [], sites=(SITE,)))
    features = taken(store, sae)
    assert (features.shape, features[:].shape, features.counts.sum()) == ((0, 20), (0, 20), 0)
    assert features.max.sum() == features.mean.sum() == 0
    assert len(features.top(3)) == 0


def test_bfloat16_sites_can_be_read(tmp_path):
    """Their patterns stand for any bfloat16 site: eight numbers a row, two heads of four."""
    store = open_store(write_store(tmp_path / "x.acts", [[9]], sites=(BRAIN, HALF)))
    sae = loaded(tmp_path / "sae", hook_name=BRAIN.name)
    x = (values(BRAIN, 0, 9).astype(np.uint32) << 16).view(np.float32).reshape(9, 8)
    np.testing.assert_allclose(taken(store, sae)[:].toarray(), encode64(tmp_path / "sae", x), rtol=1e-4, atol=1e-4)
