"""Text files that are saved whole, and a disk that fails."""

import errno
import os

import pytest
from refusals import refused

from workbench.io import files
from workbench.io.errors import DataError, RequestError
from workbench.io.saving import save_text, save_texts


@pytest.fixture
def full_disk(monkeypatch):
    def fails(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fails)


def test_a_text_replaces_the_one_before_and_makes_its_folder(tmp_path):
    path = tmp_path / "a" / "page.html"
    assert save_text(path, "one") == path
    save_text(path, "zwei \ud800")  # half of a surrogate pair, which no file can hold
    assert path.read_text() == "zwei ?"
    assert os.listdir(tmp_path / "a") == ["page.html"]


def test_a_full_disk_keeps_the_text_before_and_is_one_line(tmp_path, request):
    path = save_text(tmp_path / "page.html", "one")
    request.getfixturevalue("full_disk")
    line = refused(DataError, lambda: save_text(path, "two"))
    assert line == f"disk full while writing {path} (No space left on device): free space and write it again"
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["page.html"]


def test_several_texts_appear_together_or_not_at_all(tmp_path, request):
    save_texts(tmp_path / "both", {"a.csv": "1", "b.csv": "2"})
    assert (tmp_path / "both" / "b.csv").read_text() == "2"
    assert "not empty" in refused(RequestError, lambda: save_texts(tmp_path / "both", {"c.csv": "3"}))
    request.getfixturevalue("full_disk")
    assert "disk full" in refused(DataError, lambda: save_texts(tmp_path / "none", {"a.csv": "1", "b.csv": "2"}))
    assert os.listdir(tmp_path) == ["both"]


def test_a_pipe_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a device, a pipe or a socket, which is never" in refused(
        RequestError, lambda: save_text(tmp_path / "pipe", "x")
    )
    assert (tmp_path / "pipe").is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]
