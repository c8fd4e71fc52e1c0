"""Interrupted, repeated and shared extractions end in the same bytes."""

import fcntl
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from features_example import ROWS, SITE, extracted, loaded
from refusals import refused
from store_example import write_store
from warned import warned

import workbench as wb
from workbench.features import encoding, extract, extraction_folder, merging
from workbench.features.feature_segments import SegmentFolder
from workbench.features.feature_store import open_features
from workbench.io.errors import DataError, RequestError
from workbench.io.tensors import ArrayFile
from workbench.sae.encode import Encoder
from workbench.sae.sparsity import FeatureChoice, MutualChoice
from workbench.store.reader import open_store


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
    text = refused(DataError, lambda: extracted(store, sae, batch_rows=5))
    row = "row 17 of resid_post.1 (row 20, d_model 8) float32"
    assert text == f"{row} is not finite; run workbench verify {store.path}"
    assert list((store.path / "features").iterdir()) == []


def test_features_that_are_not_finite_are_refused_by_row(tmp_path):
    sae = loaded(tmp_path / "sae", normalize_activations="constant_norm_rescale")  # divides by the norm of the row
    store = open_store(write_store(tmp_path / "x.acts", [[20]], sites=(SITE,)))
    file = store.path / "segments" / "00000" / SITE.file
    file.write_bytes(file.read_bytes()[: -8 * 4 * 4] + bytes(8 * 4) + file.read_bytes()[-8 * 4 * 3 :])
    text = refused(DataError, lambda: extracted(store, sae, batch_rows=3))
    assert text.startswith("features of SAE 'sae' are not finite for row 16 of resid_post.1; its weights have NaN, or ")


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("segment_rows", [7, 51, 100])
def test_the_size_of_segments_does_not_change_the_features(segment_rows, store, features, sae, monkeypatch):
    monkeypatch.setattr(encoding, "SEGMENT_ROWS", segment_rows)
    small_segments = extracted(store, sae, name="mine")[:]
    monkeypatch.setattr(encoding, "ENTRIES", 10)
    monkeypatch.setattr(merging, "entries_in_memory", lambda _megabytes: 10)
    small_blocks = extracted(store, sae, name="other", batch_rows=3)[:]
    for matrix in (small_segments, small_blocks):  # a product of other blocks may round otherwise
        assert np.array_equal(matrix.indices, features[:].indices)
        np.testing.assert_allclose(matrix.data, features[:].data, rtol=1e-5)


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
def test_a_killed_extraction_resumes_to_the_same_bytes(place, after, sparsity, store, sae, monkeypatch):
    """The exception that no one catches and cleans up after stands for the kill."""

    class Killed(BaseException):
        pass

    monkeypatch.setattr(encoding, "SEGMENT_ROWS", 12)
    expected = contents(extracted(store, sae, name="whole", batch_rows=4, sparsity=sparsity).path)
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
            extracted(store, sae, name="mine", batch_rows=4, sparsity=sparsity)
    assert not (store.path / "features" / "mine").exists()
    encoded = []
    again = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, x, *rest: encoded.append(len(x)) or again(self, x, *rest))
    resumed = extracted(store, sae, name="mine", batch_rows=4, sparsity=sparsity)
    assert contents(resumed.path) == {**expected, "features.json": (resumed.path / "features.json").read_bytes()}
    assert resumed.record == open_features(store.path / "features" / "whole").record
    assert sorted(path.name for path in (store.path / "features").iterdir()) == ["mine", "whole"]
    if name in ("entry_rows", "invert"):
        assert encoded == []
    if name == "write":
        assert sum(encoded) == ROWS - 12 * after


