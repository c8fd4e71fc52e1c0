"""One page out of many results: what was found, figures, controls, definitions with sources, settings, provenance.

The page is one HTML file that needs no network: plotly's script is inside, once, and a content security policy lets
nothing else run or load. Text of models and files is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.figures.markup import escape, frame, inline, prose, table
from workbench.figures.safe_text import plain
from workbench.io.errors import RequestError
from workbench.io.files import replace_file
from workbench.results.probe import definition, setting_meanings
from workbench.results.registry import find_maker
from workbench.results.result import Result

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from plotly.graph_objects import Figure

ROWS = 10
"""Table rows that are shown; the whole table lies beside the result."""

_PRINT_WIDTH = 680
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A part of the page. Everything but the figures is plain text and is escaped when written."""

    title: str
    text: Sequence[str] = ()
    """A paragraph each; the first stands in the contents too."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    table: pd.DataFrame | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    """Provenance: name to value."""
    question: str = ""
    """What is asked, in a line."""
    definition: str = ""
    """As a docstring: paragraphs, formulas indented."""
    papers: Sequence[str] = ()
    controls: Sequence[tuple[str, str, str]] = ()
    """(name, what was found, what it means)"""
    settings: Sequence[tuple[str, str, str]] = ()
    """(name, value, meaning)"""
    measured: Sequence[tuple[str, str, str, str]] = ()
    """(variable, axes, units, range)"""


def section(result: Result) -> Section:
    """A result as part of a page: what was found, its figures, and what its probe says of itself."""
    probe = find_maker(result.probe)
    source = {name: value for name, value in result.provenance.items() if name != "settings"}
    note = result.data.attrs.get("note")
    return Section(
        title=f"{result.probe} of {result.provenance['model']}",
        text=[result.headline(), *([f"Note: {note}"] if note else [])],
        figures=result.figures(),
        table=result.table,
        source=source,
        question=(probe.__doc__ or "").strip().partition("\n")[0],
        definition=definition(probe),
        papers=getattr(probe, "sources", ()),
        controls=[
            (name, _span(result.data[name]) if name in result.data else "", meaning)
            for name, meaning in getattr(probe, "controls", {}).items()
        ],
        settings=_settings(getattr(probe, "Config", probe), result.provenance.get("settings", {})),
        measured=[
            (str(name), ", ".join(map(str, part.dims)) or "one number", str(part.attrs.get("units", "")), _span(part))
            for name, part in result.data.data_vars.items()
        ],
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
    replace_file(path, page.encode("utf-8", "replace"))
    return path


def _settings(probe: type, asked: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What was asked, what each setting means, and its default where something else was asked."""
    told = setting_meanings(probe)
    defaults = {part.name: part.default for part in fields(probe) if part.default is not MISSING}
    lines = []
    for name, value in asked.items():
        default = json.loads(json.dumps(defaults[name])) if name in defaults else value
        other = f" (default {json.dumps(default)})" if default != value else ""
        lines.append((name, json.dumps(value, ensure_ascii=False), told.get(name, "") + other))
    return lines


def _span(values: xr.DataArray) -> str:
    """A number, or the least and the largest of several; how many where they are no numbers."""
    import numpy as np

    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.number):
        return f"{array.size:,} texts" if array.ndim else str(array)
    known = array[np.isfinite(array)]
    if not known.size:
        return "none"
    low, high = (f"{end:,}" if array.dtype.kind in "iu" else f"{end:.4g}" for end in (known.min(), known.max()))
    return low if low == high else f"{low} to {high}"


# ---- markup ---------------------------------------------------------------------------------------------


def _page(sections: Sequence[Section], title: str, paragraphs: Sequence[str]) -> str:
    from plotly.offline import get_plotlyjs

    links = "".join(map(_link, enumerate(sections)))
    scripts = [get_plotlyjs(), (_FOLDER / "report.js").read_text(encoding="utf-8")]
    style = (_FOLDER / "report.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{style}</style></head><body>",
            '<a class="skip" href="#results">Skip to the results</a>',
            f"<header><h1>{escape(title)}</h1>",
            *_paragraphs(paragraphs),
            f'<nav id="contents" aria-label="Contents"><ol>{links}</ol></nav></header>',
            '<main id="results">',
            *(_part(number, part) for number, part in enumerate(sections)),
            "</main>",
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>\n",
        ]
    )


