"""Tests of files and folders that are replaced as a whole or not at all."""

import errno
import os
import threading
from contextlib import contextmanager

import pytest

from workbench.io import files
from workbench.io.errors import DataError, RequestError
from workbench.io.files import (
    commit_folder,
    explain_full_disk,
    new_file,
    replace_file,
    replace_folder,
    scratch_folder,
    write_file,
)


class Kill(BaseException):
    """Stands for the end of the process: no handler for errors catches it."""


@pytest.fixture
def synced(monkeypatch):
    """Names of the files and directories that were synchronised with the disk, in order."""
    names, real = [], os.fsync

    def fsync(descriptor):
        names.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return names


def kill(
    monkeypatch, name: str, call: int = 1, after: bool = False, error: BaseException | None = None, module=os
) -> None:
    """Lets the `call`-th call of `os.NAME` fail, before or after it did its work."""
    calls, real = [], getattr(module, name)

    def killed(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) != call:
            return real(*arguments, **keywords)
        if after:
            real(*arguments, **keywords)
        raise error or Kill

    monkeypatch.setattr(module, name, killed)


def fill(path, **contents: str) -> None:
    """Writes files, `__` in a name meaning a subfolder."""
    for name, text in contents.items():
        file = path / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def contents(path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in sorted(path.rglob("*")) if file.is_file()}


# ---- files ------------------------------------------------------------------------------------------------


def test_a_file_is_written_and_replaced(tmp_path, synced):
    replace_file(tmp_path / "a", b"old")
    replace_file(tmp_path / "a", memoryview(b"new"))
    assert contents(tmp_path) == {"a": "new"}
    assert len(synced) == 4
    assert synced[1] == synced[3] == tmp_path.name
    assert synced[0].startswith(".a.")
    assert synced[0].endswith(files.PARTIAL)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_exception_while_a_file_is_replaced_leaves_the_old_one_alone(tmp_path, monkeypatch, step):
    replace_file(tmp_path / "a", b"old")
    kill(monkeypatch, step)
    with pytest.raises(Kill):
        replace_file(tmp_path / "a", b"new")
    assert contents(tmp_path) == {"a": "old"}


def test_a_killed_writer_leaves_the_old_file_and_the_next_writer_succeeds(tmp_path, monkeypatch):
    replace_file(tmp_path / "a", b"old")
    with monkeypatch.context() as patched:
        kill(patched, "replace")
        patched.setattr(files, "remove", lambda path: None)
        with pytest.raises(Kill):
            replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_text() == "old"
    replace_file(tmp_path / "a", b"newer")
    assert (tmp_path / "a").read_text() == "newer"


def test_two_processes_that_replace_a_file_at_once_do_not_collide(tmp_path):
    with new_file(tmp_path / "a") as first, new_file(tmp_path / "a") as second:
        first.write(b"first")
        second.write(b"second")
    assert contents(tmp_path) == {"a": "first"}


