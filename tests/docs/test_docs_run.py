"""Every code block and shell command of README and docs is executed, in order, on the embedded model."""

from __future__ import annotations

import importlib
import json
import re
import warnings

import pytest
from command_line import run
from documents import ROOT, RUN, SHOWN, TEXTS, blocks, pages, stand_ins

PAGES = {page.relative_to(ROOT).as_posix(): page for page in pages()}
RUNNING = [name for name, page in PAGES.items() if any(block.runs for block in blocks(page))]
STORE, FEATURES = "runs/gpt2.acts", "runs/gpt2.acts/features"
GGUF = "SmolLM2-135M-Instruct-Q8_0.gguf"
"""A file of a tiny model stands in for it."""
RECORDING = ("README.md", "tutorial.md")
"""Pages that record `STORE` themselves; every other page begins in a folder that has it."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with the beginnings of a few documents of the embedded corpus in stories.jsonl, and their recording."""
    import workbench as wb

    folder = tmp_path_factory.mktemp("docs")
    documents = [document for document in wb.demo_corpus() if document["domain"] in ("story", "lists")]
    texts = folder / TEXTS
    texts.write_text("".join(json.dumps(beginning(document)) + "\n" for document in documents[:12]))
    model = wb.load_model("demo")
    sites = ["resid_post", "attn_received", "pattern.1"]
    wb.record(model, str(texts), sites=sites, out=folder / STORE, context=128, show_progress=False)
    return folder


def beginning(document: dict, characters: int = 400) -> dict:
    """The first characters of a document, with the spans that lie in them."""
    spans = {
        label: [span for span in listed if span["end"] <= characters] for label, listed in document["spans"].items()
    }
    return {**document, "text": document["text"][:characters], "spans": spans}


@pytest.fixture
def reader(recorded, tmp_path, monkeypatch, request):
    """Gives a function that opens a page in a folder of its own."""

    def begin(name: str):
        import os
        import shutil

        shutil.copy(recorded / TEXTS, tmp_path / TEXTS)
        if name.endswith("models.md"):
            from gguf_files import write

            write(tmp_path / GGUF, request.getfixturevalue("tiny_models")["llama"])
        if not name.endswith(RECORDING):
            shutil.copytree(recorded / STORE, tmp_path / STORE, copy_function=os.link)
        monkeypatch.chdir(tmp_path)
        # Chrome takes seconds a figure; tests/pages renders with it.
        monkeypatch.setattr("workbench.pages.figure_export.render", lambda _figures, _formats: {})
        return tmp_path

    return begin


@pytest.mark.parametrize("name", PAGES)
def test_a_block_is_executed_or_says_why_not(name):
    for block in blocks(PAGES[name]):
        assert block.language in (*RUN, *SHOWN), f"{block.place}: name the language: {', '.join((*RUN, *SHOWN))}"
        if block.reason is not None:
            assert block.language in RUN, f"{block.place}: a {block.language} block is not run anyway"
    marks = re.findall(r"<!-- not run.*", PAGES[name].read_text(encoding="utf-8"))
    assert len(marks) == sum(block.reason is not None for block in blocks(PAGES[name])), f"{name}: a mark without block"


@pytest.mark.parametrize("name", RUNNING)
def test_the_blocks_of_a_page_run_in_order(name, reader):
    reader(name)
    variables = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # small texts: intervals over few documents, and the like
        for block in blocks(PAGES[name]):
            if block.runs and block.language != "sh":
                exec(compile(stand_ins(block.text), block.place, "exec", dont_inherit=True), variables)
            elif block.runs:
                for command in block.commands():
                    execute(command, block.place)


def execute(command: list[str], place: str) -> None:
    """Runs a command of a page inside this process."""
    match command:
        case ["workbench", *arguments]:
            code, _, err = run(*arguments)
            assert code == 0, f"{place}: {' '.join(command)}\n{err}"
        case ["python", "-m", module, *arguments] if module.startswith("workbench.experiments."):
            code = None
            try:
                entry(module)(arguments)
            except SystemExit as stop:
                code = stop.code
            assert not code, f"{place}: {' '.join(command)}: {code}"
        case _:
            pytest.fail(f"{place}: {command[0]} cannot be run here; mark the block <!-- not run: REASON -->")


def entry(module: str):
    """Returns the function behind `python -m MODULE`."""
    from workbench.cli.main import run_experiment

    experiment = importlib.import_module(module)
    return (
        experiment.main if hasattr(experiment, "main") else lambda arguments: run_experiment(experiment.NAME, arguments)
    )
