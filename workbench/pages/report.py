"""HTML report of several results: headlines, figures, controls, definitions, settings, variables, provenance.

The report is one file that works offline: plotly's script is embedded once, and a content security policy blocks all
other scripts and requests. Text of models and files is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.figures.markup import escape, frame, inline, prose, table
from workbench.figures.safe_text import plain
from workbench.io.checks import as_path
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.io.saving import save_text
from workbench.results.probe import definition, setting_meanings
from workbench.results.result import WEIGHTS, Result

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from plotly.graph_objects import Figure

ROWS = 10
"""Table rows that are shown; the result's folder holds the whole table."""

SCRIPT = "plotly.min.js"
"""File of plotly's script beside reports and exported figures that share it."""

_DIFFERENCES, _LONG = 3, 40  # names in a title that tell sections apart, and characters of a value
_VARIABLE_COLUMNS = ("variable", "axes", "units", "range", "value under the null", "meaning")
_TOP = 64  # pixels above a plot, whose title is its caption: legend, colour bar, plotly's buttons
_BROAD = 800  # pixels; narrower figures stand in two columns
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """One section of the report. Everything except the figures is plain text, escaped when written."""

    title: str
    text: Sequence[str] = ()
    """Paragraphs; the first one also appears in the table of contents."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    table: pd.DataFrame | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    question: str = ""
    """The research question, one line."""
    definition: str = ""
    """Formatted as a docstring: paragraphs, formulas indented."""
    papers: Sequence[str] = ()
    controls: Sequence[tuple[str, str, str]] = ()
    """(name, value, meaning)"""
    settings: Sequence[tuple[str, str, str]] = ()
    """(name, value, meaning)"""
    variables: Sequence[tuple[str, str, str, str, str, str]] = ()
    """(variable, axes, units, range, value under the null, meaning)"""


def section(result: Result) -> Section:
    """Returns the section of a result: headline, figures, and the definition, controls and settings of its probe."""
    probe = result.maker()
    provenance = {name: value for name, value in result.provenance.items() if name != "settings"}
    headline, note = result.headline(), result.data.attrs.get("note")
    return Section(
        title=f"{result.probe} of {result.provenance['model']}",
        text=[headline, *([f"Note: {note}."] if note and note not in headline else [])],
        figures=result.figures(),
        table=result.table,
        provenance=provenance,
        question=(probe.__doc__ or "").strip().partition("\n")[0],
        definition=definition(probe),  # pyright: ignore[reportArgumentType]  # or an Experiment
        papers=getattr(probe, "sources", ()),
        controls=[
            (name, _value_range(result.data[name]) if name in result.data else "", meaning)
            for name, meaning in getattr(probe, "controls", {}).items()
        ],
        settings=_settings(getattr(probe, "Config", probe), result.provenance.get("settings", {})),  # pyright: ignore[reportArgumentType]  # or an Experiment
        variables=_variables(probe, result.data),
    )


def write_report(
    sections: Sequence[Section],
    path: str | Path,
    *,
    title: str,
    text: Sequence[str] = (),
    date: str = "",
    plotlyjs: str = "inside",
) -> Path:
    """Writes the report and replaces an existing file. Sections of equal titles are named by what differs.

    Args:
        sections: Sections in order.
        path: File to write; its folder is created.
        title: Heading of the report.
        text: Paragraphs below the heading.
        date: Date to show below the heading; "" for none, so that the same results give the same bytes.
        plotlyjs: inside (plotly's script in the page, 5 MB) or shared (in `plotly.min.js` beside it, which other
            reports and exported figures of the folder use, too).

    Returns:
        `path`.

    Raises:
        RequestError: Without any section, for another value of `plotlyjs`, or where `path` is a folder.
    """
    path = as_path("path", path)
    if plotlyjs not in ("inside", "shared"):
        raise RequestError(f"plotlyjs must be inside or shared, not {plotlyjs!r}")
    if not sections:
        raise RequestError("the report has no results; give at least one folder that `workbench probe --out` wrote")
    if path.is_dir():
        raise RequestError(f"out {str(path)!r} is a folder; name the file, such as {str(path / 'report.html')!r}")
    page = _page(_named_by_difference(sections), title, text, date, plotlyjs == "shared")
    if plotlyjs == "shared":
        from plotly.offline import get_plotlyjs

        save_text(path.parent / SCRIPT, get_plotlyjs())
    return save_text(path, page)


def _named_by_difference(sections: Sequence[Section]) -> list[Section]:
    """The sections, with what differs (settings, then provenance) in titles that several have."""
    named = []
    for part in sections:
        namesakes = [section for section in sections if section.title == part.title]
        facts = [
            {**{name: value for name, value, _ in section.settings}, **section.provenance} for section in namesakes
        ]
        of_part = {**{name: value for name, value, _ in part.settings}, **part.provenance}
        differing = [name for name in of_part if len({str(section_facts.get(name)) for section_facts in facts}) > 1]
        short_names = [name for name in differing if not name.endswith(("fingerprint", "texts", "sites"))]
        title_names = short_names[:_DIFFERENCES] or differing[:1]
        short = ", ".join(f"{name} {_shortened(of_part[name])}" for name in title_names)
        named.append(replace(part, title=f"{part.title}: {short}") if len(namesakes) > 1 and short else part)
    return named


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONG else text[: _LONG - 1] + "…"


def _facts_of_all(sections: Sequence[Section], date: str) -> dict[str, str | list[str]]:
    """Models, stores with their texts, and versions of all sections, for the head of the page."""
    sources = [part.provenance for part in sections if "model" in part.provenance]
    recorded = [source for source in sources if "store" in source and "rows" in source]
    several = {
        "model": [f"{source['model']} {str(source.get('model_fingerprint', ''))[:12]}".strip() for source in sources],
        "texts": [_store_facts(source) for source in recorded],
        "linked views": [
            f"workbench serve {shlex.quote(str(source['store']))}"
            for source in recorded
            if source["store"] != WEIGHTS and "pairs" not in source
        ],
        "workbench": [str(source["workbench"]) for source in sources if "workbench" in source],
    }
    facts: dict[str, str | list[str]] = {"date": date} if date else {}
    return facts | {name: sorted(set(values)) for name, values in several.items() if values}


def _store_facts(source: Mapping[str, Any]) -> str:
    """Name of a store, its tokens or of pairs without a store their number, and what is known of texts and sites."""
    sites = f"sites {source['sites']}" if source.get("sites") else ""
    size = counted(source["pairs"], "pair") if "pairs" in source else counted(source["rows"], "token")
    facts = [size, source.get("texts", ""), sites]
    return f"{source['store']}: {'; '.join(filter(None, facts))}"


def _variables(probe: Any, data: xr.Dataset) -> list[tuple[str, str, str, str, str, str]]:
    """A line for each variable; of a result saved before variables had a meaning, the probe's declaration gives it."""
    declared = {variable.name: variable.attrs for variable in getattr(probe, "variables", ())}
    lines = []
    for name, part in data.data_vars.items():
        attrs = declared.get(str(name), {}) | part.attrs
        units, null, meaning = (str(attrs.get(key, "")) for key in ("units", "value_under_null", "long_name"))
        axes = ", ".join(map(str, part.dims)) or "scalar"
        lines.append((str(name), axes, units, _value_range(part), null, meaning))
    return lines


