"""A text with coloured tokens as HTML without scripts, for notebooks that are only read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from workbench.figures.markup import escape, inert
from workbench.figures.readable import readable_tokens, right_to_left_runs
from workbench.figures.safe_text import visible
from workbench.figures.theme import CATEGORIES, MONOSPACE
from workbench.io.counted import counted

HUES = (*CATEGORIES[:4], CATEGORIES[5])
"""Colours of underlines: those of the theme that are legible on white and on dark pages alike."""

_TOKEN_LENGTH = 40
_ABOVE, _BELOW = "230,125,15", "30,120,200"
_TEXT = (
    "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9;max-width:60rem;unicode-bidi:isolate;"
    f"font-family:{MONOSPACE};font-size:13px"
)
_WHOLE = "display:inline-block;margin:0 1px;white-space:pre;unicode-bidi:isolate;line-height:1.5"
_BACKWARD = (
    "margin:0 1px;white-space:pre;line-height:1.5"  # of one run with its neighbours: digits read from left to right
)
_SMALL = "font-size:12px"
_BAR = "display:inline-block;width:10rem;vertical-align:middle;margin:0 .4rem"
_FILL, _WEAKEST = 0.65, 0.35  # opacity of full colour, and of the weakest underline
_UNDERLINE = 4  # pixels, of which 1 between two


@dataclass(frozen=True)
class TokenTexts:
    """Tokens as they are read: split characters whole, with line breaks and runs from right to left."""

    texts: list[str]
    pieces: list[str]
    """The token of the vocabulary where `texts` has another text, "" elsewhere."""
    breaks: list[int]
    """Indices of the tokens that end a line."""
    backward: list[list[int]]
    """First index and stop of each run from right to left; no run goes over the end of a line."""


@dataclass(frozen=True)
class Colouring:
    """One value for each token, and the value from which on the colour is full."""

    name: str
    values: Float[np.ndarray, " token"]
    full: float

    @property
    def title(self) -> str:
        """Name and scale, and the number of tokens beyond it."""
        return f"{self.name}: full colour at {number_text(self.full)}{self.beyond}"

    @property
    def beyond(self) -> str:
        """Number of tokens with a value beyond full colour, in words; empty for none."""
        count = int((np.abs(self.values[np.isfinite(self.values)]) > self.full).sum())
        return f", {counted(count, 'token')} beyond" if count else ""


@dataclass(frozen=True)
class TokenPicture:
    """What a picture of a text shows."""

    tokens: TokenTexts
    places: list[str]
    """Row and position of each token, in words."""
    fill: Colouring
    underlines: list[Colouring]
    selected: list[bool]
    pins: list[list[int]]
    """Numbers of the pinned selections of each token."""
    facts: list[str]
    """What the foot says besides."""

    def html(self) -> str:
        """Returns the text and its key: inert markup, in the colours of token_view.js."""
        marks = ["".join(self._mark(index)) for index in range(len(self.places))]
        for first, stop in self.tokens.backward:
            marks[first] = f'<bdi dir="rtl">{marks[first]}'
            marks[first : stop - 1] = [f"{mark}<wbr>" for mark in marks[first : stop - 1]]
            marks[stop - 1] += "</bdi>"
        for index in self.tokens.breaks:
            marks[index] += "<br>"
        bars = [_fill_bar(self.fill), *map(_underline_bar, self.underlines, HUES, range(1, len(HUES) + 1))]
        key = "".join(f'<div style="{_SMALL}">{bar}</div>' for bar in bars)
        foot = escape("; ".join([self.fill.title, *self.facts]))
        return inert(f'{key}<pre style="{_TEXT}">{"".join(marks)}</pre><div style="{_SMALL}">{foot}</div>')

    def _mark(self, index: int) -> Iterator[str]:
        """One token as an element, with its values in the title and the numbers of its pinned selections."""
        inside = any(first <= index < stop for first, stop in self.tokens.backward)
        value, pins = float(self.fill.values[index]), self.pins[index]
        others = [part for part in self.underlines if part.name != self.fill.name]
        values = [number_text(value), *(f"{part.name}: {number_text(float(part.values[index]))}" for part in others)]
        strength = fill_strength(value, self.fill.full)
        outline = "outline:2px solid" if self.selected[index] else "outline:1px dotted" if pins else ""
        colour = f"background-color:rgba({_BELOW if value < 0 else _ABOVE},{strength:.3f})" if strength else ""
        style = ";".join(filter(None, [_BACKWARD if inside else _WHOLE, colour, self._underline(index), outline]))
        title = f"{self.places[index]}: {'; '.join(values)}"
        yield f'<span title="{escape(title)}" style="{style}">'
        yield escape(self.tokens.texts[index])
        yield f"<sup style='font-size:9px;line-height:0'>{','.join(map(str, pins))}</sup>" if pins else ""
        yield "</span>"

    def _underline(self, index: int) -> str:
        """Underlines as images of the border below the token, which the token's own colour does not fill."""
        if not self.underlines:
            return ""
        images, places = [], []
        for line, (part, hue) in enumerate(zip(self.underlines, HUES, strict=False)):
            if alpha := underline_strength(float(part.values[index]), part.full):
                images.append(f"linear-gradient({_rgba(hue, alpha)} 0 0)")
                places.append(f"left 0 bottom {_UNDERLINE * (len(self.underlines) - 1 - line)}px")
        return (
            f"border-bottom:{_UNDERLINE * len(self.underlines)}px solid transparent;background-repeat:no-repeat;"
            f"background-image:{','.join([*images, 'none'])};background-size:100% 3px;background-origin:border-box;"
            f"background-position:{','.join([*places, '0 0'])};"
            f"background-clip:{','.join([*['border-box'] * len(images), 'padding-box'])}"
        )