def _policy(scripts: Iterable[str]) -> str:
    """Only these scripts run, and nothing is fetched; pictures are those that plotly makes itself."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"


def _link(numbered: tuple[int, Section]) -> str:
    number, part = numbered
    found = f"<span>{escape(part.text[0])}</span>" if part.text else ""
    return f'<li><a href="#part-{number}">{escape(part.title)}</a>{found}</li>'


def _part(number: int, part: Section) -> str:
    headline, *others = [*part.text, ""]
    papers = "".join(f"<li>{inline(paper)}</li>" for paper in part.papers)
    defined = prose(part.definition) + (f"<ul>{papers}</ul>" if papers else "")
    return "\n".join(
        [
            f'<section id="part-{number}" aria-labelledby="title-{number}">',
            f'<h2 id="title-{number}">{escape(part.title)}</h2>',
            f'<p class="question">{escape(part.question)}</p>' if part.question else "",
            f'<p class="headline">{escape(headline)}</p>' if headline else "",
            *_paragraphs(filter(None, others)),
            *(_figure(figure, f"part-{number}-{name}") for name, figure in enumerate(part.figures.values())),
            _controls(part.controls),
            _folded("How it is defined", defined),
            _folded("Settings", _lines(("setting", "value", "meaning"), part.settings)),
            _folded("What was measured", _lines(("variable", "axes", "units", "range"), part.measured)),
            _folded(*_head(part.table)) if part.table is not None else "",
            _folded("Where it comes from", _facts(part.source)),
            '<p class="up"><a href="#contents">Contents</a></p></section>',
        ]
    )


def _figure(figure: Figure, name: str) -> str:
    """Title and subtitle as text that wraps and is read aloud, the plot without them, drawn by report.js."""
    from workbench.figures.describe import alt_text

    said = [part and plain(part) for part in (figure.layout.title.text, figure.layout.title.subtitle.text)]
    caption = f"{escape(said[0] or '')}{f'<small>{escape(said[1])}</small>' if said[1] else ''}"
    drawn = _drawing(figure)
    fit = min(1.0, _PRINT_WIDTH / drawn["width"])
    style = f"--height:{drawn['layout']['height']}px;--fit:{fit:.3f}"
    return (
        f'<figure aria-labelledby="{name}">'
        f'<figcaption id="{name}">{caption}</figcaption>'
        f'<div class="wide" tabindex="0" role="group" aria-label="{escape(alt_text(figure))}">'
        f'<div class="plot" style="{style}"><div></div><script type="application/json">{_json(drawn)}</script></div>'
        "</div></figure>"
    )


def _drawing(figure: Figure) -> dict[str, Any]:
    """What report.js draws: the figure, what to change of it on a dark page, and how wide it wants to be."""
    import plotly.graph_objects as go

    from workbench.figures.theme import to_dark

    bare = go.Figure(figure)
    top = (bare.layout.margin.t or 70) - (14 if bare.layout.title.text else 0)
    bare.update_layout(title=None, margin={"t": top}, width=None, height=figure.layout.height or 450)
    light, other = (json.loads(part.to_json()) for part in (bare, to_dark(bare)))
    cells = any(trace.type == "heatmap" and trace.texttemplate for trace in figure.data)
    return {**light, "dark": _changes(light, other), "width": figure.layout.width or 760, "fluid": not cells}


def _changes(old: Any, new: Any, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], Any]]:
    """What to set, and where, to make `new` of `old`; None removes."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [change for key in keys for change in _changes(old.get(key), new.get(key), (*path, key))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [change for place, (a, b) in pairs for change in _changes(a, b, (*path, place))]
    return [(path, new)]


def _json(value: Any) -> str:
    """JSON inside of a script element, which ends at the first `</script` whatever it is part of."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _paragraphs(paragraphs: Iterable[str]) -> list[str]:
    return [f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs]


def _controls(controls: Sequence[tuple[str, str, str]]) -> str:
    return f"<h3>Controls</h3>{_lines(('compare with', 'found', 'what it is'), controls)}" if controls else ""


def _lines(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return ""
    told = ([f"<code>{escape(first)}</code>", *map(escape, middle), inline(last)] for first, *middle, last in lines)
    return _wide(table(heading, told), " and ".join(heading))


def _head(values: pd.DataFrame) -> tuple[str, str]:
    title = f"Table, {min(ROWS, len(values))} of {len(values):,} rows"
    return title, _wide(frame(values, ROWS), title)


def _facts(facts: Mapping[str, Any]) -> str:
    told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{told}</dl>" if told else ""


def _wide(markup: str, name: str) -> str:
    """What may be wider than a phone, and scrolls by itself; reached by the keyboard."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{escape(name)}">{markup}</div>'


def _folded(title: str, markup: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{markup}</details>" if markup else ""
