"""Findings of every probe on three small trained models, and on their shapes with random weights.

`python -m workbench.experiments.findings` writes docs/findings.md. The embedded model runs on its own corpus, the
others on stories; --shared names the folder with their `models/` and `corpora/`. About ten minutes on one core.

Of another model, with the same control, for instance before and after a change of a probe:

    python -m workbench.experiments.findings --model models/smollm2-135m --text stories.jsonl --rows 3000 \\
        --probes attention-sinks successor-heads --write smollm2.md
"""

from __future__ import annotations

import argparse
import html
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import workbench as wb
from workbench.demo.run import HEAD_SITES, SITES
from workbench.demo.run import SETTINGS as QUICK
from workbench.experiments.controls import random_copy
from workbench.experiments.demo_model.made_of import embedded, fingerprint, made_of, model_fingerprint
from workbench.io.errors import WorkbenchError
from workbench.io.progress import progress
from workbench.results.registry import find_probe, installed_probes

PAGE = Path(__file__).parents[2] / "docs" / "findings.md"
SHARED = Path(__file__).parents[3] / "shared"
OTHERS = ("stories260K", "babyllama-105")
"""Models beside the embedded one, in the folder `shared`."""
STORIES = Path("corpora") / "tinystories_1000.jsonl"
ROWS = 20_000
REPEATS = 60
"""Sequences of random tokens that repeat, for induction heads."""
SETTINGS = {
    "attention-sinks": QUICK["attention-sinks"],
    "future-prompts": QUICK["future-prompts"],
    "token-erasure": {"offsets": (-2, -1, 0), "late": 3},
}
"""Settings of each probe that differ from its defaults."""
OTHER_INPUTS = ("activation-patching", "path-patching", "steering")
"""Probes of pairs of prompts or of a direction, not of texts alone; their pages state what they find."""
ANOTHER_SETTINGS = {"token-erasure": {"offsets": (-2, -1, 0)}, "future-prompts": QUICK["future-prompts"]}

TEXT = """# What the probes find

{made_of}
Every probe on three trained models, each with a control: a model of the same shape with Hugging Face's random weights.
A finding that the control shares is not a result of training. `python -m workbench.experiments.findings` writes this
page from {rows:,} tokens of `demo_corpus()` for the embedded model, and of TinyStories for the other two (stories260K
and babyllama-105, small Llamas trained elsewhere). Settings are the defaults, except those in `SETTINGS` of
experiments/findings/__main__.py: the future prompts are few and briefly trained, and more training would find more.
"""


ANOTHER = """# What the probes find in {model}

{made_of}
The probes on {model} and on a model of the same shape with random weights, over {rows:,} tokens.
"""


@dataclass(frozen=True)
class Subject:
    """A model and its texts."""

    title: str
    model: wb.Model
    texts: Sequence[Any]


def subjects(sources: Sequence[tuple[str, str | Path, list[Any]]]) -> Iterator[Subject]:
    """Yields the models of `sources`, (title, model, texts), each followed by its random copy."""
    for title, source, texts in sources:
        model = wb.load_model(source, device="cpu")
        yield Subject(title, model, texts)
        yield Subject(f"{title}, random weights", random_copy(model), texts)


def page_sources(shared: Path) -> list[tuple[str, str | Path, list[Any]]]:
    """Returns the embedded model and the models of `shared`, with their texts."""
    others: list[tuple[str, str | Path, list[Any]]]
    others = [(name, shared / "models" / name, [shared / STORIES]) for name in OTHERS]
    return [("demo", "demo", list(wb.demo_corpus())), *others]


