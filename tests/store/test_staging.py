"""Tests of staging: segments written in any order by any process give the store that one writer makes in order."""

import shutil

import pytest
from store_example import contents, digest, part_of, token_table, values, write_store, writing

from workbench.io.errors import DataError, RequestError
from workbench.store.groups import token_files
from workbench.store.manifest import SEGMENTS, read_manifest
from workbench.store.query import select_rows
from workbench.store.staging import PlannedSegment, stage_segment, submit_segment, submitted_row

LENGTHS = [[3, 2], [4], [1, 1, 1], [5]]


def planned(segments=LENGTHS) -> list[PlannedSegment]:
    plan, row, sequence = [], 0, 0
    for index, lengths in enumerate(segments):
        plan.append(PlannedSegment(f"{index:05d}", 0, sum(lengths), len(lengths), row, sequence, digest(row, lengths)))
        row, sequence = row + sum(lengths), sequence + len(lengths)
    return plan


def stage(path, plan: PlannedSegment, lengths, tokens=None) -> None:
    manifest = read_manifest(path)
    tokens = token_table(lengths, plan.first_row, plan.first_sequence) if tokens is None else tokens
    with stage_segment(path, manifest, plan, tokens) as segment:
        for site in manifest.sites:
            segment.write(site.name, 0, values(site, plan.first_row, plan.rows))


def write(path, index: int) -> None:
    stage(path, planned()[index], LENGTHS[index])
    submit_segment(path, planned()[index])


@pytest.fixture
def expected(tmp_path):
    return contents(write_store(tmp_path / "expected", LENGTHS))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_any_order_gives_the_bytes_of_one_writer_and_readers_see_no_gap(tmp_path, expected, order, shared):
    path, written = tmp_path / "x", set()
    with writing(path, shared=shared) as store:
        store.begin(part_of(LENGTHS), append=False)
        assert store.resume_segments(planned()) == planned()
        for index in order:
            write(path, index)
            store.commit_submitted()
            written.add(index)
            first_gap = next(i for i in range(5) if i not in written)
            assert read_manifest(path).rows == sum(map(sum, LENGTHS[:first_gap]))
    assert contents(path) == expected


def test_finished_segments_are_kept_and_the_others_written_again(tmp_path, expected):
    """As after the death of everybody: one listed, one finished, one named but not handed in, one half written."""
    path = tmp_path / "x"
    with writing(path) as store:
        store.begin(part_of(LENGTHS), append=False)
        store.resume_segments(planned())
        write(path, 0)
        store.commit_submitted()
        write(path, 2)
        stage(path, planned()[3], LENGTHS[3])
        (path / SEGMENTS / "00001.0a1b2c3d.partial").mkdir()
    folder = (path / SEGMENTS / "00002").stat().st_ino
    with writing(path) as store:
        assert store.begin(part_of(LENGTHS), append=False) == 1
        remaining = store.resume_segments(planned())
        assert [segment.name for segment in remaining] == ["00001", "00003"]
        assert sorted(entry.name for entry in (path / SEGMENTS).iterdir()) == ["00000", "00002", "00002.json"]
        for index in (3, 1):
            write(path, index)
        store.commit_submitted()
    assert (path / SEGMENTS / "00002").stat().st_ino == folder
    assert contents(path) == expected


@pytest.mark.parametrize("harm", ["cut", "missing", "other texts", "damaged row"])
def test_a_finished_segment_that_differs_from_the_plan_is_written_again(tmp_path, expected, harm):
    path = tmp_path / "x"
    with writing(path) as store:
        store.begin(part_of(LENGTHS), append=False)
        store.resume_segments(planned())
        write(path, 1)
        folder, plan = path / SEGMENTS / "00001", planned()
        if harm == "cut":
            (folder / "resid_post.0.safetensors").write_bytes(b"")
        elif harm == "missing":
            shutil.rmtree(folder)
        elif harm == "damaged row":
            folder.with_name("00001.json").write_text("{}")
        else:
            plan[1] = PlannedSegment(**{**vars(plan[1]), "digest": "other"})
        assert [segment.name for segment in store.resume_segments(plan)] == ["00000", "00001", "00002", "00003"]
        assert not folder.exists()
        assert submitted_row(path, "00001") is None


