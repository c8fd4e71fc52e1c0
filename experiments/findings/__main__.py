"""What every probe finds on three small trained models, and on their shapes with random weights.

`python -m workbench.experiments.findings` writes docs/findings.md. The embedded model is asked about its own corpus,
the others about stories; a folder with `models/` and `corpora/` is given with --shared.
"""

from __future__ import annotations

import argparse
import html
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import workbench as wb
from workbench.demo.run import HEAD_SITES, SITES
from workbench.demo.run import SETTINGS as QUICK
from workbench.experiments.controls import random_copy
from workbench.io.errors import WorkbenchError
from workbench.io.progress import progress
from workbench.results.registry import find_probe, installed_probes

PAGE = Path(__file__).parents[2] / "docs" / "findings.md"
SHARED = Path(__file__).parents[3] / "shared"
ROWS = 20_000
SETTINGS = {
    "attention-sinks": QUICK["attention-sinks"],
    "future-prompts": QUICK["future-prompts"],
    "token-erasure": {"offsets": (-2, -1, 0), "late": 3},
}
"""Probe to those of its settings that are not the default."""

TEXT = """# What the probes find

Every probe on three trained models, beside a model of the same shape with Hugging Face's random weights: what that
one shows as well, training did not make. Written by `python -m workbench.experiments.findings`: {rows:,} tokens of
`demo_corpus()` for the embedded model, of TinyStories for the other two ({stories} and {characters} are tiny Llamas
that were trained elsewhere). Settings are the probes' own, but for what `SETTINGS` in experiments/findings.py says; the
future prompts are few and hardly trained, and would find more. CPU, Python {python}, torch {torch}.
"""


@dataclass(frozen=True)
class Subject:
    """One model and the texts it is asked about."""

    title: str
    model: wb.Model
    texts: Sequence[Any]


def subjects(shared: Path) -> Iterator[Subject]:
    """The embedded model and what `shared` holds, each followed by its random copy."""
    stories = shared / "corpora" / "tinystories_1000.jsonl"
    sources = [("demo", "demo", list(wb.demo_corpus()))]
    sources += [(name, shared / "models" / name, [stories]) for name in ("stories260K", "babyllama-105")]
    for title, source, texts in sources:
        model = wb.load_model(source, device="cpu")
        yield Subject(title, model, texts)
        yield Subject(f"{title}, random weights", random_copy(model), texts)


def headlines(subject: Subject, folder: Path, rows: int) -> dict[str, str]:
    """Probe to what it says in one line, or to why it was not run."""
    asked = {"max_rows": rows, "show_progress": False}
    stores = [
        wb.record(subject.model, subject.texts, out=folder / "rows.acts", sites=SITES, **asked),
        wb.record(subject.model, subject.texts, out=folder / "heads.acts", sites=HEAD_SITES, context=64, **asked),
    ]
    domains = "domain" in stores[0].tokens.column_names
    found = {}
    for name in installed_probes():
        settings = {key: value for key, value in SETTINGS.get(name, {}).items() if key != "domain" or domains}
        found[name] = _headline(name, settings, subject.model, stores)
    return found


def _headline(name: str, settings: dict[str, Any], model: wb.Model, stores: Sequence[wb.Store]) -> str:
    probe, refused = find_probe(name), []
    for store in stores:
        try:
            return probe.headline(probe(**settings).run(store, model=model))
        except WorkbenchError as error:
            refused.append(str(error))
    return f"not run: {refused[0]}"


def page(found: dict[str, dict[str, str]], rows: int) -> str:
    """A section for each probe, a line for each model."""
    head = TEXT.format(
        rows=rows,
        stories="stories260K",
        characters="babyllama-105",
        python=platform.python_version(),
        torch=version("torch"),
    )
    sections = []
    for probe in next(iter(found.values())):
        lines = "".join(f"| {title} | {_cell(said[probe])} |\n" for title, said in found.items())
        sections.append(f"## {probe}\n\n| model | finding |\n| --- | --- |\n{lines}")
    return "\n".join([head, *sections])


def _cell(text: str) -> str:
    """Model text is never markup, in Markdown neither."""
    return html.escape(text, quote=False).replace("|", "&#124;")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m workbench.experiments.findings", description=__doc__)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--write", type=Path, default=PAGE)
    asked = parser.parse_args(arguments)
    found = {}
    with progress("findings", 6, "models") as tick, tempfile.TemporaryDirectory() as folder:
        for number, subject in enumerate(subjects(asked.shared)):
            found[subject.title] = headlines(subject, Path(folder) / str(number), asked.rows)
            tick(1)
    asked.write.write_text(page(found, asked.rows), encoding="utf-8")


if __name__ == "__main__":
    main()