def _settings(probe: type, values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, meaning) of each setting, with the default where the value differs from it."""
    meanings = setting_meanings(probe)
    defaults = {part.name: part.default for part in fields(probe) if part.default is not MISSING}
    lines = []
    for name, value in values.items():
        default = json.loads(json.dumps(defaults[name])) if name in defaults else value
        suffix = f" (default {json.dumps(default)})" if default != value else ""
        lines.append((name, json.dumps(value, ensure_ascii=False), meanings.get(name, "") + suffix))
    return lines


def _value_range(values: xr.DataArray) -> str:
    """The value of a scalar, minimum and maximum of numbers, or the count of texts."""
    import numpy as np

    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.number):
        return f"{array.size:,} texts" if array.ndim else str(array)
    finite = array[np.isfinite(array)]
    if not finite.size:
        return "no values"
    low, high = (f"{end:,}" if array.dtype.kind in "iu" else f"{end:.4g}" for end in (finite.min(), finite.max()))
    return low if low == high else f"{low} to {high}"


# ---- markup ---------------------------------------------------------------------------------------------


def _page(sections: Sequence[Section], title: str, paragraphs: Sequence[str], date: str, shared: bool) -> str:
    links = "".join(map(_link, enumerate(sections)))
    body = [
        f"<header><h1>{escape(title)}</h1>",
        *_paragraphs(paragraphs),
        f"{_facts(_facts_of_all(sections, date))}</header>",
        f'<nav id="contents" aria-label="Contents"><ol>{links}</ol></nav>',
        '<main id="results">',
        *(_section(number, part) for number, part in enumerate(sections)),
        "</main>",
    ]
    return document(title, "\n".join(body), shared=shared)


def document(title: str, body: str, *, style: str = "", scripts: Sequence[str] = (), shared: bool = False) -> str:
    """Returns a page that needs nothing else: plotly's script, those of figures, and no other than these.

    Args:
        title: Title of the page.
        body: Markup, already safe, with an element of id "results".
        style: Rules behind those of the report.
        scripts: Scripts behind those of the figures.
        shared: True to take plotly's script from the file `SCRIPT` beside the page.
    """
    from plotly.offline import get_plotlyjs

    from workbench.figures.themed import head_pictures

    ours = [(_FOLDER / name).read_text(encoding="utf-8") for name in ("figure.js", "report.js")]
    inline = [head_pictures(), *ours, *scripts]
    scripts = inline if shared else [get_plotlyjs(), *inline]
    style = (_FOLDER / "report.css").read_text(encoding="utf-8") + style
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts, shared)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{style}</style></head><body>",
            '<a class="skip" href="#results">Skip to the results</a>',
            body,
            f'<script src="{SCRIPT}"></script>' if shared else "",
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>\n",
        ]
    )


def _policy(scripts: Iterable[str], shared: bool) -> str:
    """Content security policy: only these scripts, no requests, only images made by plotly itself."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    beside = " 'self' file:" * shared  # plotly's script from the folder of the page
    rest = "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"
    return f"default-src 'none'; script-src {allowed}{beside}; {rest}"