def test_a_link_is_replaced_and_never_followed(tmp_path, monkeypatch):
    fill(tmp_path, victim="precious")
    (tmp_path / "a").symlink_to("victim")
    replace_file(tmp_path / "a", b"new")
    assert not (tmp_path / "a").is_symlink()
    names = iter(["planted", "free"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: next(names))
    (tmp_path / f".a.planted{files.PARTIAL}").symlink_to("victim")
    replace_file(tmp_path / "a", b"newer")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / f".a.planted{files.PARTIAL}", b"new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "a").read_text() == "newer"


# ---- folders ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    """How a folder takes the place of another: the second where the file system cannot exchange names."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "exchange", lambda first, second: False)
    return request.param


def replace(path, replaces=("a", "in/*.html"), **new: str) -> None:
    with replace_folder(path, replaces) as folder:
        fill(folder, **new)


def test_a_folder_is_replaced_and_what_is_not_ours_is_carried_over(tmp_path, synced, way):
    path = tmp_path / "deep" / "x"
    replace(path, a="1", in__one="1")
    fill(path, notes="mine", **{"in__old.html": "ours", "in__mine.txt": "mine", "deep__er__b": "mine"})
    (path / "empty").mkdir()
    (path / "link").symlink_to("nowhere")
    inode = (path / "notes").stat().st_ino
    synced.clear()
    replace(path, a="2", in__one="2")
    assert contents(path) == {"a": "2", "in/one": "2", "in/mine.txt": "mine", "notes": "mine", "deep/er/b": "mine"}
    assert (path / "empty").is_dir()
    assert (path / "link").is_symlink()
    assert (path / "notes").stat().st_ino == inode
    assert (path / "notes").stat().st_nlink == 1
    assert list(path.parent.iterdir()) == [path]
    assert {"a", "one", "in"} <= set(synced)
    assert synced[-1] == "deep"


def test_what_is_not_ours_is_carried_over_without_hard_links(tmp_path, monkeypatch, way):
    def refuse(*_, **__):
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "x"
    replace(path, a="1", in__one="1")
    fill(path, notes="mine", **{"in__old.html": "ours", "in__mine.txt": "mine", "deep__er__b": "mine"})
    replace(path, a="2", in__one="2")
    assert contents(path) == {"a": "2", "in/one": "2", "in/mine.txt": "mine", "notes": "mine", "deep/er/b": "mine"}
    assert list(tmp_path.iterdir()) == [path]


def test_what_others_write_meanwhile_is_carried_over(tmp_path, monkeypatch, way):
    replace(tmp_path / "x", a="1")
    fill(tmp_path / "x", notes="old", deep__b="mine")
    real = files._exchange

    def late(partial, path, replaced):
        fill(path, more="late", deep__c="late")
        replace_file(path / "notes", b"changed")
        real(partial, path, replaced)

    monkeypatch.setattr(files, "_exchange", late)
    replace(tmp_path / "x", a="2")
    expected = {"x/notes": "changed", "x/more": "late", "x/deep/b": "mine", "x/deep/c": "late"}
    assert contents(tmp_path) == {"x/a": "2", **expected}


def test_readers_beside_a_writer_always_see_a_whole_folder(tmp_path):
    """Four readers, which look up each file by its path, never miss one, and see one version or the next."""
    path, stop, problems, reads = tmp_path / "x", threading.Event(), [], []
    replace(path, a="0", in__b="0")
    fill(path, notes="mine")

    def read() -> None:
        try:
            while not stop.is_set():
                first, second = (path / "a").read_text(), (path / "in" / "b").read_text()
                assert int(second) - int(first) >= 0
                assert (path / "notes").read_text() == "mine"
                reads.append(1)
        except BaseException as error:
            problems.append(error)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for version in range(1, 20):
        replace(path, a=str(version), in__b=str(version))
    stop.set()
    for reader in readers:
        reader.join()
    assert not problems
    assert len(reads) > 20


def test_a_file_of_the_former_version_that_the_new_one_lacks_goes(tmp_path, way):
    replace(tmp_path / "x", a="1", in__b="1")
    replace(tmp_path / "x", c="2")
    assert contents(tmp_path / "x") == {"c": "2", "in/b": "1"}


def version_after(monkeypatch, folder, **killed) -> str:
    """The version in `folder` after a replacement of version 1 by version 2 that ended early."""
    replace(folder, a="1")
    fill(folder, notes="mine")
    with monkeypatch.context() as patched:
        kill(patched, **killed)
        with pytest.raises(Kill):
            replace(folder, a="2")
    files_left = contents(folder.parent)
    assert files_left == {"x/a": files_left["x/a"], "x/notes": "mine"}
    assert [entry.name for entry in folder.parent.iterdir()] == ["x"]
    replace(folder, a="3")
    assert contents(folder.parent) == {"x/a": "3", "x/notes": "mine"}
    return files_left["x/a"]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", ["fsync", "link", "exchange"])
def test_an_exception_while_a_folder_is_replaced_leaves_one_of_them(tmp_path, monkeypatch, step, after):
    module = files if step == "exchange" else os
    version = version_after(monkeypatch, tmp_path / "x", name=step, after=after, module=module)
    assert version == ("2" if (step, after) == ("exchange", True) else "1")


@pytest.mark.parametrize(
    ("call", "after", "version"), [(1, False, "1"), (1, True, "1"), (2, False, "1"), (2, True, "2")]
)
def test_an_exception_between_two_renames_leaves_one_of_them(tmp_path, monkeypatch, call, after, version):
    monkeypatch.setattr(files, "exchange", lambda first, second: False)
    assert version_after(monkeypatch, tmp_path / "x", name="rename", call=call, after=after) == version


def test_an_exception_in_the_block_leaves_nothing_behind(tmp_path):
    def fail() -> None:
        with replace_folder(tmp_path / "x", ()) as folder:
            fill(folder, a="1")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("step", "call"), [("fsync", 1), ("link", 1), ("exchange", 1), ("rename", 1), ("rename", 2)])
@pytest.mark.parametrize("after", [False, True])
def test_a_killed_writer_loses_neither_folder_nor_foreign_files(tmp_path, monkeypatch, step, call, after):
    """Killed in a process of its own, where no handler runs. Between two renames the old one has a hidden name."""
    if step == "rename":
        monkeypatch.setattr(files, "exchange", lambda first, second: False)
    replace(tmp_path / "x", a="1")
    fill(tmp_path / "x", notes="mine")
    if not (child := os.fork()):
        real = getattr(files if step == "exchange" else os, step)
        calls = []

        def killed(*arguments, **keywords):
            calls.append(1)
            if len(calls) == call and not after:
                os._exit(7)
            value = real(*arguments, **keywords)
            if len(calls) == call:
                os._exit(7)
            return value

        setattr(files if step == "exchange" else os, step, killed)
        replace(tmp_path / "x", a="2")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    between = step == "rename" and (call, after) in {(1, True), (2, False)}
    visible = tmp_path / "x" if not between else next(tmp_path.glob(".x.*.old"))
    assert contents(visible) in ({"a": "1", "notes": "mine"}, {"a": "2", "notes": "mine"})
    replace(tmp_path / "x", a="3")
    assert (tmp_path / "x" / "a").read_text() == "3"
    assert (visible / "notes").read_text() == "mine"


