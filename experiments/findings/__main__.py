"""Findings of every probe on four trained models, and on their shapes with random weights, with their costs.

`python -m workbench.experiments.findings` writes docs/findings.md. The embedded model runs on its own corpus, the
others on stories; --shared names the folder with their `models/` and `corpora/`, --real that of SmolLM2-135M, which
`make models` brings. Takes about two hours on one core, most of them for SmolLM2-135M; `--real-rows 0` leaves it out.
Recordings and findings are kept in --folder: an interrupted run goes on, and only probes whose file has changed run
again.

Of another model, with the same control, for instance before and after a change of a probe:

    python -m workbench.experiments.findings --model models/smollm2-135m --text stories.jsonl --rows 3000 \\
        --probes attention-sinks successor-heads --write smollm2.md
"""

from __future__ import annotations

import argparse
import html
import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import workbench as wb
from workbench.demo.run import SETTINGS as QUICK
from workbench.experiments.benchmarks.measure import processor
from workbench.experiments.controls import random_copy
from workbench.experiments.demo_model.made_of import embedded, fingerprint, made_of, model_fingerprint
from workbench.experiments.findings.measure import Finding, Subject, findings
from workbench.io.progress import progress

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "findings.md"
SHARED = ROOT.parent / "shared"
OTHERS = ("stories260K", "babyllama-105")
"""Models beside the embedded one, in the folder `shared`."""
REAL = ROOT / "models" / "smollm2-135m"
STORIES = Path("corpora") / "tinystories_1000.jsonl"
ROWS, REAL_ROWS = 20_000, 3_000
BRIEF = {"future-prompts": QUICK["future-prompts"], "jacobian-lens": {"prompts": 2, "length": 48, "row_limit": 1000}}
"""Settings of each probe that differ from its defaults, for every model."""
SHALLOW = BRIEF | {"token-erasure": {"offsets": (-2, -1, 0), "late": 3}}
"""The same for models of five layers."""
SPEECH = {"linear-probes": {"label": "speech"}}
"""The same for stories."""
FEW = {"row_limit": 250}
DEEP = BRIEF | SPEECH | {"masked-sinks": FEW, "stages": FEW, "zero-tuning": FEW, "tuned-lens": {"epochs": 2}}
DEEP |= {"future-prompts": BRIEF["future-prompts"] | {"layers": (9, 19, 29)}}
"""The same for SmolLM2-135M, whose prompts train for half a minute a layer, and which runs for each head or layer."""
DEMO = SHALLOW | {"attention-sinks": {"domain": "domain"}, "linear-probes": {"label": "domain"}}
"""The same for the embedded model on its corpus."""

TEXT = """# What the probes find

{made_of}
Every probe on {count} trained models, each with a control: a model of the same shape with Hugging Face's random
weights. A finding that the control shares is not a result of training. `python -m workbench.experiments.findings`
writes this page from {rows:,} tokens of `demo_corpus()` for the embedded model, and of TinyStories for stories260K and
babyllama-105, small Llamas trained elsewhere{real}. Linear
probes read whether a token lies between quotation marks in the stories, and its domain in `demo_corpus()`. Settings are
the defaults, except those in `BRIEF`, `SHALLOW`, `SPEECH`, `DEEP` and `DEMO` of experiments/findings/__main__.py: the
future prompts are few and briefly trained, and more training would find more.

CPU s is the processor time of all threads, MB the resident memory that the probe added at most, with the pages of the
store that it read; both without loading the model and recording it ({cpu}).
"""


ANOTHER = """# What the probes find in {model}

{made_of}
The probes on {model} and on a model of the same shape with random weights, over {rows:,} tokens.
CPU s is the processor time of all threads, MB the resident memory that the probe added at most ({cpu}).
"""