def _link(numbered: tuple[int, Section]) -> str:
    number, part = numbered
    headline = f"<span>{escape(part.text[0])}</span>" if part.text else ""
    return f'<li><a href="#part-{number}">{escape(part.title)}</a>{headline}</li>'


def _section(number: int, part: Section) -> str:
    headline, *paragraphs = [*part.text, ""]
    papers = "".join(f"<li>{inline(paper)}</li>" for paper in part.papers)
    definition = prose(part.definition) + (f"<ul>{papers}</ul>" if papers else "")
    return "\n".join(
        [
            f'<section id="part-{number}" aria-labelledby="title-{number}">',
            f'<h2 id="title-{number}">{escape(part.title)}</h2>',
            f'<p class="question">{escape(part.question)}</p>' if part.question else "",
            f'<p class="headline">{escape(headline)}</p>' if headline else "",
            *_paragraphs(filter(None, paragraphs)),
            '<div class="figures">' if part.figures else "",
            *(figure_markup(figure, f"part-{number}-{name}") for name, figure in enumerate(part.figures.values())),
            "</div>" if part.figures else "",
            _controls(part.controls),
            _folded("Definition", definition),
            _folded("Settings", _rows(("setting", "value", "meaning"), part.settings)),
            _folded("Variables", _rows(_VARIABLE_COLUMNS, part.variables)),
            _folded(*_table_head(part.table)) if part.table is not None else "",
            _folded("Provenance", _facts(part.provenance)),
            '<p class="up"><a href="#contents">Contents</a></p></section>',
        ]
    )


