"""One page out of many results: every figure and the head of every table, with where each came from.

The page is one HTML file that needs no network: plotly's script is inside, once. Text of models and files is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import RequestError
from workbench.figures.text import visible
from workbench.store.files import replace_durably

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from workbench.result import Result

ROWS = 10
"""Table rows that are shown; the whole table lies beside the result."""

_STYLE = """
body { font: 15px/1.5 Inter, Helvetica, Arial, sans-serif; color: #1f2430 }
body { max-width: 76rem; margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.6rem }
h2 { font-size: 1.25rem; border-top: 1px solid #e4e7ec; padding-top: 1.4rem; margin-top: 2.4rem }
nav a { margin-right: 1rem }
a { color: #0072b2 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0 }
th, td { text-align: left; padding: .2rem .8rem .2rem 0 }
td { border-top: 1px solid #e4e7ec; font-family: ui-monospace, Menlo, Consolas, monospace; white-space: pre }
.from { color: #5b6472; font-size: 13px }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page. Everything but the figures is plain text and is escaped when written."""

    title: str
    text: Sequence[str] = ()
    """A paragraph each."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    table: pd.DataFrame | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    """Provenance: name to value."""


def section(result: Result) -> Section:
    """A result as part of a page: what it is, its figures, the head of its table, its provenance."""
    return Section(
        title=result.probe,
        text=[result.headline()],
        figures=result.figures(),
        table=result.table,
        source=result.provenance,
    )


def write_report(sections: Sequence[Section], path: str | Path, *, title: str, text: Sequence[str] = ()) -> Path:
    """Writes the page to `path`, about 5 MB of which are plotly's script. An existing file is replaced.

    Raises RequestError where there is no section, or the folder cannot hold the file.
    """
    path = Path(path)
    if not sections:
        raise RequestError("the report has no results; give at least one folder that `workbench probe --out` wrote")
    if path.is_dir():
        raise RequestError(f"out {str(path)!r} is a folder; name the file, such as {str(path / 'report.html')!r}")
    page = _page(sections, title, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, page.encode())
    return path


def _page(sections: Sequence[Section], title: str, text: Sequence[str]) -> str:
    from plotly.offline import get_plotlyjs

    links = "".join(f'<a href="#part-{n}">{html.escape(part.title)}</a>' for n, part in enumerate(sections))
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
            f"<script>{get_plotlyjs()}</script></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            *_paragraphs(text),
            f"<nav>{links}</nav>",
            *(_part(number, part) for number, part in enumerate(sections)),
            "</body></html>\n",
        ]
    )


def _part(number: int, part: Section) -> str:
    drawn = (_figure(figure, f"part-{number}-{place}") for place, figure in enumerate(part.figures.values()))
    return "\n".join(
        [
            f'<h2 id="part-{number}">{html.escape(part.title)}</h2>',
            *_paragraphs(part.text),
            *drawn,
            _table(part.table) if part.table is not None else "",
            _source(part.source),
        ]
    )


def _figure(figure: Figure, name: str) -> str:
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, include_mathjax=False, div_id=name)
    return f'<div class="wide">{drawn}</div>'


def _paragraphs(text: Sequence[str]) -> list[str]:
    return [f"<p>{html.escape(paragraph)}</p>" for paragraph in text]


def _table(table: pd.DataFrame) -> str:
    heading = "".join(f"<th>{html.escape(str(name))}</th>" for name in table.columns)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(value))}</td>" for value in line) + "</tr>"
        for line in table.head(ROWS).itertuples(index=False)
    )
    more = f'<p class="from">{ROWS} of {len(table):,} rows</p>' if len(table) > ROWS else ""
    return f'<div class="wide"><table><tr>{heading}</tr>{lines}</table></div>{more}'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return visible(value, 80) if isinstance(value, str) else str(value)


def _source(source: Mapping[str, Any]) -> str:
    if not source:
        return ""
    told = "; ".join(f"{name} {value}" for name, value in source.items())
    return f'<p class="from">{html.escape(told)}</p>'
