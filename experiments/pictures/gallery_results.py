"""Results that the gallery shows: the demo on a model, and the probes that ask for more than a store of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import workbench as wb
from workbench.demo.run import demo
from workbench.probes import FunctionVectors, HeadAblation, RepresentationHijacking, SemanticAxes, Steering

_ROWS = 2_000  # tokens of another model than the embedded one
_DEMO = "demo"
_DEMO_WORDS = {"word": "garden", "original": "river", "counts": (1, 2), "draws": 4}
_DEMO_SENTENCES = {
    "garden": ("The {} was big.", "A {} is here.", "He saw the {}."),
    "river": ("The {} was cold.", "A {} ran by.", "She saw the {}."),
}
_DAYS = (" Monday", " Tuesday")


def make_results(model: str, folder: Path, print_line: Callable[[str], None] = print) -> Path:
    """Runs every probe on a model and returns the folder of the results.

    The embedded model takes a few minutes, SmolLM2-135M more than an hour of one core. What `folder` has already is
    not run again.

    Args:
        model: A directory, a hub id, or "demo".
        folder: Folder for the demo's files and results.
        print_line: Receives one line of text after each step.
    """
    if not (folder / "report.html").exists():
        demo(folder, model=model, rows=None if model == _DEMO else _ROWS, print_line=print_line)
    loaded = wb.load_model(model)
    for name, run in _further(loaded, folder):
        if (folder / "results" / name / "result.json").exists():
            continue
        try:
            result = run()
        except wb.RequestError as error:  # the model lacks the words or the axes
            print_line(f"{name:<15} not run: {error}")
            continue
        result.save(folder / "results" / name)
        print_line(f"{name:<15} {result.headline()}")
    return folder / "results"


def _further(model: wb.Model, folder: Path) -> Iterator[tuple[str, Callable[[], wb.Result]]]:
    """Probes that need prompts with examples, other words, heads or a direction, by name."""
    texts, heads = wb.open_store(folder / "demo.acts"), str(folder / "results" / "induction-heads")
    yield "semantic-axes", lambda: SemanticAxes().run(model)
    yield "head-ablation", lambda: HeadAblation(ranked_by=heads).run(texts, model=model)
    yield "function-vectors", lambda: _function_vectors(model)
    yield "representation-hijacking", lambda: _hijacking(model, folder)
    yield "steering", lambda: _steering(model, texts)


def _function_vectors(model: wb.Model) -> wb.Result:
    task = "in-context-next" if model.name == _DEMO else "in-context-capitals"
    return FunctionVectors(draws=2).run_pairs(model, wb.prompt_pairs(task, model, 8))


def _hijacking(model: wb.Model, folder: Path) -> wb.Result:
    words = {**_DEMO_WORDS, "sentences": _DEMO_SENTENCES} if model.name == _DEMO else {}
    store = wb.record(model, wb.substitution_texts(**words), sites=["resid_post"], out=folder / "hijack.acts")
    return RepresentationHijacking().run(store, model=model)


def _steering(model: wb.Model, texts: wb.Store) -> wb.Result:
    days, others = texts.where("ordinal = 'day'"), texts.where("ordinal IS NULL AND position > 0")
    layer = 1 if model.name == _DEMO else model.site_map.n_layers // 2
    direction = wb.mean_difference(days, others, "resid_post", layer)
    return Steering(tokens=_DAYS, new_tokens=4, row_limit=8).steer(texts, direction, model=model)
