"""Values that a recording could not keep: refused, left out with a count, or named."""

import numpy as np
import planted
import pytest

from workbench.io.errors import DataError, RequestError
from workbench.store.lost_values import finite_rows, lost_values


@pytest.fixture
def store(tmp_path):
    """Four documents of 5 rows in two segments, in float16. resid_post.0: row 3 has two NaN, row 12 an infinity.
    resid_post.1: rows 0, 1 and 19 have values beyond 65,504, and row 2 has 65,504 itself."""
    sites = {f"resid_post.{layer}": np.ones((20, 4), np.float32) for layer in range(3)}
    sites["resid_post.0"][3, :2] = np.nan
    sites["resid_post.0"][12, 1] = -np.inf
    sites["resid_post.1"][[0, 1, 19], 3] = [1e5, -1e6, 70_000]
    documents = [range(5)] * 4
    return planted.planted_store(tmp_path / "s.acts", documents, sites, dtype="float16", segments=2)


SITES = ["resid_post.0", "resid_post.1", "resid_post.2"]


def test_lost_values_of_all_rows_are_counted_by_site(store):
    lost = lost_values(store, SITES)
    assert list(lost) == ["resid_post.0", "resid_post.1"]
    assert (lost["resid_post.0"].nonfinite, lost["resid_post.0"].clipped) == (3, 0)
    assert lost["resid_post.0"].nonfinite_rows.tolist() == [3, 12]
    assert (lost["resid_post.1"].nonfinite, lost["resid_post.1"].clipped) == (0, 3)
    assert lost["resid_post.1"].limit == 65_504


def test_counts_are_those_of_the_rows_that_are_read_not_of_their_segments(store):
    assert lost_values(store, SITES, np.array([4, 5, 6])) == {}
    lost = lost_values(store, SITES, np.array([[1, 3], [13, 14]]))
    assert lost["resid_post.0"].nonfinite_rows.tolist() == [3]
    assert lost["resid_post.1"].clipped == 1


def test_a_value_that_is_the_largest_of_its_type_is_not_clipped_where_nothing_was_counted(tmp_path):
    largest = np.full((6, 2), 65_504, np.float32)
    store = planted.planted_store(tmp_path / "l.acts", [range(6)], {"resid_post.0": largest}, dtype="float16")
    assert lost_values(store, ["resid_post.0"]) == {}


def test_sites_with_nonfinite_values_are_refused_in_one_line_that_names_site_and_count(store):
    with pytest.raises(RequestError) as refused:
        finite_rows(store, SITES)
    text = str(refused.value)
    assert "resid_post.0 has 3 NaN or infinite values in 2 of the 20 rows that are read" in text
    assert "allow_nonfinite" in text
    assert "\n" not in text


def test_rows_without_a_nonfinite_value_are_read_though_their_segment_has_some(store):
    checked = finite_rows(store, SITES, np.array([7, 6, 4]))
    assert checked.rows.tolist() == [7, 6, 4]
    assert checked.notes == []


def test_allowed_nonfinite_rows_are_left_out_and_counted_and_clipped_ones_are_named(store):
    checked = finite_rows(store, SITES, allow_nonfinite=True)
    assert checked.rows.tolist() == [row for row in range(20) if row not in (3, 12)]
    assert checked.left_out.tolist() == [3, 12]
    assert checked.clipped(["resid_post.1"]) == 3
    assert checked.clipped(["resid_post.0", "resid_post.2"]) == 0
    left_out, clipped = checked.notes
    assert left_out == "2 rows with NaN or infinite values left out (resid_post.0)"
    assert "3 values are clipped to ±65,504 (resid_post.1)" in clipped


def test_a_selection_without_a_finite_row_is_refused(store):
    with pytest.raises(RequestError, match="every row that is read has a NaN"):
        finite_rows(store, SITES, np.array([3, 12]), allow_nonfinite=True)


def test_a_missing_segment_record_names_its_file(store):
    (store.path / "segments" / "00001" / "segment.json").unlink()
    with pytest.raises(DataError, match=r"00001/segment\.json"):
        finite_rows(store, SITES)
    assert len(finite_rows(store, SITES, np.arange(4, 7)).rows) == 3