def stories(path: Path) -> list[dict[str, Any]]:
    """Returns the texts of a JSON Lines file, with the label `speech` of every character: quoted, or told."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{"text": text, "spans": {"speech": speech(text)}} for text in (json.loads(line)["text"] for line in lines)]


def speech(text: str) -> list[dict[str, Any]]:
    """Returns spans that cover `text`: `quoted` between two double quotation marks, `narrated` elsewhere."""
    spans, end = [], 0
    for match in re.finditer(r'(?<=")[^"\n]+(?=")', text):
        if text.count('"', 0, match.start()) % 2 == 0:  # between two quotations
            continue
        spans.append({"start": end, "end": match.start(), "value": "narrated"})
        spans.append({"start": match.start(), "end": match.end(), "value": "quoted"})
        end = match.end()
    spans.append({"start": end, "end": len(text), "value": "narrated"})
    return [span for span in spans if span["start"] < span["end"]]


@dataclass(frozen=True)
class Source:
    """A model to load, its texts, and what of them is read how."""

    title: str
    model: str | Path
    texts: Sequence[Any]
    rows: int
    settings: Mapping[str, Mapping[str, Any]]

    def subjects(self) -> Iterator[Subject]:
        """Yields the model, then its random copy."""
        model = wb.load_model(self.model, device="cpu")
        yield Subject(self.title, model, self.texts, self.rows, self.settings)
        yield Subject(f"{self.title}, random weights", random_copy(model), self.texts, self.rows, self.settings)


def page_sources(shared: Path, real: Path, rows: int, real_rows: int) -> list[Source]:
    """Returns the models of the page."""
    texts = stories(shared / STORIES)
    sources = [
        Source("demo", "demo", wb.demo_corpus(), rows, DEMO),
        *(Source(name, shared / "models" / name, texts, rows, SHALLOW | SPEECH) for name in OTHERS),
    ]
    return sources + [Source("SmolLM2-135M", real, texts, real_rows, DEEP)] * bool(real_rows)


def page(
    by_model: Mapping[str, Mapping[str, Finding]],
    rows: int,
    fingerprints: Mapping[str, str],
    head: str = TEXT,
    **words: Any,
) -> str:
    """Returns the page: `head`, filled in, and a section for each probe with a line for each model."""
    versions = {"tokens of each model": rows, "Python": platform.python_version(), "torch": version("torch")}
    sections = []
    for probe in next(iter(by_model.values())):
        lines = "".join(_line(title, of_model[probe]) for title, of_model in by_model.items())
        sections.append(
            f"## {probe}\n\n| model | finding | tokens | CPU s | MB |\n| --- | --- |{' ---: |' * 3}\n{lines}"
        )
    words = {"rows": rows, "made_of": made_of(fingerprints, versions), "cpu": processor(), **words}
    return "\n".join([head.format(**words), *sections])


def _line(title: str, finding: Finding) -> str:
    memory = max(0.0, finding.megabytes)
    cost = f"{finding.rows:,} | {finding.seconds:,.1f} | {memory:,.0f}" if finding.rows else "| |"
    return f"| {title} | {_cell(finding.headline)} | {cost} |\n"


def _fingerprints(shared: Path, real: Path | None) -> dict[str, str]:
    folders = {name: shared / "models" / name for name in OTHERS} | ({} if real is None else {"SmolLM2-135M": real})
    models = {f"model {name}": model_fingerprint(folder) for name, folder in folders.items()}
    return embedded() | models | {"texts TinyStories": fingerprint([shared / STORIES])}


def _cell(text: str) -> str:
    """Escapes text of models, which must not become markup."""
    return html.escape(text, quote=False).replace("|", "&#124;")


def _inputs(request: argparse.Namespace) -> Iterator[tuple[str, Path, str]]:
    """Yields the flag, the path and the remedy of every file and folder that the request reads."""
    others = "name a folder with models/ and corpora/"
    if request.text is None or request.model is None:
        yield "--shared", request.shared / STORIES, f"{others}, or a --model with a --text"
    else:
        yield "--text", request.text, "name a file of texts"
    if request.model is not None:
        yield "--model", request.model, "name the folder of a model"
        return
    yield from (("--shared", request.shared / "models" / name, others) for name in OTHERS)
    if request.real_rows:
        yield "--real", request.real, "`make models` brings SmolLM2-135M, and --real-rows 0 leaves it out"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the probes on all models and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m workbench.experiments.findings", description=__doc__)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with models/ and corpora/")
    parser.add_argument("--real", type=Path, default=REAL, help="folder of SmolLM2-135M")
    parser.add_argument("--rows", type=int, default=ROWS, help="tokens recorded of each model")
    parser.add_argument("--real-rows", type=int, default=REAL_ROWS, help="tokens of SmolLM2-135M; 0: without it")
    parser.add_argument("--folder", type=Path, default=Path("runs/findings"), help="folder of what is kept")
    parser.add_argument("--write", type=Path, default=PAGE, help="page to write")
    parser.add_argument("--model", type=Path, help="folder of a model to measure in place of those of the page")
    parser.add_argument("--text", type=Path, help="texts for --model; default: the stories of --shared")
    parser.add_argument("--probes", nargs="+", help="probes to run; default: all")
    request = parser.parse_args(arguments)
    if (request.model or request.probes) and request.write == PAGE:
        parser.error("--write: name another page; docs/findings.md has every probe of the models of the page")
    for flag, path, remedy in _inputs(request):
        if not path.exists():
            parser.error(f"{flag}: {path} does not exist; {remedy}")
    if request.model is None:
        sources = page_sources(request.shared, request.real, request.rows, request.real_rows)
        prints, head = _fingerprints(request.shared, request.real if request.real_rows else None), TEXT
        words = {"count": "four", "real": f", and from {request.real_rows:,} tokens of TinyStories for SmolLM2-135M"}
        if not request.real_rows:
            words = {"count": "three", "real": ". What they find in SmolLM2-135M stands on the page of each probe"}
    else:
        texts, settings = [request.text], BRIEF
        if request.text is None:
            texts, settings = stories(request.shared / STORIES), BRIEF | SPEECH
        sources = [Source(request.model.name, request.model, texts, request.rows, settings)]
        prints = {f"model {request.model.name}": model_fingerprint(request.model)}
        prints |= {"texts": fingerprint([request.text or request.shared / STORIES])}
        head, words = ANOTHER, {"model": request.model.name}
    by_model = {}
    with progress("findings", 2 * len(sources), "models") as tick:
        for subject in (subject for source in sources for subject in source.subjects()):
            place = request.folder / subject.title.replace(", ", "-").replace(" ", "-")
            by_model[subject.title] = findings(subject, place, request.probes)
            tick(1)
    request.write.write_text(page(by_model, request.rows, prints, head, **words), encoding="utf-8")
    print(f"wrote  {request.write}")


if __name__ == "__main__":
    main()
