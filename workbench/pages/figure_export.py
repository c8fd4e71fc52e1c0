"""Export of figures: HTML to explore, PDF, SVG and PNG to print, with data, caption and provenance.

The same figure gives the same bytes. PDF, SVG and PNG are rendered by kaleido in an installed Chrome; without one,
everything else is written and one warning says how to install it.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from workbench.figures.markup import escape
from workbench.figures.safe_text import plain
from workbench.io.checks import as_path
from workbench.io.errors import RequestError, nearest, shown
from workbench.io.files import check_writable, explain_full_disk, replace_file
from workbench.io.spreadsheet import csv_text
from workbench.pages.picture_metadata import with_metadata
from workbench.store.manifest import MANIFEST
from workbench.store.owned_files import refuse_store

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure
    from typing_extensions import TypeIs

    from workbench.results.result import Result
    from workbench.store.reader import Store

_LOG = logging.getLogger(__name__)

FORMATS = ("html", "pdf", "svg", "png")
DPI = 300
"""Resolution of PNG files, in dots per inch."""

_BITMAPS = ("png", "webp")
_SCRIPT = "plotly.min.js"
_PANELS = 2  # side by side; titles of more would overlap on a phone, so that they scroll
_PAGES = {"light": ("#1f2430", "#5b6472", "white"), "dark": ("#e4e7ec", "#9aa1ad", "#14171f")}
_STYLE = """
body {{ font: 15px/1.5 Inter, Helvetica, Arial, sans-serif; color: {0}; background: {2}; margin: 1rem }}
figure {{ margin: 0 }}
.plot {{ overflow-x: auto }}
.provenance {{ color: {1}; font-size: 13px }}
"""


def export(
    source: Result | Store | Figure | str | os.PathLike[str],
    folder: str | Path,
    *,
    figures: Sequence[str] | str | None = None,
    formats: Sequence[str] | str = FORMATS,
    columns: int = 1,
    theme: str = "light",
    data: str = "parquet",
    plotlyjs: str = "shared",
) -> list[Path]:
    """Writes every figure of a result or store, or one figure under the folder's name, into `folder`.

    Each figure NAME becomes NAME.html (interactive), NAME.pdf, NAME.svg and NAME.png (for print, 300 dpi, without the
    title), NAME.parquet or NAME.csv (the plotted data) and NAME.json (caption, alternative text, provenance, and what
    print has no room for). Files of the same names are replaced; others are kept. Costs about 2 s to start Chrome and
    0.5 s per picture. Without Chrome, the other files are written, with a warning.

    Args:
        source: Result, store or figure to export; a result and a store also by their paths.
        folder: Output folder, created if needed.
        figures: Names of the figures to export. None: all.
        formats: Any of html, pdf, svg, png.
        columns: Width of printed figures in columns of a paper: 1 (3.25 in) or 2 (6.75 in).
        theme: Theme of the HTML pages: light or dark.
        data: Format of the plotted data: parquet or csv.
        plotlyjs: shared (one script file for all pages of the folder) or inside (embedded in each page, 5 MB).

    Returns:
        The files written.

    Raises:
        RequestError: For an unknown figure, format, theme, data format or value of `plotlyjs` or `columns`, or where
            `folder` is a file.
    """
    folder = as_path("folder", folder)
    figures = (figures,) if isinstance(figures, str) else figures
    formats = (formats,) if isinstance(formats, str) else formats
    source = _opened(source) if isinstance(source, str | os.PathLike) else source
    if not hasattr(source, "figures") and not _is_figure(source):
        raise RequestError(f"source must be a result, a store, the path of one, or a figure, not {shown(source)}")
    chosen = _choose(source, folder, figures)
    _check_known("formats", formats, FORMATS)
    for name, value, known in (
        ("theme", theme, ("light", "dark")),
        ("data", data, ("parquet", "csv")),
        ("plotlyjs", plotlyjs, ("shared", "inside")),
    ):
        _check_known(name, [value], known)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"folder {str(folder)!r} is a file; name a folder")
    refuse_store(folder)
    check_writable(folder, "folder")
    files = _files(chosen, [kind for kind in FORMATS if kind in formats], columns, theme, data, plotlyjs)
    with explain_full_disk(str(folder), "export again"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            replace_file(folder / name, content)
    return [folder / name for name in files]


def _opened(path: str | os.PathLike[str]) -> Result | Store:
    """The store at a path, or the result."""
    from workbench.results.result import load_result  # a second: xarray
    from workbench.store.reader import open_store  # seconds: torch

    return open_store(path) if (as_path("source", path) / MANIFEST).is_file() else load_result(Path(path))


def _check_known(argument: str, values: Sequence[str], known: Sequence[str]) -> None:
    for value in values:
        if value not in known:
            raise RequestError(f"{argument} has {value!r}{nearest(str(value), known)}; known: {', '.join(known)}")


def _choose(source: Result | Store | Figure, folder: Path, names: Sequence[str] | None) -> dict[str, Figure]:
    figures = {folder.resolve().name or "figure": source} if _is_figure(source) else source.figures()
    for name in names or ():
        if name not in figures:
            raise RequestError(f"figure {name!r} is none of {', '.join(figures)}")
    chosen = {name: figures[name] for name in (names or figures)}
    for name in chosen:
        if not re.fullmatch(r"[\w +,=@-][\w .+,=@-]*", name):
            raise RequestError(f"figure {name!r} cannot be used as a file name; use letters, digits, - and _")
    return chosen


def _is_figure(source: Result | Store | Figure) -> TypeIs[Figure]:
    return hasattr(source, "to_plotly_json")  # duck-typed: importing plotly here would cost seconds


def _files(
    figures: Mapping[str, Figure], formats: Sequence[str], columns: int, theme: str, data: str, plotlyjs: str
) -> dict[str, bytes]:
    from plotly.offline import get_plotlyjs

    from workbench.figures.describe import alt_text, caption, figure_data
    from workbench.figures.paper import to_paper

    printed = {name: to_paper(figure, columns) for name, figure in figures.items()}
    images = [kind for kind in formats if kind != "html"]
    pictures = render({name: figure for name, (figure, _) in printed.items()}, images) if images else {}
    files: dict[str, bytes] = {}
    for name, figure in figures.items():
        meta = figure.layout.meta if isinstance(figure.layout.meta, Mapping) else {}
        description: dict[str, Any] = {
            "figure": name,
            "caption": caption(figure),
            "alt": alt_text(figure),
            "provenance": plain(meta.get("provenance", "")),
        }
        if "html" in formats:
            files[f"{name}.html"] = _page(figure, description, theme, plotlyjs).encode("utf-8", "replace")
        for kind in images:
            if picture := pictures.get((name, kind)):
                about = description["caption"] or name, f"{description['alt']} {description['provenance']}".strip()
                files[f"{name}.{kind}"] = with_metadata(picture, kind, *about)
        files[f"{name}.{data}"] = _table(figure_data(figure), data)
        description["left out in print"] = printed[name][1]
        files[f"{name}.json"] = (json.dumps(description, indent=1, ensure_ascii=False) + "\n").encode(
            "utf-8", "replace"
        )
    return files | ({_SCRIPT: get_plotlyjs().encode()} if "html" in formats and plotlyjs == "shared" else {})


def _table(table: pd.DataFrame, kind: str) -> bytes:
    if kind == "csv":
        return csv_text(table).encode("utf-8", "replace")
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def can_shrink(figure: Figure) -> bool:
    """Returns True for a figure that a narrow page may draw narrower than it is.

    False where text in cells, the squares of heads or the titles of more than two panels side by side need the width.
    """
    from workbench.figures.token_grid import grid_of

    if grid_of(figure) is not None:
        return True
    layout: Any = figure.layout
    cells = any(trace.type == "heatmap" and trace.texttemplate for trace in figure.data)  # pyright: ignore[reportAttributeAccessIssue]  # plotly
    heads = isinstance(layout.meta, Mapping) and "heads" in layout.meta
    axes: Any = figure.select_xaxes()
    panels = {axis.domain for axis in axes}
    return not (cells or heads or len(panels) > _PANELS)


def _drawing(figure: Figure, theme: str) -> str:
    """Input of `showFigure`, as JSON that is safe inside a script element."""
    from workbench.figures.theme import to_dark
    from workbench.figures.token_grid import grid_of, rewrap

    grid = grid_of(figure)
    flat = figure if grid is None else rewrap(figure, grid["tokens"])
    drawn = json.loads((to_dark(flat) if theme == "dark" else flat).to_json())  # pyright: ignore[reportArgumentType]  # plotly
    about = {"width": figure.layout.width or 760, "fluid": can_shrink(figure)}
    return json.dumps({**drawn, **about}, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _page(figure: Figure, description: Mapping[str, str], theme: str, plotlyjs: str) -> str:
    from plotly.offline import get_plotlyjs

    from workbench.figures.themed import head_pictures

    script = f'<script src="{_SCRIPT}"></script>' if plotlyjs == "shared" else f"<script>{get_plotlyjs()}</script>"
    safe = {name: escape(text) for name, text in description.items()}
    show = head_pictures() + (Path(__file__).parent / "figure.js").read_text(encoding="utf-8")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{safe['figure']}</title><style>{_STYLE.format(*_PAGES[theme])}</style>",
            f"{script}</head><body><figure>",
            f'<div class="plot" role="group" aria-label="{safe["alt"]}"><div id="figure"></div></div>',
            f"<figcaption>{safe['caption']}</figcaption></figure>",
            f'<p class="provenance">{safe["provenance"]}</p>',
            f'<script>{show}showFigure(document.getElementById("figure"), {_drawing(figure, theme)});</script>',
            "</body></html>\n",
        ]
    )


# ---- pictures -------------------------------------------------------------------------------------------


def render(
    figures: Mapping[str, Figure], formats: Sequence[str], scale: float | None = None
) -> dict[tuple[str, str], bytes]:
    """Returns each figure in each format, rendered by Chrome, with one warning for what cannot be rendered.

    Args:
        figures: Figures by name.
        formats: Any of pdf, svg, png, webp.
        scale: Pixels of a PNG or WebP per pixel of the figure. None: those of `DPI`.
    """
    from workbench.figures.theme import INCH

    try:
        import kaleido
    except ImportError:
        return _warn_missing(formats, "kaleido is not installed; pip install 'interp-workbench[export]'")
    pixels = DPI / INCH if scale is None else scale
    page = kaleido.PageGenerator(mathjax=False, others=[Path(__file__).parent / "print.js"])
    with TemporaryDirectory() as folder:
        paths = {
            (name, kind): Path(folder, f"{number}.{kind}") for number, name in enumerate(figures) for kind in formats
        }
        jobs = [
            {"fig": figures[name], "path": path, "opts": {"format": kind, "scale": pixels if kind in _BITMAPS else 1}}
            for (name, kind), path in paths.items()
        ]
        try:
            logging.getLogger("choreographer.channels.pipe").addFilter(_is_of_chrome)
            # blocks requests by figures: a proxy that does not exist receives all but file addresses
            kopts = {"page_generator": page, "proxy_server": "127.0.0.1:9"}
            failed = kaleido.write_fig_from_object_sync(jobs, kopts=kopts)
        except Exception as error:  # kaleido and Chrome raise many kinds of error
            if type(error).__name__ == "ChromeNotFoundError":
                return _warn_missing(
                    formats,
                    "no Chrome or Chromium was found; install one, or run plotly_get_chrome, or set BROWSER_PATH to it",
                )
            failed = (error,)
        pictures = {key: path.read_bytes() for key, path in paths.items() if path.is_file() and path.stat().st_size}
    if len(pictures) < len(paths):
        _warn_missing(
            formats, f"{len(paths) - len(pictures)} of {len(paths)} pictures failed in Chrome: {_first_line(failed)}"
        )
    return {
        (name, kind): _without_dates(picture) if kind == "pdf" else picture
        for (name, kind), picture in pictures.items()
    }


def _is_of_chrome(record: logging.LogRecord) -> bool:
    """False for choreographer's report of its own goodbye: closing, it may read that behind a message of Chrome."""
    return "JSONError" not in record.getMessage()


def _warn_missing(formats: Sequence[str], reason: str) -> dict[tuple[str, str], bytes]:
    _LOG.warning(f"no {', '.join(formats)}: {reason}")
    return {}


def _first_line(errors: Sequence[Exception] | None) -> str:
    line = next((" ".join(str(error).split()) or type(error).__name__ for error in errors or ()), "no reason given")
    return line[:200]


def _without_dates(pdf: bytes) -> bytes:
    """The PDF with its dates set to the epoch, without moving a byte, so that its offset table stays valid."""
    return re.sub(rb"(/(?:Creation|Mod)Date \(D:)\d{14}", rb"\g<1>19700101000000", pdf)