def figure_markup(figure: Figure, name: str) -> str:
    """Returns the plot, drawn by report.js, with title and subtitle as a caption that screen readers read."""
    from workbench.figures.describe import alt_text

    title, subtitle = (part and plain(part) for part in (figure.layout.title.text, figure.layout.title.subtitle.text))
    caption = f"{escape(title or '')}{f'<small>{escape(subtitle)}</small>' if subtitle else ''}"
    drawing = _drawing(figure)
    style = f"--height:{drawing['height']}px"
    return (
        f'<figure aria-labelledby="{name}"{" class=broad" * (drawing["width"] > _BROAD)}>'
        f'<figcaption id="{name}">{caption}</figcaption>'
        f'<div class="wide" tabindex="0" role="group" aria-label="{escape(alt_text(figure))}">'
        f'<div class="plot" style="{style}"><div></div><script type="application/json">{_json(drawing)}</script></div>'
        "</div></figure>"
    )


def _drawing(figure: Figure) -> dict[str, Any]:
    """Input of report.js: the figure, its changes for a dark page, its width, and whether it may shrink."""
    from workbench.figures.theme import to_dark_spec
    from workbench.figures.token_grid import grid_of, rewrap
    from workbench.pages.figure_export import can_shrink

    grid = grid_of(figure)
    light: dict[str, Any] = json.loads((figure if grid is None else rewrap(figure, grid["tokens"])).to_json())  # pyright: ignore[reportArgumentType]  # plotly
    layout = light["layout"]
    above = layout.get("margin", {}).get("t", 70)
    top = min(above - (14 if layout.get("title", {}).get("text") else 0), _TOP)
    height = layout.get("height", 450) - above + top
    bare = {name: value for name, value in layout.items() if name not in ("title", "width")}
    light["layout"] = {**bare, "margin": {**bare.get("margin", {}), "t": top}, "height": height}
    about = {"width": figure.layout.width or 760, "height": (figure.layout.height or 450) - above + top}
    dark = _changes(light, {**light, **to_dark_spec(light)})
    return {**light, "dark": dark, **about, "fluid": can_shrink(figure)}


def _changes(old: Any, new: Any, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], Any]]:
    """(path, value) assignments that turn `old` into `new`; None removes."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [change for key in keys for change in _changes(old.get(key), new.get(key), (*path, key))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [change for index, (a, b) in pairs for change in _changes(a, b, (*path, index))]
    return [(path, new)]


def _json(value: Any) -> str:
    """JSON that is safe inside a script element, which ends at the first `</script`, even inside a string."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _paragraphs(paragraphs: Iterable[str]) -> list[str]:
    return [f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs]


def _controls(controls: Sequence[tuple[str, str, str]]) -> str:
    return f"<h3>Controls</h3>{_rows(('control', 'value', 'meaning'), controls)}" if controls else ""


def _rows(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    cells = ([f"<code>{escape(first)}</code>", *map(escape, middle), inline(last)] for first, *middle, last in rows)
    return wide(table(heading, cells), " and ".join(heading))


def _table_head(values: pd.DataFrame) -> tuple[str, str]:
    title = f"Table, {min(ROWS, len(values))} of {counted(len(values), 'row')}"
    return title, wide(f'<div class="data">{frame(values, ROWS)}</div>', title)


def _facts(facts: Mapping[str, Any]) -> str:
    lists = {name: value if isinstance(value, list) else [value] for name, value in facts.items()}
    entries = "".join(
        f"<dt>{escape(name)}</dt>{''.join(f'<dd>{escape(value)}</dd>' for value in values)}"
        for name, values in lists.items()
    )
    return f"<dl>{entries}</dl>" if entries else ""


def wide(markup: str, name: str) -> str:
    """Returns markup inside a horizontally scrolling region that the keyboard can reach."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{escape(name)}">{markup}</div>'


def _folded(title: str, markup: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{markup}</details>" if markup else ""
