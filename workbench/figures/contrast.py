"""Contrast of every colour of the figures, as WCAG 2 defines it: `python -m workbench.figures.contrast` prints a table.

Text needs 4.5, lines and marks need 3. The dark notebook is the light page behind `themed.DARK_FILTER`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from workbench.figures import theme
from workbench.figures.themed import DARK_FILTER

TEXT_CONTRAST, LINE_CONTRAST = 4.5, 3.0
"""Least contrast of text and of lines (WCAG 2.2, success criteria 1.4.3 and 1.4.11)."""

_STEPS = 64  # of a palette


@dataclass(frozen=True)
class Contrast:
    """The least contrast of one use of colour on one background."""

    use: str
    page: str
    """light, dark, or dark notebook."""
    least: float
    needed: float


def contrast(first: str, second: str) -> float:
    """Returns the contrast of two colours `#rrggbb`, 1 to 21."""
    lights = sorted(map(_luminance, (first, second)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def contrasts() -> list[Contrast]:
    """Returns the contrast of text and lines on each page, and of text on every colour of the palettes of cells."""
    table = []
    for page, (dark, back, ink, vision) in _PAGES.items():
        table.append(Contrast("text of axes and titles", page, contrast(vision(ink), vision(back)), TEXT_CONTRAST))
        for number, colour in enumerate([*theme.CATEGORIES, theme.NEUTRAL]):
            name = f"line, colour {number + 1}" if number < len(theme.CATEGORIES) else "references"
            line = vision(theme.colour_on(dark, colour))
            table.append(Contrast(name, page, contrast(line, vision(back)), LINE_CONTRAST))
        colours = _colours(theme.palette_on(dark, theme.MARKERS))
        least = min(contrast(vision(colour), vision(back)) for colour in colours)
        table.append(Contrast("points by value", page, least, LINE_CONTRAST))
        for name, palette in (("cells", theme.CELLS), ("signed cells", theme.SIGNED_CELLS)):
            text = vision(theme.colour_on(dark, theme.TEXT))
            least = min(contrast(text, vision(colour)) for colour in _colours(theme.palette_on(dark, palette)))
            table.append(Contrast(f"text in {name}", page, least, TEXT_CONTRAST))
    return table


def in_dark_notebook(colour: str) -> str:
    """Returns a colour behind `DARK_FILTER`: `invert` and `hue-rotate` as Filter Effects 1 defines them, in sRGB."""
    amount = float(DARK_FILTER.partition("(")[2].partition(")")[0])
    inverted = [amount + part / 255 * (1 - 2 * amount) for part in _parts(colour)]
    light = 2 * sum(weight * part for weight, part in zip((0.213, 0.715, 0.072), inverted, strict=True))
    return "#{:02x}{:02x}{:02x}".format(*(round(255 * min(1, max(0, light - part))) for part in inverted))


def _unchanged(colour: str) -> str:
    return colour


_PAGES: dict[str, tuple[bool, str, str, Callable[[str], str]]] = {
    "light": (False, "#ffffff", theme.INK, _unchanged),
    "dark": (True, theme.DARK_PAGE, theme.DARK_INK, _unchanged),
    "dark notebook": (False, "#ffffff", theme.INK, in_dark_notebook),
}


def _colours(palette: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Colours of a palette, as plotly interpolates them in sRGB."""
    stops = [(float(place), _parts(str(colour))) for place, colour in palette]
    for step in range(_STEPS + 1):
        at = step / _STEPS
        (low, first), (high, last) = next(pair for pair in pairwise(stops) if at <= pair[1][0])
        share = (at - low) / (high - low)
        parts = (round(a + share * (b - a)) for a, b in zip(first, last, strict=True))
        yield "#{:02x}{:02x}{:02x}".format(*parts)


def _luminance(colour: str) -> float:
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (value / 255 for value in _parts(colour))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _parts(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


def main() -> None:
    """Prints the table as Markdown."""
    print("| use | page | least contrast | needed |\n|---|---|---|---|")
    for line in contrasts():
        print(f"| {line.use} | {line.page} | {line.least:.1f} | {line.needed} |")


if __name__ == "__main__":
    main()
