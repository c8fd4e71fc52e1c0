"""Figures as files: pages to explore, vectors to print, and beside each the numbers, a caption and where it came from.

The same figure gives the same bytes. PDF, SVG and PNG are drawn by kaleido in a Chrome of the user's; where there is
none, everything else is written and one warning says how to get it.
"""

from __future__ import annotations

import html
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from workbench.figures.safe_text import plain
from workbench.io.errors import RequestError, nearest
from workbench.io.files import replace_file

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from workbench.results.result import Result

_LOG = logging.getLogger(__name__)

FORMATS = ("html", "pdf", "svg", "png")
DPI = 300
"""Of a PNG."""

_SCRIPT = "plotly.min.js"
_PAGES = {"light": ("#1f2430", "#5b6472", "white"), "dark": ("#e4e7ec", "#9aa1ad", "#14171f")}
_STYLE = """
body {{ font: 15px/1.5 Inter, Helvetica, Arial, sans-serif; color: {0}; background: {2}; margin: 1rem }}
figure {{ margin: 0 }}
.plot {{ overflow-x: auto }}
.from {{ color: {1}; font-size: 13px }}
"""


def export(
    what: Result | Figure,
    folder: str | Path,
    *,
    figures: Sequence[str] | None = None,
    formats: Sequence[str] = FORMATS,
    columns: int = 1,
    theme: str = "light",
    data: str = "parquet",
    plotlyjs: str = "shared",
) -> list[Path]:
    """Writes every figure of a result, or one figure under the folder's name, into `folder`; the files written.

    For each figure NAME: NAME.html, to explore, in the light or dark theme; NAME.pdf, NAME.svg and NAME.png (300 dpi),
    to print, `columns` of a paper wide (3.25 or 6.75 in), its title left to the caption; NAME.parquet or NAME.csv, what
    is drawn; NAME.json, caption, alternative text, provenance and what print had no room for.

    `figures`: names of those wanted, by default all. `formats`: of html, pdf, svg, png. `theme`: light or dark. `data`:
    parquet or csv. `plotlyjs`: shared, one script for all pages of the folder, or inside, 5 MB of it in each. Files of
    the same names are replaced, others are left alone. Costs about 2 s for Chrome and 0.5 s a picture. Raises
    RequestError for what there is none of. Warns, and writes the other files, where no Chrome draws.
    """
    folder = Path(folder)
    drawn = _chosen(what, folder, figures)
    _known("formats", formats, FORMATS)
    for name, given, known in (
        ("theme", theme, ("light", "dark")),
        ("data", data, ("parquet", "csv")),
        ("plotlyjs", plotlyjs, ("shared", "inside")),
    ):
        _known(name, [given], known)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"folder {str(folder)!r} is a file; name a folder")
    files = _files(drawn, [kind for kind in FORMATS if kind in formats], columns, theme, data, plotlyjs)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        replace_file(folder / name, content)
    return [folder / name for name in files]


def _known(argument: str, given: Sequence[str], known: Sequence[str]) -> None:
    for value in given:
        if value not in known:
            raise RequestError(f"{argument} has {value!r}{nearest(str(value), known)}; known: {', '.join(known)}")


def _chosen(what: Result | Figure, folder: Path, names: Sequence[str] | None) -> dict[str, Figure]:
    figures = {folder.resolve().name or "figure": what} if hasattr(what, "to_plotly_json") else what.figures()
    for name in names or ():
        if name not in figures:
            raise RequestError(f"figure {name!r} is none of {', '.join(figures)}")
    chosen = {name: figures[name] for name in (names or figures)}
    for name in chosen:
        if not re.fullmatch(r"[\w +,=@-][\w .+,=@-]*", name):
            raise RequestError(f"figure {name!r} cannot be the name of a file; use letters, digits, - and _")
    return chosen


