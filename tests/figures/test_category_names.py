"""Names of categories: in one line where they fit, wrapped or turned elsewhere, on screen and in print."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from workbench.figures.category_names import name_ticks
from workbench.figures.describe import figure_data
from workbench.figures.group_intervals import group_intervals
from workbench.figures.paper import to_paper
from workbench.figures.safe_text import plain, sentence

LONG = ["all layers", "random keys, all layers", "chosen layers"]


def ticks(names, length):
    return name_ticks({name: name for name in names}, float(length), 10.0)


def test_names_are_wrapped_where_they_would_overlap_and_turned_where_a_word_is_too_long():
    assert ticks(LONG, 600) == ticks(["L2H3"] * 9, 400) == ticks([], 100) == {}
    wrapped = ["all layers", "random keys,<br>all layers", "chosen<br>layers"]
    assert ticks(LONG, 200) == {"tickvals": LONG, "ticktext": wrapped, "tickangle": 0}
    assert ticks(LONG, 100) == {"tickvals": LONG, "ticktext": LONG, "tickangle": -90}
    assert ticks(["noun<br>1,234", "b"], 40)["ticktext"] == ["noun 1,234", "b"]
    assert ticks(["a", "b"], 1) == {}


@given(st.lists(st.text(min_size=1, max_size=30).map(sentence), min_size=1, unique=True), st.integers(1, 900))
@example(["0", "\xa0abcdefg"], 78)
def test_no_name_loses_a_word(names, length):
    axis = ticks(names, length)
    texts = [plain(text.replace("<br>", " ")).split() for text in axis.get("ticktext", [])]
    assert texts in ([], [plain(name).split() for name in names])
    assert all("<" not in text.replace("<br>", "") for text in axis.get("ticktext", []))


def test_names_in_print_and_in_the_table_of_a_figure():
    values = np.array([[1.0, 2, 3], [0, 1, 2], [2, 3, 4]])
    figure = group_intervals({"one": values}, categories=LONG, hover="%{x}", title="t", subtitle="s")
    assert figure.layout.xaxis.ticktext is None
    printed = to_paper(figure)[0]
    assert printed.layout.xaxis.ticktext == ("all layers", "random keys,<br>all layers", "chosen layers")
    assert printed.layout.height > to_paper(figure.update_traces(x=["a", "b", "c"]))[0].layout.height
    crowded = {"categories": [f"a class of words<br>{n}" for n in range(9)], "hover": "", "title": "", "subtitle": ""}
    figure = group_intervals({"one": np.ones((3, 9))}, **crowded)
    assert figure.layout.xaxis.ticktext[0] == "a class of<br>words<br>0"
    assert "x_label" not in figure_data(figure)
    counted = figure.update_xaxes(ticktext=[f"{name}, n = 3" for name in crowded["categories"]])
    assert figure_data(counted)["x_label"].iloc[0] == "a class of words; 0, n = 3"
    assert to_paper(counted)[0].layout.xaxis.ticktext[0] == "a class of words 0, n = 3"
