"""Tests of selections: columns of the place in a sequence, complement, samples, indices, frames and texts."""

import numpy as np
import pytest
from store_example import write_store

from workbench.store.reader import open_store

SEGMENTS = [[3, 2], [4], [1, 5]]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(write_store(tmp_path_factory.mktemp("rows") / "x.acts", SEGMENTS))


def test_the_place_in_the_sequence_is_known_of_every_row(store):
    lengths = [n for segment in SEGMENTS for n in segment]
    length = np.repeat(lengths, lengths)
    from_end = np.concatenate([np.arange(n)[::-1] for n in lengths])
    names = ["sequence_length", "position_from_end", "is_last"]
    assert store.tokens.column_names[9:12] == names
    for tokens, rows in [
        (store.tokens, np.arange(15)),
        (store.where("row IN (4, 2, 14)").tokens, np.array([2, 4, 14])),
    ]:
        assert tokens["sequence_length"].to_pylist() == length[rows].tolist()
        assert tokens["position_from_end"].to_pylist() == from_end[rows].tolist()
        assert tokens["is_last"].to_pylist() == (from_end[rows] == 0).tolist()
    assert store.where("is_last").ids.tolist() == np.flatnonzero(from_end == 0).tolist()
    assert store.where("position_from_end = 2 AND sequence_length >= 4").ids.tolist() == [6, 12]


def test_selections_are_complemented_indexed_and_sampled(store):
    rows = store.where("position > 0")
    assert set((~rows).ids) | set(rows.ids) == set(range(15))
    assert len(~rows & rows) == 0
    assert (~~rows).ids.tolist() == rows.ids.tolist()
    assert rows[[3, 0, -1]].ids.tolist() == rows.ids[[0, 3, -1]].tolist()
    mask = np.arange(len(rows)) % 2 == 0
    assert rows[mask].ids.tolist() == rows.ids[mask].tolist()
    assert len(rows[[]]) == 0
    drawn = [rows.sample(4, seed=seed).ids.tolist() for seed in range(8)]
    assert all(len(set(ids)) == 4 and set(ids) <= set(rows.ids) for ids in drawn)
    assert rows.sample(4, seed=3).ids.tolist() == drawn[3]
    assert len({tuple(ids) for ids in drawn}) > 1
    assert rows.sample(100).ids.tolist() == rows.ids.tolist()
    for index in ([99], np.array([0.5]), np.array([True]), np.array([[0, 1]])):
        with pytest.raises(IndexError):
            rows[index]


def test_every_row_is_drawn_equally_often(store):
    rows = store.where("true")
    counts = np.bincount(np.concatenate([rows.sample(5, seed).ids for seed in range(1500)]), minlength=15)
    assert abs(counts - 500).max() < 4.5 * np.sqrt(1500 * (1 / 3) * (2 / 3))


def test_rows_become_a_frame_and_texts(store):
    rows = store.where("position = 1")
    frame = rows.to_pandas()
    assert frame.index.tolist() == frame["row"].tolist() == rows.ids.tolist()
    tokens = store.tokens.to_pandas()
    assert rows.text() == tokens.loc[rows.ids, "token"].astype(str).tolist()
    for context in (1, 2, 9):
        expected = []
        for row in rows.ids:
            inside = tokens[tokens["sequence"] == tokens["sequence"][row]].loc[row - context : row + context]
            expected.append("".join(f"⟦{t}⟧" if i == row else t for i, t in inside["token"].astype(str).items()))
        assert rows.text(context) == expected
    assert store.where("false").text(3) == []


def test_parameters_reach_the_query(store):
    token = store.tokens["token"][4].as_py()
    assert 4 in store.where("token = ?", [token]).ids
    assert store.where("position = $p", {"p": 4}).ids.tolist() == [14]
