"""Every figure of saved results, on screen and in print: a page to look at before a release.

`python -m workbench.experiments.pictures.gallery RESULTS... --out gallery` reads folders of results, such as those of
`workbench demo`, and writes `index.html` with every figure one and two columns wide, captions and alternative texts,
and `screen.html`, the report of all results. It needs a Chrome; 2 s a figure.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import workbench as wb
from workbench.figures.markup import escape
from workbench.pages.report import section, write_report

_STYLE = """body { font: 14px/1.5 Helvetica, Arial, sans-serif; margin: 2rem; max-width: 72rem } img { max-width: 100%;
vertical-align: top } figure { margin: 0 0 2.5rem } figcaption small { display: block; color: #565f6d }"""
_DPI = 96 / 300  # pictures have 300 dots an inch


def results_in(folders: Sequence[Path]) -> dict[str, wb.Result]:
    """Returns the results of folders, and of the folders inside of these, by a name that is a file name."""
    found = sorted(path.parent for folder in folders for path in folder.rglob("result.json"))
    return {f"{path.parent.parent.name}-{path.name}": wb.load_result(path) for path in found}


def gallery(folders: Sequence[Path], out: Path) -> Path:
    """Writes the gallery of all figures of all results into `out`, and returns its page."""
    results = results_in(folders)
    if not results:
        raise wb.RequestError(f"no result in {', '.join(map(str, folders))}; name folders that `workbench demo` wrote")
    for name, result in results.items():
        for columns in (1, 2):
            wb.export(result, out / f"{name}-{columns}", formats=("png",), columns=columns, data="csv")
    write_report([section(result) for result in results.values()], out / "screen.html", title="Gallery")
    page = out / "index.html"
    body = "".join(part for name in results for part in _figures(out, name))
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Gallery</title><style>{_STYLE}</style>'
    page.write_text(f'{head}<h1>Gallery</h1><p><a href="screen.html">On screen</a></p>{body}</html>\n', "utf-8")
    return page


def _figures(out: Path, name: str) -> Iterator[str]:
    yield f"<h2>{escape(name)}</h2>"
    for described in sorted((out / f"{name}-1").glob("*.json")):
        about = json.loads(described.read_text("utf-8"))
        pictures = "".join(
            f'<img src="{name}-{columns}/{described.stem}.png" style="zoom:{_DPI:.2f}" alt="{escape(about["alt"])}">'
            for columns in (1, 2)
        )
        cut = "; ".join(about["left out in print"])
        yield (
            f"<figure>{pictures}<figcaption>{escape(about['caption'])}<small>{escape(about['alt'])}</small>"
            f"<small>{escape(f'left out in one column: {cut}' if cut else '')}</small></figcaption></figure>"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the gallery of the results that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m workbench.experiments.pictures.gallery", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="folders of results")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    request = parser.parse_args(arguments)
    print(f"wrote  {gallery(request.results, request.out)}")


if __name__ == "__main__":
    main()
