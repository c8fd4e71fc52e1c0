"""Handles of a store that was recorded anew, removed or lost sites after they were opened."""

import numpy as np
import pytest
import torch
from recorded_operations import TEXTS, recorded, tiny_model

from workbench.features.removal import remove
from workbench.io.errors import DataError, RequestError
from workbench.store.lost_values import lost_values
from workbench.store.merged_store import merge
from workbench.store.reader import open_store

OTHER = [[token + 1 for token in text] for text in TEXTS]  # of the same lengths: every file has the same shape


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_an_old_handle_never_reads_the_store_in_its_place(model, tmp_path):
    old, unread = recorded(model, tmp_path / "s.acts"), open_store(tmp_path / "s.acts")
    tokens, rows = old.tokens["token_id"].to_pylist(), old.where("position = 1")
    first, second = old.sites[0].label, old.sites[1].label
    before = old[first][:]
    new = recorded(model, tmp_path / "s.acts", OTHER, overwrite=True)
    assert torch.equal(old[first][:], before)  # its file was open
    assert old.tokens["token_id"].to_pylist() == tokens
    reads = [
        lambda: old[second][:],
        lambda: old[second][np.array([2, 0])],
        lambda: rows[second],
        lambda: rows.tokens,
        lambda: unread[first][:1],
        lambda: unread.tokens,
        lambda: unread.where("position = 0"),
        lambda: lost_values(unread, [first]),
        lambda: old.delete_sites([second]),
        lambda: old.save(tmp_path / "copy"),
        lambda: merge({"old": old, "new": new}, tmp_path / "both"),
    ]
    for read in reads:
        with pytest.raises(DataError, match=r"s\.acts was recorded anew after it was opened, .*; open it again$"):
            read()
    for use in (lambda: new[first][rows], lambda: new.where("true") & rows):
        with pytest.raises(RequestError, match=r"selected before .*s\.acts was recorded anew; select them again$"):
            use()
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.acts"]
    assert new.tokens["token_id"].to_pylist() == [token for text in OTHER for token in text]
    assert new[second][:].shape == old[second].shape


def test_rows_outlive_what_keeps_the_rows_of_a_store(model, tmp_path):
    out = tmp_path / "s.acts"
    rows = recorded(model, out).where("position = 1")
    site = rows.store.sites[1]
    expected = rows[site.label]
    longer = recorded(model, out, OTHER, append=True)
    assert torch.equal(longer[site.label][rows], expected)
    fewer = longer.delete_sites([rows.store.sites[0].label])
    assert torch.equal(fewer[site.label][rows], expected)


def test_files_that_are_gone_are_explained(model, tmp_path):
    old = recorded(model, tmp_path / "s.acts")
    label = old.sites[1].label
    old.delete_sites([label])
    with pytest.raises(DataError, match=rf"^sites were deleted from .*s\.acts after it was opened, 1: {label}; open"):
        old[label][:]
    assert len(old[old.sites[0].label][:1]) == 1
    gone = open_store(tmp_path / "s.acts")
    remove(tmp_path / "s.acts")
    for read in (lambda: gone[gone.sites[0].label][:], lambda: gone.tokens):
        with pytest.raises(DataError, match=r"s\.acts was removed or moved after it was opened; open it where it is"):
            read()
