"""HTML of values: cards in notebooks, tables and prose of the report. Every text is escaped.

Colours derive from the surrounding page (`currentColor`), so that the markup is readable on light and dark pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench.figures.safe_text import sentence, visible

if TYPE_CHECKING:
    import pandas as pd

_RULE = "border-top:1px solid color-mix(in srgb,currentColor 18%,transparent)"
_CARD = (
    f"<style>.workbench-card table{{border-collapse:collapse;font-size:90%;margin:.4em 0}}"
    ".workbench-card{color:inherit}.workbench-card th,.workbench-card td{text-align:left!important;padding:.15em 1em"
    f" .15em 0;vertical-align:top;background:none!important}}.workbench-card td{{{_RULE};unicode-bidi:isolate}}"
    ".workbench-card th{font-weight:normal;opacity:.7}.workbench-card td code{white-space:pre;background:none;"
    "color:inherit}.workbench-card p{margin:.2em 0;opacity:.8}</style>"
)


def escape(value: Any) -> str:
    """Returns a value as inert markup: no elements; control characters and direction marks become escapes."""
    return sentence(str(value))


def cell(value: Any) -> str:
    """Returns a table cell: floats with four digits, strings with visible white space, "" for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}".replace("nan", "")
    if isinstance(value, str):
        return f"<code>{escape(visible(value, 80))}</code>"
    return escape(value)


def table(heading: Sequence[Any], lines: Iterable[Sequence[str]]) -> str:
    """Returns an HTML table; `heading` is text, the cells of `lines` are markup."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heading)
    body = "".join("<tr>" + "".join(f"<td>{part}</td>" for part in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def frame(values: pd.DataFrame, rows: int) -> str:
    """Returns the first `rows` rows of a table as HTML."""
    head = values.head(rows).astype(object)
    return table(list(values.columns), ([cell(value) for value in line] for line in head.itertuples(index=False)))


def prose(docstring: str) -> str:
    """Returns the paragraphs of a docstring: indented ones preformatted, names in backticks as code."""
    parts = re.split(r"\n\s*\n", docstring.strip("\n"))
    return "".join(_paragraph(part) for part in parts if part.strip())


def _paragraph(part: str) -> str:
    if all(line.startswith("    ") for line in part.splitlines()):
        lines = "\n".join(escape(line[4:]) for line in part.splitlines())
        return f'<pre tabindex="0">{lines}</pre>'
    return f"<p>{inline(' '.join(part.split()))}</p>"


def inline(line: str) -> str:
    """Returns a line of prose with `code` set as code and arXiv numbers as links."""
    coded = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(line))
    link = r'<a href="https://arxiv.org/abs/\1" rel="noreferrer">arXiv \1</a>'
    return re.sub(r"\barXiv:? ?(\d{4}\.\d{4,5})\b", link, coded)


def inert(markup: str) -> str:
    """Returns HTML for a notebook, in which MathJax leaves `$...$` and `\\(...\\)` of texts alone."""
    return f'<div class="tex2jax_ignore mathjax_ignore">{markup}</div>'


def card(title: str, facts: Mapping[str, Any], below: str = "") -> str:
    """Returns the notebook card of an object: its kind, one fact per line, then `below`, which is markup."""
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(fact)}</td></tr>' for name, fact in facts.items()
    )
    content = f"{_CARD}<strong>{escape(title)}</strong><table>{lines}</table>{below}"
    return inert(f'<div class="workbench-card">{content}</div>')
