"""Tests of stores on a disk that cannot be written: finished ones are given back, others refused in a line."""

import pytest
from read_only import read_only
from refusals import refused
from store_example import contents

import workbench as wb
from workbench.io.errors import DataError, RequestError

TEXTS = ["Anna saw Rome on Monday", "Tom"]
OPTIONS = {"sites": ["resid_post.0"], "segment_rows": 4, "show_progress": False}


@pytest.fixture(scope="module")
def model():
    return wb.load_model("demo")


@pytest.fixture
def path(model, tmp_path):
    return wb.record(model, TEXTS, out=tmp_path / "s.acts", **OPTIONS).path


def test_a_finished_store_is_opened_verified_and_given_back(model, path):
    before = contents(path)
    with read_only(path):
        with pytest.raises(OSError, match="Read-only"):
            (path / "x").write_text("")
        store = wb.open_store(path)
        assert store.verify().empty
        assert len(store.where("token = ' Monday'")) == 1
        again = wb.record(model, TEXTS, out=path, **OPTIONS)
        assert (again.rows, again.manifest) == (store.rows, store.manifest)
    assert contents(path) == before


def test_append_other_texts_and_other_settings_are_refused_in_a_line(model, path):
    with read_only(path):
        message = refused(RequestError, lambda: wb.record(model, ["more"], out=path, append=True, **OPTIONS))
        assert message == f"append: {path} is read-only; make it writable, or append to a copy of it"
        assert "holds other texts" in refused(RequestError, lambda: wb.record(model, ["more"], out=path, **OPTIONS))
        shorter = OPTIONS | {"context": 5}
        assert "other settings" in refused(RequestError, lambda: wb.record(model, TEXTS, out=path, **shorter))
        more = OPTIONS | {"sites": ["resid_mid.0"]}
        assert "is read-only and lacks" in refused(RequestError, lambda: wb.record(model, TEXTS, out=path, **more))


def test_an_unfinished_store_and_a_new_one_are_refused_in_a_line(model, path, tmp_path):
    from workbench.store.manifest import read_manifest
    from workbench.store.writer import _with_segments, write_manifest

    manifest = read_manifest(path)
    write_manifest(path, _with_segments(manifest, manifest.segments[:1]))
    with read_only(tmp_path):
        message = refused(RequestError, lambda: wb.record(model, TEXTS, out=path, **OPTIONS))
        assert message == (
            f"{path} is read-only and has {manifest.segments[0].rows} of {manifest.rows} planned rows; make it "
            "writable to resume, or choose another out"
        )
        message = refused(RequestError, lambda: wb.record(model, TEXTS, out=tmp_path / "new", **OPTIONS))
        assert message == f"out={tmp_path}/new cannot be made a directory: Read-only file system; choose another out"


def test_a_disk_that_becomes_read_only_is_one_line(model, path):
    with read_only(path, shows=False):
        message = refused(DataError, lambda: wb.record(model, ["more"], out=path, append=True, **OPTIONS))
    rows = wb.open_store(path).rows
    assert message == (
        f"disk failure while writing the planned tokens of {path} (Read-only file system): {rows} rows are committed "
        "and readable; make it writable and run the same command to resume"
    )
    assert wb.open_store(path).verify().empty