def token_texts(tokens: Sequence[str]) -> TokenTexts:
    """Returns tokens as they are read. A token with a newline in it ends its line."""
    readable = readable_tokens(tokens)
    breaks = [index for index, token in enumerate(readable) if "\n" in token or "\r" in token]
    backward = []
    for first, stop in pairwise([0, *(index + 1 for index in breaks), len(readable)]):
        backward += [[first + run.start, first + run.stop] for run in right_to_left_runs(readable[first:stop])]
    pieces = [
        visible(token, _TOKEN_LENGTH) if token != text else "" for token, text in zip(tokens, readable, strict=True)
    ]
    return TokenTexts([visible(text, _TOKEN_LENGTH) for text in readable], pieces, breaks, backward)


def fill_strength(value: float, full: float) -> float:
    """Returns the opacity of the colour behind a token, 0 to 0.65; 0 without a value."""
    return _FILL * min(1.0, abs(value) / full) if full and np.isfinite(value) else 0.0


def underline_strength(value: float, full: float) -> float:
    """Returns the opacity of an underline: 0 for a feature that is not active, else 0.35 to 1."""
    return _WEAKEST + (1 - _WEAKEST) * min(1.0, value / full) if full and value > 0 else 0.0


def number_text(value: float) -> str:
    """Returns a number with four digits, "none" for a missing one."""
    return f"{value:.4g}" if np.isfinite(value) else "none"


def _fill_bar(fill: Colouring) -> str:
    """The colour bar of the fill: from 0, or on both sides of it where a value is negative."""
    signed = bool((fill.values < 0).any())
    ends = [f"rgba({_BELOW},{_FILL})"] * signed + [f"rgba({_ABOVE},0)", f"rgba({_ABOVE},{_FILL})"]
    bar = f"height:10px;border:1px solid;background:linear-gradient(to right,{','.join(ends)})"
    low, high = number_text(-fill.full if signed else 0.0), number_text(fill.full)
    return f"{escape(fill.name)}: {_scale(low, bar, high)}{escape(fill.beyond)}"


def _underline_bar(part: Colouring, hue: str, line: int) -> str:
    bar = f"height:3px;background:linear-gradient(to right,{_rgba(hue, _WEAKEST)},{_rgba(hue, 1.0)})"
    return f"underline {line} from above: {_scale('0', bar, number_text(part.full))} {escape(part.name + part.beyond)}"


def _scale(low: str, bar: str, high: str) -> str:
    """A colour bar between the numbers of its ends."""
    return f'<span style="white-space:nowrap">{low}<span style="{_BAR};{bar}"></span>{high}</span>'


def _rgba(hue: str, alpha: float) -> str:
    return f"rgba({','.join(str(int(hue[at : at + 2], 16)) for at in (1, 3, 5))},{alpha:.3f})"
