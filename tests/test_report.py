"""The report: one page that needs nothing else, with text that stays text."""

import re

import pandas as pd
import plotly.graph_objects as go
import pytest

from workbench.cli import main
from workbench.errors import RequestError
from workbench.report import ROWS, Section, write_report

HOSTILE = "<script>alert(1)</script>&\u202e"


def test_text_of_models_and_files_never_becomes_markup(tmp_path):
    part = Section(
        title=HOSTILE,
        text=[HOSTILE],
        table=pd.DataFrame({HOSTILE: [HOSTILE]}),
        source={HOSTILE: HOSTILE},
    )
    page = write_report([part], tmp_path / "page.html", title=HOSTILE, text=[HOSTILE]).read_text()
    assert HOSTILE[:8] not in page.replace("<script>" + _plotly(page), "")
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;") == 10


def _plotly(page):
    return re.search(r"<script>(.*?)</script></head>", page, re.DOTALL)[1]


def test_a_page_holds_plotly_once_and_asks_for_nothing(tmp_path):
    figures = {"one": go.Figure(go.Scatter(y=[1, 2])), "two": go.Figure(go.Scatter(y=[3, 4]))}
    page = write_report([Section("part", figures=figures)], tmp_path / "page.html", title="t").read_text()
    assert page.count("Plotly.newPlot(") == 2 + _plotly(page).count("Plotly.newPlot(")
    assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="?http', page)


def test_a_long_table_is_cut_and_says_so(tmp_path):
    table = pd.DataFrame({"n": range(ROWS + 5)})
    page = write_report([Section("part", table=table)], tmp_path / "page.html", title="t").read_text()
    assert page.count("<td>") == ROWS
    assert f"{ROWS} of {ROWS + 5} rows" in page


def test_sections_are_linked_in_order(tmp_path):
    page = write_report([Section("first"), Section("second")], tmp_path / "page.html", title="t").read_text()
    assert re.findall(r'<a href="#(part-\d)">(\w+)</a>', page) == [("part-0", "first"), ("part-1", "second")]
    assert re.findall(r'<h2 id="(part-\d)">(\w+)</h2>', page) == [("part-0", "first"), ("part-1", "second")]


def test_an_existing_page_is_replaced_and_no_half_is_left(tmp_path):
    path = tmp_path / "deep" / "page.html"
    write_report([Section("old")], path, title="t")
    write_report([Section("new")], path, title="t")
    assert "new" in path.read_text()
    assert "old" not in path.read_text().split("</head>")[1]
    assert list(path.parent.iterdir()) == [path]


def test_nothing_to_report_and_a_folder_for_a_file_are_refused(tmp_path):
    with pytest.raises(RequestError, match="the report has no results; give at least one folder"):
        write_report([], tmp_path / "page.html", title="t")
    with pytest.raises(RequestError, match=r"is a folder; name the file, such as .*report\.html"):
        write_report([Section("part")], tmp_path, title="t")


def test_the_command_refuses_what_is_no_result_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")])
    assert stop.value.code == 2
    assert re.fullmatch(r"workbench: result .* no result\.json there; .*\n", capsys.readouterr().err)
