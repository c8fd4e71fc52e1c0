"""Every notebook runs from top to bottom on the embedded model, offline, and is kept without outputs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbformat, which comes with jupyterlab")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient, which comes with jupyterlab")
pytest.importorskip("anywidget", reason="needs anywidget: pip install 'interp-workbench[notebook]'")

jupyter_client = pytest.importorskip("jupyter_client", reason="needs jupyter_client, which comes with jupyterlab")

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PROBES = {"AttentionSinks", "FutureLens", "LogitLens", "SuccessorHeads", "TokenErasure", "TunedLens"}
PROBES |= {"AttributionPatching", "DirectLogitAttribution", "EdgeAttribution"}
PROBES |= {"ActivationPatching", "MaskedSinks", "Steering"}

books = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(path: Path) -> str:
    return "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")


def test_every_probe_has_its_notebook():
    used = {name for path in NOTEBOOKS for name in re.findall(r"^from workbench.probes import (.+)$", code(path), re.M)}
    assert {probe for names in used for probe in names.split(", ")} == PROBES
    listed = re.findall(r"\]\(([\w-]+\.ipynb)\)", (FOLDER / "README.md").read_text())
    assert sorted(listed) == [path.name for path in NOTEBOOKS]


@books
def test_it_is_kept_without_outputs(path):
    book = nbformat.read(path, 4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in cells] == [[]] * len(cells)
    assert {cell.execution_count for cell in cells} == {None}
    assert book.metadata.kernelspec.name == "python3"


@books
def test_it_tells_a_story_and_asserts_a_fact(path):
    book = nbformat.read(path, 4)
    assert book.cells[0].source.startswith("# ")
    assert re.search(r"^ *assert |assert_allclose", code(path), re.M)
    imports = set(re.findall(r"^(?:from|import) (\w+)", code(path), re.M))
    assert imports <= {"workbench", "numpy", "pandas", "torch", "transformers", "json", "pathlib"}
    assert not re.search(r"^from workbench(?!\.probes import)", code(path), re.M)  # the public names alone


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for all notebooks of a worker: importing torch and transformers takes most of a short notebook."""
    home = tmp_path_factory.mktemp("kernel")
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), environment["PYTHONPATH"]]),
        "PYTHONWARNINGS": "ignore::DeprecationWarning",
    }
    environment |= {"IPYTHONDIR": str(home / ".ipython"), "JUPYTER_PLATFORM_DIRS": "1"}
    manager = jupyter_client.KernelManager(kernel_name="python3")
    manager.start_kernel(env=environment, cwd=str(home))
    yield manager
    manager.shutdown_kernel(now=True)


@books
def test_it_runs(path, kernel, tmp_path):
    """The notebook runs in a fresh namespace and an empty folder; its asserts hold, and no cell warns."""
    book = nbformat.read(path, 4)
    fresh = f"%reset -f\nimport os as _os; _os.chdir({str(tmp_path)!r})"
    book.cells.insert(0, nbformat.v4.new_code_cell(fresh))
    client = nbclient.NotebookClient(book, km=kernel, timeout=600)
    try:
        client.execute()
    finally:  # the kernel stays, and with it nbclient leaves the sockets open
        client.kc.stop_channels()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    lines = [line for text in printed for line in text.splitlines() if line.strip() and "%|" not in line]  # no progress
    expected = ("no Chrome", "kaleido is not", "cut into several sequences")
    assert [line for line in lines if not any(text in line for text in expected)] == []
    displayed = [output.data for output in outputs if "data" in output]
    widgets = [data for data in displayed if "application/vnd.jupyter.widget-view+json" in data]
    assert all("text/html" in data for data in widgets)  # for readers of the file, who have no kernel
    progress = [data["text/plain"] for data in displayed if "<progress" in data.get("text/html", "")]
    assert progress == []  # the file has what was done
    if path.stem == "quickstart":
        assert any("workbench-card" in data.get("text/html", "") for data in displayed)
        assert widgets
        assert any(" tokens, done in " in data["text/plain"] for data in displayed)
        assert any("application/vnd.plotly.v1+json" in data for data in displayed)
