"""Colours: text and lines are legible on white and on dark, measured in another way than the theme chooses them."""

from __future__ import annotations

import pytest

from workbench.figures.contrast import contrast, contrasts, main


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("#000000", "#ffffff", 21),
        ("#777777", "#ffffff", 4.48),
        ("#0000ff", "#ffffff", 8.59),
        ("#ff0000", "#ffffff", 4.0),
    ],
)
def test_contrast_is_that_of_published_examples(first, second, expected):
    assert contrast(first, second) == pytest.approx(expected, abs=0.01)
    assert contrast(second, first) == contrast(first, second)


def test_text_and_lines_are_legible_on_both_pages(capsys):
    table = contrasts()
    assert {line.page for line in table} == {"light", "dark", "dark notebook"}
    assert [line for line in table if line.least < line.needed] == []
    main()
    assert len(capsys.readouterr().out.splitlines()) == len(table) + 2
