"""Every notebook runs from top to bottom, offline, and holds the outputs of such a run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbformat, which comes with jupyterlab")
pytest.importorskip("anywidget", reason="needs anywidget: pip install 'interp-workbench[notebook]'")
runs = pytest.importorskip(
    "workbench.experiments.pictures.notebooks", reason="needs nbclient, which comes with jupyterlab"
)

FOLDER = runs.FOLDER
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PROBES = {"AttentionSinks", "FutureLens", "LogitLens", "SuccessorHeads", "TokenErasure", "TunedLens"}
PROBES |= {"AttributionPatching", "DirectLogitAttribution", "EdgeAttribution"}
PROBES |= {"ActivationPatching", "MaskedSinks", "Steering"}
PROBES |= {"InductionHeads", "LinearProbes", "MassiveActivations"}

books = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(path: Path) -> str:
    return "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")


def test_every_probe_has_its_notebook():
    used = {name for path in NOTEBOOKS for name in re.findall(r"^from workbench.probes import (.+)$", code(path), re.M)}
    assert {probe for names in used for probe in names.split(", ")} == PROBES
    listed = re.findall(r"\]\(([\w-]+\.ipynb)\)", (FOLDER / "README.md").read_text())
    assert sorted(listed) == [path.name for path in NOTEBOOKS]


@books
def test_it_is_kept_with_the_outputs_of_its_code(path):
    book = nbformat.read(path, 4)
    nbformat.validate(book)
    assert book.metadata.kernelspec.name == "python3"
    assert book.metadata[runs.KEY] == runs.checksum(book), f"run `make notebooks NOTEBOOKS=notebooks/{path.name}`"
    assert path.stat().st_size < 400_000
    assert not re.search(r"/tmp/|/home/|/work/|/root/|site-packages", path.read_text())
    outputs = [output for cell in runs.code_cells(book) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    shown = [cell for cell in runs.code_cells(book) if re.search(r"figure(s\(\)\[.*\]|\(.*\))$", cell.source)]
    assert len(pictures) == len(shown)
    assert all(set(output.data) == {"image/png", "text/plain"} for output in pictures)
    assert all(len(output.metadata["image/png"]["alt"]) > 40 for output in pictures)  # read by screen readers


@books
def test_it_tells_a_story_and_asserts_a_fact(path):
    book = nbformat.read(path, 4)
    assert book.cells[0].source.startswith("# ")
    assert re.search(r"^ *assert |assert_allclose", code(path), re.M)
    imports = set(re.findall(r"^(?:from|import) (\w+)", code(path), re.M))
    assert imports <= {"workbench", "numpy", "pandas", "torch", "transformers", "json", "pathlib"}
    assert not re.search(r"^from workbench(?!\.probes import)", code(path), re.M)  # the public names alone


@pytest.fixture(scope="module")
def shared_kernel(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    path = os.pathsep.join([str(FOLDER.parent), environment["PYTHONPATH"]])
    quiet = {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    with runs.kernel(tmp_path_factory.mktemp("kernel"), {**environment, **quiet}) as manager:
        yield manager


@books
def test_it_runs(path, shared_kernel, tmp_path, request):
    """The notebook runs in a fresh namespace and an empty folder; its asserts hold, and no cell warns."""
    if runs.HUB_ID in code(path):
        request.getfixturevalue("smollm2")
    book = nbformat.read(path, 4)
    runs.execute(book, shared_kernel, tmp_path)
    outputs = [output for cell in runs.code_cells(book) for output in cell.outputs]
    printed = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    lines = [line for text in printed for line in text.splitlines() if line.strip() and "%|" not in line]  # no progress
    expected = ("no Chrome", "kaleido is not", "cut into several sequences")
    assert [line for line in lines if not any(text in line for text in expected)] == []
    displayed = [output.data for output in outputs if "data" in output]
    widgets = [data for data in displayed if runs.WIDGET in data]
    assert all("text/html" in data for data in widgets)  # for readers of the file, who have no kernel
    progress = [data["text/plain"] for data in displayed if "<progress" in data.get("text/html", "")]
    assert progress == []  # the file has what was done
    if path.stem == "quickstart":
        assert any("workbench-card" in data.get("text/html", "") for data in displayed)
        assert widgets
        assert any(" tokens, done in " in data["text/plain"] for data in displayed)
        assert any(runs.FIGURE in data for data in displayed)
    runs.keep_outputs(book, tmp_path)
    assert kinds(book) == kinds(nbformat.read(path, 4))


def kinds(book) -> list[list[str]]:
    """The kinds of outputs of each cell."""
    return [[output.output_type for output in cell.outputs] for cell in runs.code_cells(book)]