def test_a_row_that_was_not_planned_is_never_committed(tmp_path):
    path = tmp_path / "x"
    with writing(path) as store:
        store.begin(part_of(LENGTHS), append=False)
        stage(path, planned()[0], LENGTHS[0])
        submit_segment(path, planned()[0])
        store.commit_submitted()  # before resume_segments said that it is what is asked for
        assert read_manifest(path).segments == ()


def test_of_two_writers_of_a_segment_the_first_to_finish_wins(tmp_path, expected):
    path, plan = tmp_path / "x", planned()
    with writing(path) as store:
        store.begin(part_of(LENGTHS), append=False)
        store.resume_segments(plan)
        write(path, 0)
        first = (path / SEGMENTS / "00000").stat().st_ino
        write(path, 0)
        assert (path / SEGMENTS / "00000").stat().st_ino == first
        assert not list(path.rglob("*.partial"))
        table = token_table([4, 1])
        stage(path, plan[0], [4, 1], table)  # of other tokens: what is there is of no use
        assert (path / SEGMENTS / "00000").stat().st_ino != first
        for index in range(4):
            if index == 0:
                shutil.rmtree(path / SEGMENTS / "00000")
            write(path, index)
        store.commit_submitted()
    assert contents(path) == expected


def test_an_unfinished_segment_cannot_be_submitted(tmp_path):
    path, plan = tmp_path / "x", planned()[0]
    with writing(path) as store:
        store.begin(part_of(LENGTHS), append=False)
        with pytest.raises(KeyError), stage_segment(path, store.manifest, plan, token_table(LENGTHS[0])):
            raise KeyError
        assert list((path / SEGMENTS).iterdir()) == []
        with pytest.raises(
            DataError, match=r"segment\.json cannot be read: No such file or directory; record it again"
        ):
            submit_segment(path, plan)


# ---- several writers --------------------------------------------------------------------------------------


def test_processes_that_share_a_store_commit_the_segments_of_each_other(tmp_path, expected):
    path = tmp_path / "x"
    with writing(path, shared=True) as first, writing(path, shared=True) as two:
        for store in (first, two):
            store.begin(part_of(LENGTHS), append=False)
            assert store.resume_segments(planned()) == planned()
        for store, index in ((two, 1), (first, 0), (two, 3), (first, 2)):
            write(path, index)
            store.commit_submitted()
        assert first.manifest == read_manifest(path)
        two.commit_submitted()
        assert two.manifest == first.manifest
    assert contents(path) == expected


def test_a_late_process_removes_nothing_that_others_are_writing(tmp_path, expected):
    path, plan = tmp_path / "x", planned()
    with writing(path, shared=True) as early, writing(path, shared=True) as late:
        early.begin(part_of(LENGTHS), append=False)
        assert early.resume_segments(plan, plan[0::2]) == plan[0::2]
        stage(path, plan[0], LENGTHS[0])  # named, not yet handed in
        for name in ("00002.0a1b2c3d.partial", "00003.0a1b2c3d.partial"):
            (path / SEGMENTS / name).mkdir()
        late.begin(part_of(LENGTHS), append=False)
        assert late.resume_segments(plan, plan[1::2]) == plan[1::2]
        assert sorted(entry.name for entry in (path / SEGMENTS).iterdir()) == ["00000", "00002.0a1b2c3d.partial"]
        (path / SEGMENTS / "00002.0a1b2c3d.partial").rmdir()
        submit_segment(path, plan[0])
        for index in (1, 2, 3):
            write(path, index)
        late.commit_submitted()
    assert contents(path) == expected