def test_unfinished_features_of_other_settings_are_kept(store, sae, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "SEGMENT_ROWS", 12)

    def stop(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(merging, "invert", stop)
        with pytest.raises(KeyboardInterrupt):
            extracted(store, sae, name="mine")
    partial = store.path / "features" / ".mine.partial"
    assert sorted(path.name for path in partial.iterdir() if path.suffix != ".partial")[-1] == "extraction.json"
    text = refused(RequestError, lambda: extracted(store, sae, name="mine", dtype="float16"))
    assert text == (
        "unfinished features mine are others: dtype is float32, requested is float16; repeat their settings to resume, "
        f"choose another name, or remove {partial}"
    )
    state = json.loads((partial / "extraction.json").read_text())
    state["environment"]["torch"] = "1.0"
    (partial / "extraction.json").write_text(json.dumps(state))
    with warned(r"^features mine were started with other library versions"):
        extracted(store, sae, name="mine")


def test_leftovers_of_a_crash_are_removed(store, sae, features):
    leftovers = store.path / "features" / ".mine.partial"
    (leftovers / "deeper").mkdir(parents=True)
    (leftovers / "by_row.safetensors").write_bytes(b"half")
    refused(RequestError, lambda: open_features(leftovers))
    repeated = extracted(store, sae, name="mine")
    assert not leftovers.exists()
    assert repeated.record.files == features.record.files  # deterministic, to the byte


@pytest.mark.parametrize("architecture", ["topk", "temporal"])
def test_each_share_encodes_its_rows_and_the_last_finishes(architecture, example, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "SEGMENT_ROWS", 10)
    sae = loaded(tmp_path / "sae", architecture)
    whole, encoded = extracted(example, sae, out=tmp_path / "one", batch_rows=4), []
    plain = Encoder.__call__
    monkeypatch.setattr(
        Encoder, "__call__", lambda self, rows, *rest: encoded.append(len(rows)) or plain(self, rows, *rest)
    )
    sizes = []
    for rank in (2, 0):
        assert extracted(example, sae, out=tmp_path / "f", batch_rows=4, workers=wb.Share(rank, 3)) is None
        sizes.append(sum(encoded))
    features = extracted(example, sae, out=tmp_path / "f", batch_rows=4, workers=wb.Share(1, 3))
    assert 0 < sizes[0] < sizes[1] < sum(encoded) == ROWS
    assert features.record == replace(whole.record, store=features.record.store)
    assert features.path == tmp_path / "f"
    assert not (tmp_path / ".f.partial").exists()
    assert extracted(example, sae, out=tmp_path / "f", workers=wb.Share(0, 3)).record == features.record
    assert sum(encoded) == ROWS


@pytest.mark.parametrize("sparsity", [MutualChoice(2), FeatureChoice(3)])
def test_a_sparsity_rule_over_all_rows_holds_across_shares(sparsity, example, sae, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "SEGMENT_ROWS", 8)
    whole = extracted(example, sae, out=tmp_path / "one", sparsity=sparsity)
    for rank in (1, 0):
        features = extracted(example, sae, out=tmp_path / "f", sparsity=sparsity, workers=wb.Share(rank, 2))
    assert features.record.files == whole.record.files


def test_committed_segments_of_a_killed_share_are_kept(example, sae, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "SEGMENT_ROWS", 4)
    whole, plain, calls = extracted(example, sae, out=tmp_path / "one"), Encoder.__call__, []

    def dies(self, rows, *rest):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(len(rows))
        return plain(self, rows, *rest)

    monkeypatch.setattr(Encoder, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        extracted(example, sae, out=tmp_path / "f", workers=wb.Share(1, 2))
    monkeypatch.setattr(
        Encoder, "__call__", lambda self, rows, *rest: calls.append(len(rows)) or plain(self, rows, *rest)
    )
    assert extracted(example, sae, out=tmp_path / "f", workers=wb.Share(0, 4)) is None
    assert extracted(example, sae, out=tmp_path / "f").record.files == whole.record.files
    assert ROWS <= sum(calls) <= ROWS + 4  # at most the segment that was being written is encoded twice


def test_rows_encoded_by_two_processes_count_once(example, sae, tmp_path, monkeypatch):
    """One that was given up and lives on: its segments may be divided otherwise."""
    monkeypatch.setattr(encoding, "SEGMENT_ROWS", 20)
    whole = extracted(example, sae, out=tmp_path / "one")
    encoder = encoding.StoreEncoder(example[SITE.name], sae, show_progress=False)
    folder = SegmentFolder(tmp_path / ".f.partial" / "segments")
    assert extracted(example, sae, out=tmp_path / "f", workers=wb.Share(1, 2)) is None
    encoder.write_segments(folder, [(0, 12)], lambda rows: None)
    folder.write((5, 30), encoder.encode_rows((5, 30), example[SITE.name][5:30].__getitem__, [25]))
    assert list(folder.spans()) == [(0, 12), (20, 40)]
    assert extracted(example, sae, out=tmp_path / "f").record.files == whole.record.files


def test_missing_rows_and_committed_ones_are_all_rows(tmp_path):
    random = np.random.default_rng(0)
    for _ in range(60):
        for path in tmp_path.glob("*"):
            path.unlink()
        for first, length in random.integers(0, 30, (4, 2)):
            (tmp_path / f"{first:012d}-{first + length + 1:012d}.safetensors").touch()
        cuts = [0, *sorted({int(cut) for cut in random.integers(1, 60, 3)}), 60]
        spans = list(itertools.pairwise(cuts))
        committed_spans, missing_spans = SegmentFolder(tmp_path).spans(), SegmentFolder(tmp_path).missing_spans(spans)
        assert sorted(
            row for part in (committed_spans, missing_spans) for span in part for row in range(*span)
        ) == list(range(60))
        assert all(any(first <= begun < ended <= stop for first, stop in spans) for begun, ended in missing_spans)


def test_features_finished_while_waiting_for_the_lock_are_opened(store, sae, monkeypatch):
    """Another process ends between the look at the place and the lock."""
    plain = extract.files.locked

    def late(*arguments, **settings):
        monkeypatch.setattr(extract.files, "locked", plain)
        extracted(store, sae, name="mine")
        return plain(*arguments, **settings)

    monkeypatch.setattr(extract.files, "locked", late)
    assert extracted(store, sae, name="mine").shape == (51, 20)
    assert [path.name for path in (store.path / "features").iterdir()] == ["mine"]


def test_a_full_disk_is_reported_in_one_line(store, sae, monkeypatch):
    def full(*_arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(ArrayFile, "append", full)
    text = refused(DataError, lambda: extracted(store, sae, name="mine"))
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
    assert "is being written by another process" in refused(RequestError, lambda: extracted(store, sae, name="mine"))
    assert (partial / "by_row.safetensors").exists()
    os.close(descriptor)
    assert extracted(store, sae, name="mine").shape == (51, 20)


def test_names_that_are_long_or_not_ascii_give_folders_of_their_own():
    site = SITE
    plain = extraction_folder.target_path(Path("s"), site, "my sae")
    assert plain.name == f"{site.label}-my-sae"
    unusual_names = ["x" * 300, "x" * 301, "\u65e5\u672c", "\u4e2d\u56fd"]
    names = {extraction_folder.target_path(Path("s"), site, name).name for name in unusual_names}
    assert len(names) == len(unusual_names)
    assert max(map(len, names)) < 230  # the hidden folder has ten more
