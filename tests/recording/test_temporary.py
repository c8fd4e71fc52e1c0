"""Stores in temporary folders, stores in place of others, and the unembedding that stores of a folder share."""

import gc
import os
import subprocess
import sys

import pytest
import torch
from recorded_operations import SETTINGS, TEXTS, tiny_model
from store_example import contents

import workbench as wb
from workbench.io.errors import RequestError
from workbench.model.unembed import load_unembed
from workbench.recording.record import record
from workbench.store.reader import open_store


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def recorded(model, out=None, texts=TEXTS, **options):
    return record(model, texts, out=out, show_progress=False, **(SETTINGS | options))


def test_a_store_without_out_lives_as_long_as_any_handle_of_it(model, tmp_path):
    store = recorded(model)
    path = store.path
    assert "temporary" in repr(store)
    assert ".save(PATH)" in repr(store)
    expected = recorded(model, tmp_path / "s.acts")
    torch.testing.assert_close(store["resid_post", 1][:], expected["resid_post", 1][:], rtol=0, atol=0)
    handles = [store, open_store(path), store["resid_post", 1], store.where("position = 0")]
    del store
    while handles:
        assert (path / "segments").exists(), handles[0]
        del handles[0]
    assert not (path / "segments").exists()


def test_a_fork_does_not_remove_the_folder_of_its_parent(model):
    store = recorded(model)
    child = os.fork()
    if child == 0:
        del store
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert store.verify().empty


def test_temporary_stores_are_gone_when_the_process_ends(tmp_path):
    program = (
        "import sys; sys.path[:0] = ['tests/support']\n"
        "from recorded_operations import *\n"
        "from workbench.recording.record import record\n"
        "store = record(tiny_model(), TEXTS, show_progress=False, **SETTINGS)\n"
        "print(store.path)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert answer.stdout.startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_out_none_refuses_what_needs_a_path(model):
    with pytest.raises(RequestError, match="out=None does not go with append"):
        recorded(model, append=True)


def test_overwrite_replaces_a_store_and_keeps_files_of_others(model, tmp_path):
    out = tmp_path / "s.acts"
    recorded(model, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="other texts"):
        recorded(model, out, TEXTS[:2])
    store = recorded(model, out, TEXTS[:2], overwrite=True)
    assert store.path == out
    assert store.rows == sum(map(len, TEXTS[:2]))
    assert store.verify().empty
    assert (out / "notes.txt").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.acts"]
    (out / "notes.txt").unlink()
    fresh = recorded(model, tmp_path / "fresh.acts", TEXTS[:2])
    assert contents(out) == contents(fresh.path)


def test_an_overwrite_that_fails_leaves_the_old_store(model, tmp_path):
    out = tmp_path / "s.acts"
    before = contents(recorded(model, out).path)
    with pytest.raises(RequestError):
        recorded(model, out, [[5, 99_999]], overwrite=True)
    assert contents(out) == before
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("mine")
    with pytest.raises(RequestError, match="is not empty and not a store"):
        recorded(model, tmp_path / "folder", overwrite=True)


def test_stores_of_a_model_in_one_folder_have_the_unembedding_once(model, tmp_path):
    first, second = (recorded(model, tmp_path / name, TEXTS[:1]) for name in ("one", "two"))
    files = [(store.path / "unembed.safetensors").stat() for store in (first, second)]
    assert files[0].st_ino == files[1].st_ino
    assert files[0].st_mode & 0o777 == 0o644
    assert first.manifest.unembed == second.manifest.unembed
    assert second.verify().empty


def test_a_damaged_unembedding_or_one_of_another_model_is_not_linked(model, tmp_path):
    first = recorded(model, tmp_path / "one", TEXTS[:1])
    file = first.path / "unembed.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.unlink()
    file.write_bytes(damaged)
    two = recorded(model, tmp_path / "two", TEXTS[:1])
    assert two.verify().empty
    changed = tiny_model()
    with torch.no_grad():
        changed.module.lm_head.weight[3, 3] += 1
    three = recorded(changed, tmp_path / "three", TEXTS[:1])
    assert three.manifest.unembed != two.manifest.unembed
    assert three.verify().empty


def test_a_store_may_leave_the_unembedding_out_and_get_it_later(model, tmp_path):
    store = recorded(model, tmp_path / "s.acts", unembed=False)
    assert not (store.path / "unembed.safetensors").exists()
    with pytest.raises(RequestError, match="holds no unembedding: it was recorded with unembed=False"):
        load_unembed(store.path)
    assert recorded(model, store.path, unembed=False).manifest == store.manifest
    fingerprint = store.manifest.fingerprint
    store = recorded(model, store.path)
    assert load_unembed(store.path).vocab == 60
    assert store.verify().empty
    assert store.manifest.fingerprint == fingerprint
    assert recorded(model, store.path, unembed=False).manifest.unembed is not None
    assert wb.open_store(store.path).manifest == store.manifest
