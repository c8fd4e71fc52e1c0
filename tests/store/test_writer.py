"""Tests of the writer: committed rows stay, others leave no trace, and one writer at a time."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from refusals import refused
from safetensors.numpy import save_file
from store_example import (
    HALF,
    MODEL,
    SITES,
    contents,
    digest,
    part_of,
    token_table,
    values,
    write_segment,
    write_store,
    writing,
)
from warned import warned

from workbench.io import files
from workbench.io.errors import DataError, RequestError
from workbench.io.files import human_bytes
from workbench.sites.settings import Recording
from workbench.store import segment, writer
from workbench.store.manifest import Part, read_manifest
from workbench.store.reader import open_store
from workbench.store.writer import check_space, required_bytes

SEGMENTS = [[3, 2], [4], [1, 1, 5]]


class Crash(BaseException):
    """Stands for the end of the process; no handler for errors catches it."""


# ---- bytes ------------------------------------------------------------------------------------------------


def test_the_same_recording_gives_the_same_bytes(tmp_path):
    first = write_store(tmp_path / "a", SEGMENTS)
    time.sleep(0.01)
    assert contents(first) == contents(write_store(tmp_path / "b", SEGMENTS))


def test_rows_may_come_in_any_order_from_any_thread(tmp_path):
    with writing(tmp_path / "x", sites=[HALF]) as store:
        store.begin(Part(64, 8, 1, 0, 0), append=False)
        with store.segment(64, 8, digest(0, [8] * 8), token_table([8] * 8)) as open_segment:
            stored = values(HALF, 0, 64)

            def write(worker):
                for row in range(worker, 64, 4):
                    open_segment.write(HALF.name, row, stored[row : row + 1])
                    open_segment.count(HALF.name, overflow=1, nonfinite=worker % 2)

            threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert np.array_equal(open_store(tmp_path / "x")["resid_post", 0][:], stored)
    record = json.loads((tmp_path / "x" / "segments" / "00000" / "segment.json").read_text())
    assert (record["overflow"], record["nonfinite"]) == ({HALF.name: 64}, {HALF.name: 32})


def test_a_store_without_rows_is_complete(tmp_path):
    path = write_store(tmp_path / "x", [])
    store = open_store(path)
    assert (len(store), store.manifest.complete, store["resid_post", 0].shape) == (0, True, (0, 3))
    assert store.tokens.num_rows == len(store.where("position > 0")) == store.where("true").tokens.num_rows == 0
    assert store["resid_post", 0][:].shape == store["resid_post", 0][[]].shape == (0, 3)
    assert list(store["resid_post", 0].blocks()) == []
    assert store.verify().empty


def test_a_store_is_complete_once_all_rows_of_its_texts_are_committed(tmp_path):
    path, states = tmp_path / "x", []
    with writing(path) as store:
        states.append(read_manifest(path).complete)  # the texts are being tokenized
        store.begin(part_of([[3, 2], [4]]), append=False)
        states.append(read_manifest(path).complete)
        write_segment(store, [3, 2])
        states.append(read_manifest(path).complete)
        write_segment(store, [4])
    assert states == [False, False, False]
    assert read_manifest(path).complete


def test_an_append_that_is_refused_or_interrupted_before_its_first_commit_leaves_the_store_as_it_was(tmp_path):
    path = write_store(tmp_path / "x", SEGMENTS)
    before = contents(path)
    table = token_table([2], 16, 6).drop_columns("char_start")
    with writing(path) as store:
        store.begin(part_of([[2]]), append=True)
        assert contents(path) == before
        with pytest.raises(RequestError, match="char_start"), store.segment(2, 1, digest(16, [2]), table):
            pass
    assert contents(path) == before
    write_store(path, SEGMENTS)  # the same request gives the store back
    assert contents(path) == before
    write_store(path, [[2]], append=True)  # and other texts can be appended
    assert [segment.part for segment in read_manifest(path).segments] == [0, 0, 0, 1]
    assert open_store(path).verify().empty


def test_the_unembedding_is_written_before_the_first_segment_and_only_once(tmp_path):
    calls = []

    def unembed(path):
        calls.append(path)
        save_file({"W_U": np.eye(3, dtype=np.float32)}, path)

    with writing(tmp_path / "x", unembed=unembed, unembed_reason=None):
        assert read_manifest(tmp_path / "x").unembed == files.sha256_file(tmp_path / "x" / "unembed.safetensors")
    with writing(tmp_path / "x", unembed=unembed, unembed_reason=None):
        assert len(calls) == 1


def test_a_crash_while_writing_the_unembedding_is_repaired(tmp_path):
    def crash(path):
        path.write_bytes(b"half of it")
        raise Crash

    with pytest.raises(Crash), writing(tmp_path / "x", unembed=crash, unembed_reason=None):
        pass
    save = lambda path: save_file({"W_U": np.eye(3, dtype=np.float32)}, path)  # noqa: E731
    write_store(tmp_path / "x", SEGMENTS, unembed=save, unembed_reason=None)
    assert contents(tmp_path / "x") == contents(
        write_store(tmp_path / "y", SEGMENTS, unembed=save, unembed_reason=None)
    )


# ---- crashes ----------------------------------------------------------------------------------------------

STEPS = [
    (files, "write_file", 1),  # the token table
    (segment.TensorFile, "__init__", 2),
    (segment.TensorFile, "write", 4),
    (segment.TensorFile, "finish", 2),
    (files, "write_file", 2),  # segment.json
    (files, "fsync", 1),
    (files, "commit_folder", 1),  # the segment
    (os, "replace", 1),  # its row, which waits for the manifest
    (os, "replace", 2),  # the manifest
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name", "call"), STEPS, ids=[f"{name}-{call}" for _, name, call in STEPS])
@pytest.mark.parametrize("kill", [False, True], ids=["exception", "kill"])
def test_resuming_after_a_crash_is_byte_identical_to_an_uninterrupted_recording(
    tmp_path, monkeypatch, owner, name, call, after, kill
):
    """`kill`: nothing is cleaned up on the way out, as after `kill -9`."""
    path, real, calls = tmp_path / "x", getattr(owner, name), []

    def crash(*arguments, **keywords):
        calls.append(name)
        if len(calls) != call:
            return real(*arguments, **keywords)
        if after:
            real(*arguments, **keywords)
        raise Crash

    def record():
        with writing(path) as store:
            store.begin(part_of(SEGMENTS), append=False)
            write_segment(store, SEGMENTS[0])
            monkeypatch.setattr(owner, name, crash)
            if kill:
                monkeypatch.setattr(files, "remove", lambda path: None)
            write_segment(store, SEGMENTS[1])

    with pytest.raises(Crash):
        record()
    monkeypatch.undo()
    committed = len(read_manifest(path).segments)
    assert committed == (2 if (name, call, after) == ("replace", 2, True) else 1)
    assert np.array_equal(open_store(path)["resid_post", 0][:5], values(HALF, 0, 5))
    assert "error" not in set(open_store(path).verify()["severity"])
    write_store(path, SEGMENTS)
    assert contents(path) == contents(write_store(tmp_path / "y", SEGMENTS))


def test_an_exception_in_the_block_leaves_the_writer_usable(tmp_path):
    with writing(tmp_path / "x") as store:
        store.begin(part_of(SEGMENTS), append=False)
        with pytest.raises(KeyError), store.segment(5, 2, "", token_table(SEGMENTS[0])) as open_segment:
            open_segment.write("blocks.9.hook_resid_post", 0, values(HALF, 0, 5))
        assert not list((tmp_path / "x" / "segments").iterdir())
        for lengths in SEGMENTS:
            write_segment(store, lengths)
    assert contents(tmp_path / "x") == contents(write_store(tmp_path / "y", SEGMENTS))


def test_the_manifest_on_the_disk_decides_what_is_committed_when_replacing_it_fails(tmp_path, monkeypatch):
    """The new manifest is in place and then the disk refuses to confirm it: that segment is committed."""
    real = files.fsync

    def fail(path):
        if path == tmp_path / "x":
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    with writing(tmp_path / "x") as store:
        store.begin(part_of(SEGMENTS), append=False)
        monkeypatch.setattr(files, "fsync", fail)
        with pytest.raises(DataError, match="Input/output error"):
            write_segment(store, SEGMENTS[0])
        monkeypatch.undo()
        assert store.manifest.rows == 5
        for lengths in SEGMENTS[1:]:
            write_segment(store, lengths)
    assert contents(tmp_path / "x") == contents(write_store(tmp_path / "y", SEGMENTS))


def test_a_row_that_was_not_written_is_not_committed(tmp_path):
    def record(store):
        with store.segment(3, 1, "", token_table([3])) as open_segment:
            for site in SITES:
                open_segment.write(site.name, 0, values(site, 0, 3)[: 2 if site.short == "resid_post.1" else 3])

    with writing(tmp_path / "x") as store:
        store.begin(part_of([[3]]), append=False)
        message = refused(DataError, lambda: record(store))
        assert message == "resid_post.1.safetensors: row 2 was not written; nothing was committed"
        assert read_manifest(tmp_path / "x").rows == store.manifest.rows == 0


def test_leftovers_of_others_are_not_removed(tmp_path):
    path = write_store(tmp_path / "x", SEGMENTS)
    for name in (
        "features/pca.partial",
        "segments/notes",
        "notes",
        "segments/00007",
        "segments/00003.partial",
        "t.partial",
    ):
        (path / name).mkdir(parents=True)
    write_store(path, SEGMENTS)
    present = {name for name in ("features/pca.partial", "segments/notes", "notes") if (path / name).exists()}
    assert present == {"features/pca.partial", "segments/notes", "notes"}
    assert not [name for name in ("segments/00007", "segments/00003.partial", "t.partial") if (path / name).exists()]


# ---- resuming and appending -------------------------------------------------------------------------------


def test_appending_in_pieces_gives_the_rows_of_both_parts(tmp_path):
    path = write_store(tmp_path / "x", SEGMENTS)
    write_store(path, [[2], [2, 2]], append=True)
    manifest = read_manifest(path)
    assert [segment.part for segment in manifest.segments] == [0, 0, 0, 1, 1]
    assert [segment.name for segment in manifest.segments] == ["00000", "00001", "00002", "00003", "00004"]
    assert manifest.starts.tolist() == [0, 5, 9, 16, 18, 22]
    assert np.array_equal(open_store(path)["resid_post", 0][:], values(HALF, 0, 22))


def test_an_unfinished_append_is_resumed_by_the_same_call(tmp_path):
    path = write_store(tmp_path / "x", SEGMENTS)
    with writing(path) as store:
        assert store.begin(part_of([[2], [2, 2]]), append=True) == 0
        write_segment(store, [2])
    assert not read_manifest(path).complete
    with writing(path) as store:
        message = refused(RequestError, lambda: store.begin(part_of([[6]]), append=True))
        assert message == (
            f"{path} holds other texts: 6 rows of 3 sequences from 1 document in the store, 6 rows of 1 sequence "
            "from 1 document requested; resume that part with its own texts, or choose another out"
        )
        assert store.begin(part_of([[2], [2, 2]]), append=True) == 1
        store.check(0, digest(16, [2]))
        write_segment(store, [2, 2])
    assert read_manifest(path).complete


def test_a_store_from_before_cut_documents_were_counted_is_resumed(tmp_path):
    path = write_store(tmp_path / "x", SEGMENTS)
    with writing(path) as store:
        current_part = replace(part_of(SEGMENTS), cut_documents=1)
        assert store.begin(current_part, append=False) == len(SEGMENTS)
        fewer = replace(current_part, documents=2)
        assert "holds other texts" in refused(RequestError, lambda: store.begin(fewer, append=False))


def test_other_texts_are_refused(tmp_path):
    path = write_store(tmp_path / "x", SEGMENTS)
    with writing(path) as store:
        message = refused(RequestError, lambda: store.begin(part_of([[9]], documents=4), append=False))
        assert message == (
            f"{path} holds other texts: 16 rows of 6 sequences from 1 document in the store, 9 rows of 1 sequence "
            "from 4 documents requested; pass append=True to add texts, or choose another out"
        )
        assert store.begin(part_of(SEGMENTS), append=False) == 3
        message = refused(RequestError, lambda: store.check(1, digest(5, [3, 1])))
        assert message == (
            f"the texts differ from the recorded ones in segment 00001 of {path} (rows 5 to 8); "
            "give the same texts in the same order, or choose another out"
        )
    write_store(path, [[2]], append=True)
    with writing(path) as store:
        message = refused(RequestError, lambda: store.begin(part_of(SEGMENTS), append=False))
    hint = "pass append=True to add texts; sites are added with texts=None, in a shell by workbench add"
    assert message == f"{path} was appended to and holds 2 parts; {hint}"


def test_more_rows_than_planned_are_refused(tmp_path):
    with writing(tmp_path / "x") as store:
        store.begin(part_of([[3]]), append=False)
        message = refused(RequestError, lambda: write_segment(store, [4]))
    assert message == "segment 00000 has 4 rows; 1 to 3 of the planned 3 are left"


def test_a_segment_with_other_token_columns_is_refused(tmp_path):
    with writing(tmp_path / "x") as store:
        store.begin(part_of([[3], [2]]), append=False)
        write_segment(store, [3])
        table = token_table([2], 3, 1).drop_columns("source")
        with pytest.raises(RequestError, match="the token table's columns are"), store.segment(2, 1, "", table):
            pass


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"recording": Recording(context=16)}, "context: 8 in the store, 16 requested"),
        ({"recording": Recording(context=8, metadata=())}, "metadata: none in the store, [] requested"),
        (
            {"model": replace(MODEL, fingerprint="ff" * 32)},
            "the model is not the recorded one: its weights are other ones (ffffffffffff, not a1a1a1a1a1a1)",
        ),
        (
            {"model": replace(MODEL, config_fingerprint="ee")},
            "the model is not the recorded one: its config is another one (ee, not b2b2b2b2b2b2)",
        ),
        (
            {"model": replace(MODEL, dtype="bfloat16")},
            "the model is not the recorded one: it computes in bfloat16, not in float32",
        ),
        ({"model": replace(MODEL, tokenizer_fingerprint=None)}, "tokenizer: c3c3c3c3c3c3 in the store, none requested"),
        (
            {"tokens_added": {"prefix": [], "suffix": [2]}},
            "prefix tokens: [1] in the store, [] requested; suffix tokens: []",
        ),
        (
            {"sites": [replace(HALF, dtype="float32"), *SITES[1:]]},
            "site resid_post.0: ('row', 'd_model') (3,) float16 in the store, "
            "('row', 'd_model') (3,) float32 requested",
        ),
    ],
)
def test_resuming_with_other_settings_is_refused_with_the_difference(tmp_path, changed, difference):
    path = write_store(tmp_path / "x", SEGMENTS)
    before = contents(path)
    message = refused(RequestError, lambda: write_store(path, SEGMENTS, **changed))
    assert message.startswith(f"{path} was recorded with other settings: {difference}")
    assert message.endswith("; request the same, or choose another out")
    assert contents(path) == before


def test_a_name_may_change_but_other_versions_give_a_warning(tmp_path):
    path = write_store(tmp_path / "x", SEGMENTS)
    write_store(
        path, SEGMENTS, model=replace(MODEL, name="moved"), recording=Recording(sites=("resid_post.0:2",), context=8)
    )
    with warned(r"started with other library versions: torch: 2.13.0 in the store, 2.14.0 requested; further"):
        write_store(path, SEGMENTS, environment={"torch": "2.14.0"})
    assert read_manifest(path).model.name == "demo"


# ---- places -----------------------------------------------------------------------------------------------


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    message = refused(RequestError, lambda: write_store(tmp_path, SEGMENTS))
    assert message == (
        f"out={tmp_path} is not empty and not a store: it holds thesis.tex and no manifest.json; choose another out"
    )
    assert list(contents(tmp_path)) == ["thesis.tex"]


def test_an_empty_folder_is_accepted_and_a_file_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    write_store(tmp_path / "x", SEGMENTS)
    (tmp_path / "file").write_text("")
    message = refused(RequestError, lambda: write_store(tmp_path / "file", SEGMENTS))
    assert message == f"out={tmp_path / 'file'} cannot be made a directory: File exists; choose another out"


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    """The first is another process, ended as by `kill -9`: the lock goes with it."""
    code = (
        "import sys, time; from pathlib import Path; from store_example import writing\n"
        "with writing(Path(sys.argv[1])) as store: print('open', flush=True); time.sleep(60)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1] / "support"), os.getcwd()]),
    }
    first = subprocess.Popen([sys.executable, "-c", code, tmp_path / "x"], stdout=subprocess.PIPE, env=environment)
    try:
        assert first.stdout.readline() == b"open\n"
        message = refused(RequestError, lambda: write_store(tmp_path / "x", SEGMENTS))
        assert message == f"{tmp_path / 'x'} is being written by another process; wait for it or choose another out"
    finally:
        first.kill()
        first.communicate()
    write_store(tmp_path / "x", SEGMENTS)


# ---- room -------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_what_was_committed_stays(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from store_example import *\n"
        "from workbench.io.errors import DataError\n"
        "segments = [[8] * 4, [8] * 2000]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "try: write_store(Path(sys.argv[1]), segments)\n"
        "except DataError as error: print(error)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1] / "support"), os.getcwd()]),
    }
    path = tmp_path / "x"
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=environment)
    assert result.stdout == (
        f"disk full while writing segment 00001 of {path} (File too large): 32 rows are committed and readable; "
        "free space and run the same command to resume\n"
    )
    assert np.array_equal(open_store(path)["resid_post", 0][:], values(HALF, 0, 32))
    assert not list(path.glob("**/*.partial"))
    write_store(path, [[8] * 4, [8] * 2000])
    assert contents(path) == contents(write_store(tmp_path / "y", [[8] * 4, [8] * 2000]))


def test_a_failing_disk_is_reported_with_what_to_do_and_other_errors_are_raised_unchanged(tmp_path, monkeypatch):
    for number, expected in ((errno.EIO, DataError), (errno.EPERM, OSError)):
        monkeypatch.setattr(segment.TensorFile, "finish", lambda *_, n=number: (_ for _ in ()).throw(OSError(n, "no")))
        with pytest.raises(expected) as raised:
            write_store(tmp_path / str(number), SEGMENTS)
        if expected is DataError:
            assert str(raised.value) == (
                f"disk failure while writing segment 00000 of {tmp_path / str(number)} (Input/output error): 0 rows "
                "are committed and readable; check the disk and run the same command to resume"
            )


def test_required_bytes_is_slightly_more_than_the_store(tmp_path):
    wide = replace(HALF, shape=(64,))
    size = sum(map(len, contents(write_store(tmp_path / "x", [[8] * 500], sites=[wide])).values()))
    assert size <= required_bytes([wide], 4000) <= 1.25 * size
    assert required_bytes(SITES, 8000) - required_bytes(SITES, 0) == 8000 * (6 + 12 + 16 + 24)


def test_too_little_space_is_refused_naming_need_and_free(tmp_path):
    check_space(tmp_path / "not" / "there" / "yet", 1 << 20)
    message = refused(RequestError, lambda: check_space(tmp_path / "not" / "x.acts", 1 << 60))
    pattern = (
        rf"{re.escape(str(tmp_path))}/not/x.acts needs 1048576.0 TiB and its disk has [\d.]+ [GMT]iB free; "
        r"record fewer sites or rows, use a smaller dtype, or choose another out"
    )
    assert re.fullmatch(pattern, message)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (256 << 20, "256.0 MiB"),
        (3 << 40, "3.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_bytes_are_printed_in_binary_units(count, text):
    assert human_bytes(count) == text


def test_the_writer_module_is_what_the_recorder_imports():
    assert writer.SegmentWriter is segment.SegmentWriter