def test_sharing_and_writing_alone_exclude_each_other(tmp_path):
    for first, second in ((True, False), (False, True), (False, False)):
        with (
            writing(tmp_path / "x", shared=first),
            pytest.raises(RequestError, match="is being written by another process; wait for it"),
            writing(tmp_path / "x", shared=second),
        ):
            pass


def test_processes_that_share_a_store_may_neither_append_nor_change_the_recording(tmp_path):
    path = tmp_path / "x"
    with writing(path, shared=True) as first, writing(path, shared=True) as two:
        with pytest.raises(RequestError, match="several processes that share a store cannot append to it"):
            first.begin(part_of(LENGTHS), append=True)
        first.begin(part_of(LENGTHS), append=False)
        two.begin(part_of([[9]]), append=False)  # nothing is committed yet, so it takes the place
        with pytest.raises(
            RequestError, match="another process makes another recording there; all processes that share"
        ):
            first.resume_segments(planned())


def test_verify_distinguishes_submitted_segments_from_leftovers(tmp_path):
    from workbench.store.verify import verify

    path = tmp_path / "x"
    with writing(path) as store:
        store.begin(part_of(LENGTHS), append=False)
        store.resume_segments(planned())
        write(path, 2)
    problems = [(row.file, row.finding, row.severity) for row in verify(path).itertuples()]
    assert problems == [("manifest.json", "incomplete", "note"), ("00002", "waiting", "note")]


# ---- groups of token tables -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A store of 130 segments: two groups, and two segments by themselves."""
    return write_store(tmp_path_factory.mktemp("many") / "x", [[1 + i % 3] for i in range(130)])


def test_a_query_reads_groups_where_they_exist_with_the_same_result(many, tmp_path):
    manifest = read_manifest(many)
    files = [file for file, _ in token_files(many, manifest)]
    assert [file.parent.name for file in files] == ["tokens", "tokens", "00128", "00129"]
    rows = {predicate: select_rows(many, manifest, predicate) for predicate in ("position = 2", "token = ' Monday'")}
    plain = tmp_path / "x[1]"  # and a path that DuckDB could take for a pattern
    shutil.copytree(many, plain)
    shutil.rmtree(plain / "tokens")
    assert len(token_files(plain, manifest)) == 130
    for predicate, expected in rows.items():
        assert len(expected)
        assert select_rows(plain, manifest, predicate).tolist() == expected.tolist()
    (plain / "tokens").mkdir()
    shutil.copy(files[1], plain / "tokens")  # one of two
    assert len(token_files(plain, manifest)) == 64 + 1 + 2
    assert select_rows(plain, manifest, "position = 2").tolist() == rows["position = 2"].tolist()


def test_groups_do_not_depend_on_when_they_were_written(many, tmp_path):
    shutil.copytree(many, tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "tokens")
    (tmp_path / "x" / "tokens").mkdir()
    (tmp_path / "x" / "tokens" / "half.parquet.partial").touch()
    with writing(tmp_path / "x"):  # as after a crash between a commit and its group
        pass
    assert contents(tmp_path / "x") == contents(many)


def test_verify_compares_groups_with_the_segments_they_are_made_of(many, tmp_path):
    from workbench.store.verify import verify

    assert verify(many).empty
    path = tmp_path / "x"
    shutil.copytree(many, path)
    first, second = (file for file, _ in token_files(path, read_manifest(path))[:2])
    swapped = first.with_name(f"{first.stem.rpartition('-')[0]}-{second.stem.rpartition('-')[2]}.parquet")
    first.unlink()
    shutil.copy(second, swapped)  # sound, with the tokens of other segments
    second.write_bytes(second.read_bytes()[:100])
    (path / "tokens" / "notes").touch()
    problems = [(row.file, row.finding, row.severity) for row in verify(path).itertuples()]
    assert problems == [
        (f"tokens/{swapped.name}", "wrong tokens", "error"),
        (f"tokens/{second.name}", "checksum differs", "error"),
        ("tokens/notes", "unlisted", "note"),
    ]
    assert "not those of segment 00000; remove it" in verify(path)["detail"][0]
