"""Colours: text and lines are legible on white and on dark, measured in another way than the theme chooses them."""

from __future__ import annotations

import pytest

from workbench.figures import theme
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


@pytest.mark.parametrize(("template", "page"), [(theme.TEMPLATE, theme.PAGE), (theme.DARK, theme.DARK_PAGE)])
def test_intervals_of_bars_are_visible_on_the_page(template, page):
    """plotly's own colour of them, #444, has 1.9 on the dark page."""
    (bar,) = template.data.bar
    page = {"white": "#ffffff"}.get(page, page)
    assert contrast(bar.error_x.color, page) >= 3
    assert contrast(bar.error_y.color, page) >= 3