def headlines(
    subject: Subject,
    folder: Path,
    rows: int,
    probes: Sequence[str] | None = None,
    settings: Mapping[str, Mapping[str, Any]] = SETTINGS,
) -> dict[str, str]:
    """Returns the headline of every probe, or the reason why it was not run.

    Args:
        subject: The model and its texts.
        folder: Folder for the recordings.
        rows: Maximum number of tokens to record.
        probes: Names of the probes. None: every installed one that needs texts alone.
        settings: Settings of each probe that differ from its defaults.
    """
    options = {"max_rows": rows, "show_progress": False}
    stores = [
        wb.record(subject.model, subject.texts, out=folder / "rows.acts", sites=SITES, **options),
        wb.record(subject.model, subject.texts, out=folder / "heads.acts", sites=HEAD_SITES, context=64, **options),
    ]
    repeats = wb.random_repeats(subject.model.tokenizer or range(subject.model.vocab), sequences=REPEATS)
    sites = ["pattern", "resid_post"]
    stores.append(wb.record(subject.model, repeats, out=folder / "repeats.acts", sites=sites, show_progress=False))
    domains = "domain" in stores[0].tokens.column_names
    lines = {}
    for name in (name for name in installed_probes() if name not in OTHER_INPUTS) if probes is None else probes:
        chosen = {key: value for key, value in settings.get(name, {}).items() if key != "domain" or domains}
        lines[name] = _headline(name, chosen, subject.model, stores)
    return lines


def _headline(name: str, settings: dict[str, Any], model: wb.Model, stores: Sequence[wb.Store]) -> str:
    probe, refused = find_probe(name), []
    for store in stores:
        try:
            return probe(**settings).run(store, model=model).headline()
        except WorkbenchError as error:
            refused.append(str(error))
    return f"not run: {refused[0]}"


def page(
    findings: dict[str, dict[str, str]], rows: int, fingerprints: Mapping[str, str], head: str = TEXT, model: str = ""
) -> str:
    """Returns the page: `head`, filled in, and a section for each probe with a line for each model."""
    versions = {"tokens of each model": rows, "Python": platform.python_version(), "torch": version("torch")}
    sections = []
    for probe in next(iter(findings.values())):
        lines = "".join(f"| {title} | {_cell(headlines[probe])} |\n" for title, headlines in findings.items())
        sections.append(f"## {probe}\n\n| model | finding |\n| --- | --- |\n{lines}")
    return "\n".join([head.format(rows=rows, made_of=made_of(fingerprints, versions), model=model), *sections])


def _fingerprints(shared: Path) -> dict[str, str]:
    others = {f"model {name}": model_fingerprint(shared / "models" / name) for name in OTHERS}
    return embedded() | others | {"texts TinyStories": fingerprint([shared / STORIES])}


def _cell(text: str) -> str:
    """Escapes text of models, which must not become markup."""
    return html.escape(text, quote=False).replace("|", "&#124;")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the probes on all models and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m workbench.experiments.findings", description=__doc__)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with models/ and corpora/")
    parser.add_argument("--rows", type=int, default=ROWS, help="tokens recorded of each model")
    parser.add_argument("--write", type=Path, default=PAGE, help="page to write")
    parser.add_argument("--model", type=Path, help="folder of a model to measure in place of those of the page")
    parser.add_argument("--text", type=Path, help="texts for --model; default: the stories of --shared")
    parser.add_argument("--probes", nargs="+", help="probes to run; default: all")
    request = parser.parse_args(arguments)
    if (request.model or request.probes) and request.write == PAGE:
        parser.error("--write: name another page; docs/findings.md has every probe of the models of the page")
    text = request.text or request.shared / STORIES
    another = [] if request.model is None else [(request.model.name, request.model, [text])]
    sources, settings = (another, ANOTHER_SETTINGS) if another else (page_sources(request.shared), SETTINGS)
    findings = {}
    with progress("findings", 2 * len(sources), "models") as tick, tempfile.TemporaryDirectory() as folder:
        for number, subject in enumerate(subjects(sources)):
            place = Path(folder) / str(number)
            findings[subject.title] = headlines(subject, place, request.rows, request.probes, settings)
            tick(1)
    if request.model is not None:
        known = {f"model {request.model.name}": model_fingerprint(request.model), "texts": fingerprint([text])}
        text_of_page = page(findings, request.rows, known, ANOTHER, request.model.name)
    else:
        text_of_page = page(findings, request.rows, _fingerprints(request.shared))
    request.write.write_text(text_of_page, encoding="utf-8")
    print(f"wrote  {request.write}")


if __name__ == "__main__":
    main()
