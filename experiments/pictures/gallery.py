"""Gallery of the documentation: every figure of saved results, on screen and in print.

`python -m workbench.experiments.pictures.gallery` runs every probe on the embedded model and on SmolLM2-135M, which
takes more than an hour of one core, and writes docs/gallery.md with its pictures. An interrupted run goes on. Given
folders of results, it draws these. It needs a Chrome, which draws about two pictures a second.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go

import workbench as wb
from workbench.experiments.demo_model.made_of import embedded, made_of
from workbench.experiments.pictures.gallery_results import make_results
from workbench.figures.describe import caption
from workbench.figures.markup import escape
from workbench.figures.paper import to_paper
from workbench.pages.figure_export import render

DOCS = Path(__file__).parents[2] / "docs"
PAGE, PICTURES = "gallery.md", Path("images") / "gallery"
"""The page, and the folder of its pictures, both inside of the folder of the documentation."""
MODELS = ("demo", "models/smollm2-135m")
FOLDER = Path("build") / "gallery"
KIND = "webp"
SCREEN, PRINT = 0.46, 0.88
"""Pixels of a picture per pixel of the figure on screen and in print: small, and what is seen can be read."""

TEXT = """# Gallery

{made_of}
Every figure of every probe: on the left as it is on a light screen, on the right in print, one column (3.25 in) wide,
without the title, which becomes the caption. `python -m workbench.experiments.pictures.gallery` runs the probes, on few
texts, and draws this page. Pictures are small; `workbench export` writes them as PDF, SVG and HTML.
"""


@dataclass(frozen=True)
class Drawn:
    """A figure of a result."""

    result: wb.Result
    name: str
    figure: go.Figure

    @property
    def file(self) -> str:
        """Returns the name of its pictures, without what tells them apart."""
        model = "".join(char if char.isalnum() or char in "-_." else "-" for char in self.result.provenance["model"])
        return f"{model}-{self.result.probe}-{self.name}"


def results_in(folders: Sequence[Path]) -> list[wb.Result]:
    """Returns the results of folders, and of the folders inside of these: of each probe and model the last one."""
    loaded = [wb.load_result(path.parent) for folder in folders for path in sorted(folder.rglob("result.json"))]
    results = {(result.probe, result.provenance["model"]): result for result in loaded}
    if not results:
        places = ", ".join(map(str, folders))
        raise wb.RequestError(f"no result in {places}; name folders that `workbench demo` wrote")
    return [results[key] for key in sorted(results)]


def gallery(folders: Sequence[Path], docs: Path) -> Path:
    """Writes the page and its pictures into `docs`, in place of older ones, and returns the page."""
    results = results_in(folders)
    drawn = [Drawn(result, name, figure) for result in results for name, figure in result.figures().items()]
    pictures = _pictures(drawn)
    shutil.rmtree(docs / PICTURES, ignore_errors=True)
    (docs / PICTURES).mkdir(parents=True)
    for name, content in pictures.items():
        (docs / PICTURES / name).write_bytes(content)
    page = docs / PAGE
    page.write_text("\n".join([_head(results), *_sections(drawn, pictures, docs)]) + "\n", encoding="utf-8")
    return page


def _pictures(drawn: Sequence[Drawn]) -> dict[str, bytes]:
    """Content of each picture by its file name; those that cannot be drawn are left out, with a warning."""
    screen = {f"{drawing.file}-screen": drawing.figure for drawing in drawn}
    printed = {f"{drawing.file}-print": to_paper(drawing.figure, 1)[0] for drawing in drawn}
    pictures = render(screen, [KIND], SCREEN) | render(printed, [KIND], PRINT)
    return {f"{name}.{kind}": content for (name, kind), content in pictures.items()}


def _head(results: Sequence[wb.Result]) -> str:
    models = {result.provenance["model"]: result.provenance["model_fingerprint"][:16] for result in results}
    model_prints = {f"model {name}": digits for name, digits in models.items() if name != "demo"}
    return TEXT.format(made_of=made_of({**embedded(), **model_prints}, {}))


def _sections(drawn: Sequence[Drawn], pictures: Mapping[str, bytes], docs: Path) -> Iterator[str]:
    probe = model = None
    for drawing in drawn:
        result = drawing.result
        if result.probe != probe:
            probe, model = result.probe, None
            title = probe.replace("-", " ").capitalize()
            yield f"## [{title}]({probe}.md)\n" if (docs / f"{probe}.md").exists() else f"## {title}\n"
        if result.provenance["model"] != model:
            model = result.provenance["model"]
            yield f"<p><strong>{escape(model)}</strong>: {escape(result.headline())}</p>\n"
        yield _figure(drawing, pictures)


def _figure(drawing: Drawn, pictures: Mapping[str, bytes]) -> str:
    text = escape(caption(drawing.figure))
    images = "".join(
        f'<img src="{PICTURES.as_posix()}/{name}" alt="{text}, {place}" loading="lazy">'
        for place, name in (
            ("on screen", f"{drawing.file}-screen.{KIND}"),
            ("in print", f"{drawing.file}-print.{KIND}"),
        )
        if name in pictures
    )
    return f"<figure>{images}<figcaption>{text}</figcaption></figure>\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the gallery of the results that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m workbench.experiments.pictures.gallery", description=__doc__)
    parser.add_argument("results", type=Path, nargs="*", help="folders of results; default: run the probes")
    parser.add_argument("--models", nargs="+", default=MODELS, help="models on which they run")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder for what they record and find")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write; default: docs")
    request = parser.parse_args(arguments)
    results = request.results or [make_results(model, request.folder / Path(model).name) for model in request.models]
    print(f"wrote  {gallery(results, request.docs)}")


if __name__ == "__main__":
    main()