def _files(
    figures: Mapping[str, Figure], formats: Sequence[str], columns: int, theme: str, data: str, plotlyjs: str
) -> dict[str, bytes]:
    from plotly.offline import get_plotlyjs

    from workbench.figures.describe import alt_text, caption, figure_data
    from workbench.figures.paper import to_paper

    printed = {name: to_paper(figure, columns) for name, figure in figures.items()}
    wanted = [kind for kind in formats if kind != "html"]
    pictures = _draw({name: figure for name, (figure, _) in printed.items()}, wanted) if wanted else {}
    files: dict[str, bytes] = {}
    for name, figure in figures.items():
        meta = figure.layout.meta if isinstance(figure.layout.meta, Mapping) else {}
        told: dict[str, Any] = {
            "figure": name,
            "caption": caption(figure),
            "alt": alt_text(figure),
            "provenance": plain(meta.get("provenance", "")),
        }
        if "html" in formats:
            files[f"{name}.html"] = _page(figure, told, theme, plotlyjs).encode()
        files |= {f"{name}.{kind}": pictures[name, kind] for kind in wanted if (name, kind) in pictures}
        files[f"{name}.{data}"] = _table(figure_data(figure), data)
        told["left out in print"] = printed[name][1]
        files[f"{name}.json"] = (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode()
    return files | ({_SCRIPT: get_plotlyjs().encode()} if "html" in formats and plotlyjs == "shared" else {})


def _table(table: pd.DataFrame, kind: str) -> bytes:
    if kind == "csv":
        return table.to_csv(index=False).encode()
    written = io.BytesIO()
    table.to_parquet(written, index=False)
    return written.getvalue()


def _page(figure: Figure, told: Mapping[str, str], theme: str, plotlyjs: str) -> str:
    from plotly.offline import get_plotlyjs

    from workbench.figures.theme import to_dark

    drawn = to_dark(figure) if theme == "dark" else figure
    plot = drawn.to_html(full_html=False, include_plotlyjs=False, include_mathjax=False, div_id="figure")
    script = f'<script src="{_SCRIPT}"></script>' if plotlyjs == "shared" else f"<script>{get_plotlyjs()}</script>"
    safe = {name: html.escape(text) for name, text in told.items()}
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{safe['figure']}</title><style>{_STYLE.format(*_PAGES[theme])}</style>",
            f"{script}</head><body><figure>",
            f'<div class="plot" role="group" aria-label="{safe["alt"]}">{plot}</div>',
            f"<figcaption>{safe['caption']}</figcaption></figure>",
            f'<p class="from">{safe["provenance"]}</p>',
            "</body></html>\n",
        ]
    )


# ---- pictures -------------------------------------------------------------------------------------------


def _draw(figures: Mapping[str, Figure], formats: Sequence[str]) -> dict[tuple[str, str], bytes]:
    """Each figure in each format, as far as a Chrome can be had; what cannot be drawn is said in one warning."""
    from workbench.figures.theme import INCH

    try:
        import kaleido
    except ImportError:
        return _undrawn(formats, "kaleido is not installed; pip install 'interp-workbench[export]'")
    page = kaleido.PageGenerator(mathjax=False, others=[Path(__file__).parent / "print.js"])
    with TemporaryDirectory() as folder:
        asked = {
            (name, kind): Path(folder, f"{number}.{kind}") for number, name in enumerate(figures) for kind in formats
        }
        jobs = [
            {"fig": figures[name], "path": path, "opts": {"format": kind, "scale": DPI / INCH if kind == "png" else 1}}
            for (name, kind), path in asked.items()
        ]
        try:
            # nothing that a figure names is fetched: a proxy that is not there answers for all but files
            kopts = {"page_generator": page, "proxy_server": "127.0.0.1:9"}
            failed = kaleido.write_fig_from_object_sync(jobs, kopts=kopts)
        except Exception as error:  # a Chrome can fail in more ways than it has names for
            if type(error).__name__ == "ChromeNotFoundError":
                return _undrawn(
                    formats,
                    "no Chrome or Chromium was found; install one, or run plotly_get_chrome, or set BROWSER_PATH to it",
                )
            failed = (error,)
        found = {key: path.read_bytes() for key, path in asked.items() if path.is_file() and path.stat().st_size}
    if len(found) < len(asked):
        _undrawn(formats, f"{len(asked) - len(found)} of {len(asked)} pictures failed in Chrome: {_line(failed)}")
    return {(name, kind): _dateless(drawn) if kind == "pdf" else drawn for (name, kind), drawn in found.items()}


def _undrawn(formats: Sequence[str], why: str) -> dict[tuple[str, str], bytes]:
    _LOG.warning(f"no {', '.join(formats)}: {why}")
    return {}


def _line(failed: Sequence[Exception] | None) -> str:
    told = next((" ".join(str(error).split()) or type(error).__name__ for error in failed or ()), "no reason given")
    return told[:200]


def _dateless(pdf: bytes) -> bytes:
    """The PDF with its dates at the epoch; no byte moves, so that its table of offsets holds."""
    return re.sub(rb"(/(?:Creation|Mod)Date \(D:)\d{14}", rb"\g<1>19700101000000", pdf)
