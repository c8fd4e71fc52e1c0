"""Tests of progress: content and time of plain lines, and no output where it is hidden."""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest

from workbench.io import progress as progress_module
from workbench.io.log import PROGRESS
from workbench.io.progress import _Lines, duration, progress, with_progress


@pytest.fixture
def clock(monkeypatch):
    """Stands where it is put: seconds since it was made."""
    seconds = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.mark.parametrize(
    ("seconds", "printed"),
    [
        (0.0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (95.0, "1 min 35 s"),
        (3599.6, "1 h 0 min"),
        (3600.0, "1 h 0 min"),
        (7325.0, "2 h 2 min"),
        (100 * 3600.0, "100 h 0 min"),
    ],
)
def test_duration(seconds, printed):
    assert duration(seconds) == printed


def test_the_line_has_count_rate_and_remaining_time():
    lines = _Lines("recording", 1_000_000, "rows", 0)
    lines.advance(120_000)
    assert lines.line(15.0) == "recording: 120,000 of 1,000,000 rows, 8,000 rows/s, 1 min 50 s left"


def test_units_that_take_seconds_have_a_time_each():
    lines = _Lines("future prompts", 8, "prompts", 0)
    lines.advance(3)
    assert lines.line(12.0) == "future prompts: 3 of 8 prompts, 4 s each, 20 s left"


def test_earlier_work_is_counted_but_not_timed():
    lines = _Lines("recording", 1_000, "rows", 900)
    lines.advance(50)
    assert lines.line(10.0) == "recording: 950 of 1,000 rows, 5 rows/s, 10 s left"


def test_an_unknown_total_gives_no_remaining_time():
    lines = _Lines("tokenizing", None, "tokens", 0)
    lines.advance(2_500)
    assert lines.line(10.0) == "tokenizing: 2,500 tokens, 250 tokens/s"


def test_no_new_work_gives_no_remaining_time():
    assert _Lines("recording", 10, "rows", 3).line(10.0) == "recording: 3 of 10 rows, 0 rows/s"


def test_a_line_every_ten_seconds(clock, capsys):
    with progress("recording", 100, "rows") as tick:
        for _ in range(50):
            clock[0] += 0.5
            tick(2)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "recording: 40 of 100 rows, 4 rows/s, 15 s left",
        "recording: 80 of 100 rows, 4 rows/s, 5 s left",
    ]


def test_items_are_yielded_and_counted(clock, capsys):
    for number in with_progress(range(4), "reading", "layers"):
        clock[0] += 5 + number
    assert capsys.readouterr().err.splitlines() == [
        "reading: 2 of 4 layers, 6 s each, 11 s left",
        "reading: 4 of 4 layers, 6 s each, 0 s left",
    ]


def test_short_work_prints_nothing(clock, capsys):
    with progress("recording", 100, "rows") as tick:
        clock[0] += 9.9
        tick(100)
    assert capsys.readouterr() == ("", "")


def test_hidden_progress_prints_nothing(clock, capsys):
    with progress("recording", 100, "rows", show=False) as tick:
        clock[0] += 100
        tick(100)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_bar(clock, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **options):
            self.options, self.counts = options, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_error):
            self.closed = True

        def update(self, n):
            self.counts.append(n)

    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("recording", 100, "rows", initial=40) as tick:
        clock[0] += 100
        tick(25)
        tick(35)
    (bar,) = bars
    assert bar.options == {
        "desc": "recording",
        "total": 100,
        "initial": 40,
        "unit": " rows",
        "unit_scale": True,
        "leave": False,
    }
    assert bar.counts == [25, 35]
    assert bar.closed
    with progress("recording", 100, "rows", show=False):
        pass
    assert len(bars) == 1


@pytest.fixture
def cell(monkeypatch):
    """Output of a notebook's cell: what was displayed under each id, in the order in which it appeared."""
    output = {}

    class Handle:
        def __init__(self, content):
            output[self] = content

        def update(self, content, raw):
            assert raw
            output[self] = content

    ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel="one"))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    display_module = SimpleNamespace(
        display=lambda content, raw, display_id: Handle(content) if raw and display_id else None
    )
    monkeypatch.setitem(sys.modules, "IPython.display", display_module)
    return output


def test_the_cell_of_a_notebook_ends_with_what_was_done(clock, cell):
    with progress("recording <x>", 1_000, "rows", initial=40) as tick:
        (text,) = cell.values()
        assert text["text/plain"] == "recording <x> ..."
        clock[0] += 4
        tick(460)
        (text,) = cell.values()
        assert text["text/plain"] == "recording <x>: 500 of 1,000 rows, 115 rows/s, 4 s left"
        assert '<progress value="500" max="1000">' in text["text/html"]
        assert "<x>" not in text["text/html"]
        clock[0] += 0.1
        tick(500)
    (text,) = cell.values()  # the same output all the time; its file keeps this
    assert text["text/plain"] == "recording <x>: 1,000 of 1,000 rows, done in 4 s"
    assert "<progress" not in text["text/html"]


def test_the_cell_of_a_notebook_shows_that_work_stopped(clock, cell):
    with suppress(KeyboardInterrupt), progress("tokenizing", None, "tokens") as tick:
        clock[0] += 1
        tick(20)
        raise KeyboardInterrupt
    (text,) = cell.values()
    assert text["text/plain"] == "tokenizing: 20 tokens, stopped"


@pytest.mark.parametrize("place", ["lines", "cell"])
def test_the_level_of_the_logger_turns_progress_off(place, clock, capsys, request):
    output = request.getfixturevalue("cell") if place == "cell" else {}
    PROGRESS.setLevel("WARNING")
    try:
        with progress("recording", 100, "rows") as tick:
            clock[0] += 100
            tick(100)
    finally:
        PROGRESS.setLevel("INFO")
    assert (capsys.readouterr(), output) == (("", ""), {})
