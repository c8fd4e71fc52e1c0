"""Stores that are merged, packed, saved and removed."""

import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import run
from recorded_operations import SETTINGS, tiny_model
from refusals import refused
from store_example import MODEL, SITES, contents, write_store

from workbench.features.removal import remove
from workbench.io.errors import DataError, RequestError
from workbench.recording.record import record
from workbench.store.manifest import read_manifest
from workbench.store.merged_store import merge
from workbench.store.packed_copy import pack
from workbench.store.reader import open_store

ONE, TWO = [[3, 2], [4]], [[1, 1, 5], [6]]


@pytest.fixture
def stores(tmp_path):
    return [open_store(write_store(tmp_path / name, segments)) for name, segments in (("a", ONE), ("b", TWO))]


def test_a_merged_store_has_the_rows_of_all_and_names_their_store(stores, tmp_path):
    merged = merge(stores, tmp_path / "m")
    assert merged.rows == 22
    assert merged.verify().empty
    for site in SITES:
        rows = torch.cat([store[site.label][:] for store in stores])
        assert torch.equal(merged[site.label][:], rows)
    tokens = merged.tokens.to_pandas()
    assert tokens["row"].tolist() == list(range(22))
    assert tokens["store"].tolist() == ["a"] * 9 + ["b"] * 13
    assert tokens["sequence"].is_monotonic_increasing
    assert tokens["document"][9:].tolist() == (stores[1].tokens["document"].to_numpy() + 1).tolist()
    assert merged.where("store = 'b'").ids.tolist() == list(range(9, 22))
    assert merge(stores, tmp_path / "m").manifest == merged.manifest
    assert merge({"x": merged, "y": stores[0]}, tmp_path / "again", column="from").rows == 31


def test_merging_writes_activations_once(stores, tmp_path):
    merged = merge(stores, tmp_path / "m")
    files = [store.path / "segments/00000/resid_post.0.safetensors" for store in (stores[0], merged)]
    assert files[0].samefile(files[1])
    remove(stores[0])
    assert merged.verify().empty


def test_stores_that_do_not_fit_are_refused_and_nothing_is_written(stores, tmp_path):
    foreign = replace(MODEL, fingerprint="d4" * 32)
    cases = {
        "differ in site pattern.1: none and": write_store(tmp_path / "sites", ONE, sites=SITES[:2]),
        "two models: its weights": write_store(tmp_path / "model", ONE, model=foreign),
        "differ in prefix tokens": write_store(tmp_path / "bos", ONE, tokens_added={"prefix": [2], "suffix": []}),
    }
    for message, path in cases.items():
        assert message in refused(RequestError, lambda path=path: merge([stores[0], path], tmp_path / "m"))
    assert "two or more" in refused(RequestError, lambda: merge(stores[:1], tmp_path / "m"))
    assert "have a column 'source'" in refused(RequestError, lambda: merge(stores, tmp_path / "m", column="source"))
    twice = refused(RequestError, lambda: merge([stores[0], stores[0]], tmp_path / "m"))
    assert twice == "stores: two are named a; rename a folder, or in Python give a mapping of names to stores"
    assert not (tmp_path / "m").exists()
    assert "holds another store" in refused(RequestError, lambda: merge(stores, stores[0].path))


@pytest.mark.parametrize("name", ["p", "p.tar"])
def test_a_packed_store_is_whole(stores, tmp_path, name):
    store = stores[0]
    (store.path / "notes.txt").write_text("mine")
    (store.path / "segments" / ".00009.x.partial").mkdir()
    out = pack(store, tmp_path / name)
    if name.endswith(".tar"):
        with tarfile.open(out) as archive:
            archive.extractall(tmp_path / "other", filter="data")
        out = tmp_path / "other" / "p"
    (store.path / "notes.txt").unlink()
    (store.path / "segments" / ".00009.x.partial").rmdir()
    assert contents(out) == contents(store.path)
    assert "exist" in refused(RequestError, lambda: pack(store, tmp_path / name))
    assert not (out / "segments/00000/tokens.parquet").samefile(store.path / "segments/00000/tokens.parquet")


def test_a_damaged_store_is_not_packed(stores, tmp_path):
    file = stores[0].path / "segments/00000/resid_post.0.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert "damaged" in refused(DataError, lambda: pack(stores[0], tmp_path / "p"))
    assert not (tmp_path / "p").exists()


def test_saving_opens_the_copy(stores, tmp_path):
    saved = stores[0].save(tmp_path / "kept")
    assert saved.path == tmp_path / "kept"
    np.testing.assert_array_equal(np.asarray(saved["resid_post", 0]), np.asarray(stores[0]["resid_post", 0]))


def test_removal_keeps_files_of_others(stores, tmp_path):
    path = stores[0].path
    assert remove(path) == []
    assert not path.exists()
    path = stores[1].path
    (path / "segments" / "00000" / "notes.txt").write_text("mine")
    (path / "mine").mkdir()
    (path / "mine" / "resid_post.0.safetensors").write_text("mine")
    assert len(remove(path)) == 2
    assert sorted(contents(path)) == ["mine/resid_post.0.safetensors", "segments/00000/notes.txt"]
    assert "holds no store" in refused(RequestError, lambda: remove(path))
    assert "is no folder" in refused(RequestError, lambda: remove(tmp_path / "none"))


def test_removal_continues_in_a_folder_that_a_killed_one_has_emptied(tmp_path):
    (tmp_path / "sweep" / "summary").mkdir(parents=True)
    assert remove(tmp_path / "sweep") == []
    assert not (tmp_path / "sweep").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "link").symlink_to(tmp_path)
    assert "nothing was removed" in refused(RequestError, lambda: remove(tmp_path / "mine"))


def test_the_command_line_merges_packs_deletes_sites_and_removes(stores, tmp_path):
    a, b = (str(store.path) for store in stores)
    m, p = str(tmp_path / "m"), str(tmp_path / "p")
    commands = (("merge", a, b, "--out", m), ("pack", m, p), ("rm", p, "--sites", "pattern"), ("rm", m), ("verify", p))
    for command in commands:
        assert run(*command)[0] == 0, command
    assert len(read_manifest(p).sites) == 2
    assert not (tmp_path / "m").exists()
    code, _, err = run("rm", m)
    assert code == 2
    assert len(err.splitlines()) == 1


def test_columns_of_two_kinds_are_refused_by_name_and_in_words(tmp_path):
    model, kinds = tiny_model(), {"a": 1, "b": "x", "c": 0.5}
    one, two, three = (
        record(model, [{"input_ids": [5, 6], "label": value}], out=tmp_path / name, show_progress=False, **SETTINGS)
        for name, value in kinds.items()
    )
    assert refused(RequestError, lambda: merge([one, three, two], tmp_path / "m")) == (
        f"stores: column 'label' holds floats in {tmp_path / 'c'} and text in {tmp_path / 'b'}; merge stores whose "
        "columns agree"
    )
    assert merge([one, three], tmp_path / "m").tokens["label"].to_pylist() == [1.0, 1.0, 0.5, 0.5]
