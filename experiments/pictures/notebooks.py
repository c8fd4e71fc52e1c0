"""Outputs of the notebooks in the repository: `python -m workbench.experiments.pictures.notebooks`.

Runs the notebooks and writes them with their outputs: text, tables, and figures as PNG with their alternative texts.
What differs from run to run (times, progress) is left out. It needs the extras notebook and export and a Chrome, and
takes about five minutes. Notebooks about SmolLM2-135M load it from models/, where `make models` wrote it, else from the
hub.
"""

from __future__ import annotations

import argparse
import base64
import copy
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import numpy as np
import plotly.graph_objects as go
from jupyter_client.manager import KernelManager

from workbench.figures.describe import alt_text
from workbench.figures.themed import is_style
from workbench.pages.figure_export import render

FOLDER = Path(__file__).parents[2] / "notebooks"
FIGURE, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
KEY = "workbench"
"""Key of a notebook's metadata: the checksum of the sources whose outputs it holds."""
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Name by which notebooks load the real model."""


@contextmanager
def kernel(home: Path, environment: Mapping[str, str]) -> Iterator[KernelManager]:
    """Starts one kernel for several notebooks: importing torch and transformers takes most of a short one."""
    manager = KernelManager(kernel_name="python3")
    places = {"IPYTHONDIR": str(home / ".ipython"), "JUPYTER_PLATFORM_DIRS": "1"}
    manager.start_kernel(env={**environment, **places}, cwd=str(home))
    try:
        yield manager
    finally:
        manager.shutdown_kernel(now=True)


def execute(book: nbformat.NotebookNode, manager: KernelManager, folder: Path) -> None:
    """Runs a notebook in a fresh namespace and in `folder`; its cells then hold their outputs."""
    about = copy.deepcopy(book.metadata)
    _link_model(folder)
    fresh = nbformat.v4.new_code_cell(f"%reset -f\nimport os as _os; _os.chdir({str(folder)!r})")
    book.cells.insert(0, fresh)
    client = nbclient.NotebookClient(book, km=manager, timeout=600, record_timing=False)
    try:
        client.execute()
    finally:  # the kernel stays, and with it nbclient leaves the sockets open
        if client.kc is not None:
            client.kc.stop_channels()
        book.cells.remove(fresh)
        book.metadata = about  # without the version of Python


def _link_model(folder: Path) -> None:
    """Lets the real model's hub id be a folder, where its files are at hand: nothing is fetched."""
    files, place = FOLDER.parent / "models" / "smollm2-135m", folder / HUB_ID
    if files.is_dir() and not place.exists():
        place.parent.mkdir()
        place.symlink_to(files.resolve(), target_is_directory=True)


def keep_outputs(book: nbformat.NotebookNode, folder: Path) -> None:
    """Removes from outputs what a reader of the file cannot use, and what differs from run to run.

    Args:
        book: The notebook, executed.
        folder: Folder in which it ran, which its outputs do not name.
    """
    for number, cell in enumerate(code_cells(book), 1):
        outputs = [output for output in cell.outputs if _is_kept(output)]
        cell.outputs = [nbformat.from_dict(_without(output, f"{folder}/")) for output in _merged(outputs)]
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
            output.get("data", {}).pop(WIDGET, None)
    book.metadata[KEY] = checksum(book)


def _is_kept(output: nbformat.NotebookNode) -> bool:
    """False for progress, and for the style of figures."""
    if output.output_type == "stream":
        return output.name == "stdout"
    data = output.get("data", {})
    return not (is_style(data.get("text/html", "")) or re.search(r", done in [\d.]+", data.get("text/plain", "")))


def _merged(outputs: Sequence[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs with what was printed in a row in one part, however the kernel sent it."""
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
        if merged and output.output_type == merged[-1].output_type == "stream":
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def _without(output: Any, text: str) -> Any:
    """A part of an output without a text that differs from run to run."""
    if isinstance(output, Mapping):
        return {name: _without(part, text) for name, part in output.items()}
    if isinstance(output, list):
        return [_without(part, text) for part in output]
    return output.replace(text, "") if isinstance(output, str) else output


def draw_figures(books: Sequence[nbformat.NotebookNode]) -> None:
    """Replaces plotly's format by PNG with an alternative text, all in one browser."""
    outputs = [
        output
        for book in books
        for cell in code_cells(book)
        for output in cell.outputs
        if FIGURE in output.get("data", {})
    ]
    figures = {str(number): _figure(output.data[FIGURE]) for number, output in enumerate(outputs)}
    pictures = render(figures, ["png"], scale=1)
    for (name, figure), output in zip(figures.items(), outputs, strict=True):
        output.data = {"image/png": base64.b64encode(pictures[name, "png"]).decode(), "text/plain": alt_text(figure)}
        output.metadata = {"image/png": {"alt": alt_text(figure)}}


def _figure(content: Mapping[str, Any]) -> go.Figure:
    return go.Figure(_decoded(content["data"]), _decoded(content["layout"]))


def _decoded(content: Any) -> Any:
    """A part of a figure in plotly's format, with arrays in place of their bytes."""
    if isinstance(content, list):
        return [_decoded(part) for part in content]
    if not isinstance(content, Mapping):
        return content
    if "bdata" not in content:
        return {name: _decoded(part) for name, part in content.items()}
    flat = np.frombuffer(base64.b64decode(content["bdata"]), content["dtype"])
    return flat.reshape([int(size) for size in str(content.get("shape", flat.size)).split(",")])


def code_cells(book: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Returns the cells of a notebook that hold code."""
    return [cell for cell in book.cells if cell.cell_type == "code"]


def checksum(book: nbformat.NotebookNode) -> str:
    """Returns the SHA-256 of a notebook's code."""
    return hashlib.sha256("\n\n".join(cell.source for cell in code_cells(book)).encode()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs notebooks and writes them with their outputs."""
    parser = argparse.ArgumentParser(prog="python -m workbench.experiments.pictures.notebooks", description=__doc__)
    parser.add_argument("notebooks", type=Path, nargs="*", help="files; default: all of notebooks/")
    paths = parser.parse_args(arguments).notebooks or sorted(FOLDER.glob("*.ipynb"))
    books = [nbformat.read(path, 4) for path in paths]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    with tempfile.TemporaryDirectory() as home, kernel(Path(home), quiet) as manager:
        for path, book in zip(paths, books, strict=True):
            (folder := Path(home) / path.stem).mkdir()
            execute(book, manager, folder)
            keep_outputs(book, folder)
            print(f"ran    {path}", flush=True)
    draw_figures(books)
    for path, book in zip(paths, books, strict=True):
        nbformat.write(book, path)
        print(f"wrote  {path}, {path.stat().st_size / 1000:,.0f} kB")


if __name__ == "__main__":
    main()