def test_two_processes_that_replace_a_folder_at_once_do_not_collide(tmp_path, way):
    replace(tmp_path / "x", a="0")
    fill(tmp_path / "x", notes="mine")
    with replace_folder(tmp_path / "x", ["a"]) as first, replace_folder(tmp_path / "x", ["a"]) as second:
        fill(first, a="first")
        fill(second, a="second")
    assert contents(tmp_path) == {"x/a": "first", "x/notes": "mine"}


def test_a_folder_that_appears_between_the_renames_is_moved_aside_too(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "exchange", lambda first, second: False)
    replace(tmp_path / "x", a="0")
    fill(tmp_path / "x", notes="mine")
    real, calls = os.rename, []

    def intrude(source, target):
        calls.append(target)
        if target == tmp_path / "x" and len(calls) == 2:
            fill(tmp_path / "x", a="other", more="theirs")
        real(source, target)

    monkeypatch.setattr(os, "rename", intrude)
    replace(tmp_path / "x", a="ours")
    assert contents(tmp_path) == {"x/a": "ours", "x/more": "theirs", "x/notes": "mine"}


def test_a_link_that_appears_in_place_of_the_folder_is_put_back(tmp_path, monkeypatch):
    fill(tmp_path, victim__a="precious")
    replace(tmp_path / "x", a="0")
    real = files._exchange

    def intrude(partial, path, replaced):
        files.remove(path)
        path.symlink_to("victim")
        real(partial, path, replaced)

    monkeypatch.setattr(files, "_exchange", intrude)
    with pytest.raises(RequestError, match="is a link; name a folder"):
        replace(tmp_path / "x", a="ours")
    assert (tmp_path / "x").is_symlink()
    assert contents(tmp_path / "victim") == {"a": "precious"}
    assert len(list(tmp_path.iterdir())) == 2


def test_many_threads_replace_one_folder(tmp_path, way):
    fill(tmp_path / "x", notes="mine")
    errors = []

    def work(number: int) -> None:
        try:
            for _ in range(5):
                replace(tmp_path / "x", a=str(number), in__b="b")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
    assert contents(tmp_path / "x") == {"a": (tmp_path / "x" / "a").read_text(), "in/b": "b", "notes": "mine"}


def test_links_and_files_in_place_of_a_folder_are_refused(tmp_path):
    fill(tmp_path, file="mine", real__a="1")
    (tmp_path / "link").symlink_to("real")
    for name, kind in (("file", "file"), ("link", "link")):
        with pytest.raises(RequestError, match=f"is a {kind}; name a folder"):
            replace(tmp_path / name, a="2")
    assert contents(tmp_path / "real") == {"a": "1"}


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    fill(tmp_path, victim__a="precious")
    names = iter(["planted", "free"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: next(names))
    (tmp_path / f".x.planted{files.PARTIAL}").symlink_to("victim")
    replace(tmp_path / "x", a="1")
    assert contents(tmp_path / "victim") == {"a": "precious"}


def test_a_foreign_entry_in_the_way_of_a_new_file_is_refused_and_stays(tmp_path):
    fill(tmp_path / "x", a__b="mine", other="mine")
    with pytest.raises(RequestError, match="in the way of a new file"):
        replace(tmp_path / "x", a="1")
    assert contents(tmp_path) == {"x/a/b": "mine", "x/other": "mine"}


def test_a_scratch_folder_is_committed_once_and_replaces_nothing(tmp_path, synced):
    with scratch_folder(tmp_path / "x") as folder:
        write_file(folder / "a", b"1")
        commit_folder(folder, tmp_path / "x")
    assert synced[1:] == [synced[1], tmp_path.name]
    with pytest.raises(FileExistsError), scratch_folder(tmp_path / "x") as folder:
        commit_folder(folder, tmp_path / "x")
    assert contents(tmp_path) == {"x/a": "1"}
    assert len(list(tmp_path.iterdir())) == 1


# ---- a full disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError("1000 requested and 25 written"),  # NumPy's
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # Rust's
    ],
)
def test_every_error_of_a_full_disk_is_one_line(error):
    with (
        pytest.raises(DataError, match=r"^disk full while writing x \([A-Z][a-z ]+\): free space and go on$"),
        explain(error),
    ):
        pass


def test_a_failing_disk_is_one_line():
    for number, problem, remedy in (
        (errno.EIO, "Input/output error", "check the disk"),
        (errno.EROFS, "Read-only file system", "make it writable"),
    ):
        text = rf"^disk failure while writing x \({problem}\): {remedy} and go on$"
        with pytest.raises(DataError, match=text), explain(OSError(number, "")):
            pass


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "no"), KeyError("os error 13"), RequestError("os error 28")])
def test_other_errors_are_passed_on(error):
    with pytest.raises(type(error)) as caught, explain(error):
        pass
    assert caught.value is error


@contextmanager
def explain(error):
    with explain_full_disk("x", "go on"):
        yield
        raise error
