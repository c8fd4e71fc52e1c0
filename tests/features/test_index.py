"""The two orders of sparse features on disk, against SciPy and sorting."""

import numpy as np
import pytest
from refusals import refused
from safetensors.numpy import load_file
from scipy.sparse import csr_array

from workbench.features.index import _KeyPlan, feature_groups, invert
from workbench.features.records import by_feature_layout, by_row_layout
from workbench.io.errors import DataError, RequestError
from workbench.io.tensors import ArrayFile, map_arrays, new_arrays, stream_arrays


@pytest.mark.parametrize("entries", [1, 7, 60, 10_000])
@pytest.mark.parametrize(("kind", "row_type"), [("uint16", "int32"), ("int32", "int64")])
def test_the_index_equals_scipy_sorted_by_activation(entries, kind, row_type, tmp_path):
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
    index, columns = load_file(tmp_path / "f"), matrix.tocsc()
    assert np.array_equal(index["indptr"], columns.indptr)
    assert (index["row"].dtype, index["value"].dtype) == (np.dtype(row_type), np.float32)
    for first, last in zip(columns.indptr[:-1], columns.indptr[1:], strict=True):
        expected = sorted(zip(-columns.data[first:last], columns.indices[first:last], strict=True))
        assert list(zip(-index["value"][first:last], index["row"][first:last], strict=True)) == expected


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
    index, row = load_file(tmp_path / "f"), rows - last + np.repeat(np.arange(last), lengths)
    expected = sorted(range(len(feature)), key=lambda n: (feature[n], -float(value[n]), row[n]))
    assert np.array_equal(index["row"], row[expected])
    assert np.array_equal(index["value"], value[expected])
    assert np.array_equal(index["indptr"], np.concatenate([[0], np.cumsum(counts)]))


def test_an_index_of_too_many_rows_is_refused(tmp_path):
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
        span = slice(*columns["indptr"][feature : feature + 2])
        assert np.array_equal(features.rows_of(feature)[0], columns["row"][span])
        dense[columns["row"][span], feature] = columns["value"][span]
    assert np.array_equal(by_row.toarray(), dense)
    assert np.array_equal(features[:].toarray(), dense)
    assert by_row.has_sorted_indices


def test_stored_types_are_the_narrowest():
    assert by_row_layout(1, 65_536, 1, "float16")["feature"][0] == "uint16"
    assert by_row_layout(1, 65_537, 1, "float16")["feature"][0] == "int32"
    assert by_feature_layout(2**31 - 1, 1, 1, "float16")["row"][0] == "int32"
    assert by_feature_layout(2**31, 1, 1, "float16")["row"][0] == "int64"
    rows, entries = 10**6, 32 * 10**6  # the promise: 400 bytes a row with both orders at 32 active features
    layouts = [layout(rows, 24_576, entries, "float16") for layout in (by_row_layout, by_feature_layout)]
    assert sum(np.dtype(kind).itemsize * n for layout in layouts for kind, n in layout.values()) <= 400 * rows


def test_an_array_file_takes_the_declared_arrays_only(tmp_path):
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


@pytest.mark.parametrize("entries", [3, 16, 100, 1000])
def test_a_feature_that_does_not_fit_in_memory_is_merged_from_runs(entries, tmp_path):
    """One feature on nearly every row, with few values: the order among equal ones is that of rows. Arrays are read
    from a file in slices; no slice and no sorted piece is longer than what may be in memory."""
    rng = np.random.default_rng(5)
    rows, features = 1200, 4
    dense = np.zeros((rows, features), np.float32)
    dense[:, 2] = rng.integers(0, 9, rows) / 4
    dense[::7, 0] = 1
    matrix = csr_array(dense)
    size = (rows, features, matrix.nnz, "float32")
    with new_arrays(tmp_path / "rows", by_row_layout(*size)) as file:
        file.append("indptr", matrix.indptr.astype(np.int64))
        file.append("feature", matrix.indices.astype(np.uint16))
        file.append("value", matrix.data)
    arrays = stream_arrays(tmp_path / "rows", by_row_layout(*size))
    assert len(arrays["value"]) == matrix.nnz
    sorted_pieces, plain = [], _KeyPlan.sort
    with pytest.MonkeyPatch.context() as patch, new_arrays(tmp_path / "f", by_feature_layout(*size)) as file:
        patch.setattr(_KeyPlan, "sort", lambda self, keys: sorted_pieces.append(len(keys)) or plain(self, keys))
        counts = np.bincount(matrix.indices, minlength=features)
        invert(
            *(arrays[name] for name in ("indptr", "feature", "value")),
            counts,
            file,
            tmp_path / "spill",
            "int32",
            entries,
        )
    index = load_file(tmp_path / "f")
    expected = np.lexsort((matrix.tocoo().row, -matrix.data, matrix.indices))
    assert np.array_equal(index["row"], matrix.tocoo().row[expected])
    assert np.array_equal(index["value"], matrix.data[expected])
    if entries**2 > 2 * rows:  # as many runs as fit in memory with a few keys each
        assert max(sorted_pieces) <= entries
