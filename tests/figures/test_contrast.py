"""Colours: text and lines are legible on white and on dark, measured in another way than the theme chooses them."""

from __future__ import annotations

import pytest

from workbench.figures.contrast import contrast, contrasts, main


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("#000000", "#ffffff", 21),
        ("#777777", "#ffffff", 4.48),
        ("#0000ff", "#ffffff", 8.59),
        ("#ff0000", "#ffffff", 4.0),
    ],
)
def test_contrast_is_that_of_published_examples(one, other, expected):
    assert contrast(one, other) == pytest.approx(expected, abs=0.01)
    assert contrast(other, one) == contrast(one, other)


def test_text_and_lines_are_legible_on_both_pages(capsys):
    table = contrasts()
    assert {line.page for line in table} == {"light", "dark"}
    assert [line for line in table if line.least < line.needed] == []
    main()
    assert len(capsys.readouterr().out.splitlines()) == len(table) + 2
