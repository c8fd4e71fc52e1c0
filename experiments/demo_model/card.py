"""Write the page of the embedded model, docs/demo-model.md, from measurements.

`python -m workbench.experiments.demo_model.card` measures what ships, the same model before training, and one of
random weights; other seeds come from `seed-*.json` in this folder, since a clone has no weights of theirs.
`--measure runs/demo-1` writes such a file from a run of `demo_model.train` and `demo_model.sae`. About ten minutes on
one core; a run takes three.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import workbench as wb
from workbench.embedded import MODEL, SAE
from workbench.experiments.controls import random_copy
from workbench.experiments.demo_model.made_of import embedded, made_of, model_fingerprint, sae_fingerprint
from workbench.experiments.demo_model.phenomena import DOCUMENTS, Finding, measure
from workbench.experiments.demo_model.tokenizer import train_tokenizer
from workbench.experiments.demo_model.train import Recipe, build, read_recipe

PAGE = Path(__file__).parents[2] / "docs" / "demo-model.md"
SEEDS = Path(__file__).parent
POINTS = (1, 100, 250)
"""Steps whose loss the page shows, besides every 500th and the last."""


@dataclass(frozen=True)
class Column:
    """One model of the table of phenomena."""

    title: str
    findings: list[Finding]
    curves: Mapping[str, pd.DataFrame]
    losses: Mapping[int, float]
    """Step to the mean loss of the fifty steps before it, in nats; empty for a model that was not trained."""
    fingerprints: Mapping[str, str]


def measure_run(title: str, model: Path, sae: Path, training: Path) -> Column:
    """Measures a trained model and its SAE."""
    findings, curves = measure(wb.load_model(model), wb.load_sae(sae))
    prints = {"model": model_fingerprint(model), "SAE": sae_fingerprint(sae)}
    return Column(title, findings, curves, losses(training), prints)


def measure_shipped() -> Column:
    """Measures the model and the SAE that ship."""
    training = MODEL / "training.json"
    return measure_run(f"seed {read_recipe(training).seed} (shipped)", MODEL, SAE, training)


def measure_random() -> Column:
    """Measures a model of the shipped shape with Hugging Face's random weights."""
    return Column("random weights", *measure(random_copy(wb.load_model(MODEL))), {}, {})


def measure_initial() -> Column:
    """Measures the shipped model as it was before its first step."""
    tokenizer = train_tokenizer(seed=0)
    module = build(read_recipe(MODEL / "training.json"), tokenizer).eval()
    return Column("before training", *measure(wb.Model(module, tokenizer, "before training")), {}, {})


def losses(training: Path) -> dict[int, float]:
    """Returns the losses that the page shows, of a `training.json`."""
    step_losses = json.loads(training.read_text())["loss"]
    points = [
        point for point in (*POINTS, *range(500, len(step_losses), 500), len(step_losses)) if point <= len(step_losses)
    ]
    return {point: float(np.mean(step_losses[max(0, point - 50) : point])) for point in points}


def save_seed(run: Path, folder: Path = SEEDS) -> Path:
    """Measures a run and writes its numbers as `seed-N.json`; returns the file."""
    recipe = read_recipe(run / "training.json")
    column = measure_run(f"seed {recipe.seed}", run / "model", run / "sae", run / "training.json")
    curves = {name: table.to_dict("records") for name, table in column.curves.items() if name != "labels"}
    record = {**asdict(column), "curves": curves, "recipe": asdict(recipe)}
    path = folder / f"seed-{recipe.seed}.json"
    path.write_text(json.dumps(record, indent=1, default=_plain, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_seed(path: Path) -> Column:
    """Reads what `save_seed` wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    return Column(
        record["title"],
        [Finding(**finding) for finding in record["findings"]],
        {name: pd.DataFrame(rows) for name, rows in record["curves"].items()},
        {int(step): loss for step, loss in record["losses"].items()},
        record["fingerprints"],
    )


def write(page: Path, seeds: Sequence[Path], tried: str) -> None:
    """Measures what ships and its controls, and writes the page."""
    trained = [measure_shipped(), *map(read_seed, seeds)]
    columns = [*trained, measure_initial(), measure_random()]
    page.write_text(text(columns, trained, tried), encoding="utf-8")


def text(columns: Sequence[Column], trained: Sequence[Column], tried: str) -> str:
    """Returns the page; the first column is the shipped model."""
    recipe = read_recipe(MODEL / "training.json")
    model, sae = wb.load_model(MODEL), wb.load_sae(SAE)
    size = sum(weight.numel() for weight in model.module.parameters())
    versions = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    return "\n".join(
        [
            "# The embedded model\n",
            made_of(_fingerprints(trained), _settings(recipe)),
            _HEAD.format(size=size, recipe=recipe, vocab=model.vocab, torch=torch.__version__, documents=DOCUMENTS),
            _shares(recipe),
            _losses(trained),
            _phenomena(columns),
            *(_curve(name, columns) for name in ("erasure", "future_lens", "logit_lens")),
            _labels(columns[0].curves["labels"]),
            _SAE.format(sae=sae, k=sae.config()["k"]),
            tried,
            _AGAIN.format(**versions),
        ]
    )


def _fingerprints(trained: Sequence[Column]) -> dict[str, str]:
    fingerprints = {
        f"{name}, {column.title}": digits for column in trained[1:] for name, digits in column.fingerprints.items()
    }
    return embedded() | fingerprints


def _settings(recipe: Recipe) -> dict[str, object]:
    return {"steps": recipe.steps, "documents measured": DOCUMENTS, "torch": torch.__version__}


def _plain(value: Any) -> Any:
    return value.item()


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shares(recipe: Recipe) -> str:
    heading = ["domain", "share of the sequences", "what it holds"]
    return _table(heading, ([domain, f"{100 * share:.0f} %", _DOMAINS[domain]] for domain, share in recipe.shares))


def _losses(columns: Sequence[Column]) -> str:
    steps = sorted({step for column in columns for step in column.losses})
    rows = (
        [f"{step:,}", *(f"{column.losses[step]:.3f}" if step in column.losses else "" for column in columns)]
        for step in steps
    )
    return _LOSSES + _table(["step", *(column.title for column in columns)], rows)


def _phenomena(columns: Sequence[Column]) -> str:
    heading = ["phenomenon", "measure", "criterion", *(column.title for column in columns)]
    rows = []
    for finding in columns[0].findings:
        measure = f"{finding.measure} ({finding.unit})" if finding.unit else finding.measure
        values = (_finding(column, finding.measure) for column in columns)
        rows.append([finding.phenomenon, measure, finding.wanted, *values])
    details = (
        f"- {column.title}: {finding.measure}: {finding.where}\n"
        for column in columns
        for finding in column.findings
        if finding.where
    )
    return _MEASURED + _table(heading, rows) + "\nDetails:\n\n" + "".join(details)


def _finding(column: Column, name: str) -> str:
    for finding in column.findings:
        if finding.measure == name:
            return f"{finding.value:.3g} {'✓' if finding.holds else '✗'}"
    return ""


def _curve(name: str, columns: Sequence[Column]) -> str:
    table = pd.concat([column.curves[name].assign(model=column.title) for column in columns], ignore_index=True)
    names = ["model", *(name for name in table.columns if name != "model")]
    rows = ([_text(line[name]) for name in names] for _, line in table.iterrows())
    return f"### {_CURVES[name]}\n\n" + _table(names, rows)


def _labels(best: pd.DataFrame) -> str:
    rows = ([_text(value) for value in line] for line in best.head(30).itertuples(index=False))
    return "### Best feature per label (shipped SAE, the thirty with the highest F1)\n\n" + _table(list(best), rows)


def _text(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


_DOMAINS = {
    "story": "two people over several days: names, places, days, feelings, things",
    "facts": "homes, jobs and animals of people",
    "lists": "consecutive days, months, number words, digits, letters, ordinals",
    "copy": "meaningless passages, repeated",
    "backcopy": "a bigram chain; after a trigger word the preceding word returns",
    "random repeats": "3 to 64 random tokens, repeated until the sequence is full; no text",
}

_CURVES = {
    "erasure": "Token erasure: accuracy of the linear probe for the previous token, with 95 % CI over documents",
    "future_lens": "Future lens: accuracy for the model's prediction at t+2 (N = 1), by layer",
    "logit_lens": "Logit lens: mean cross-entropy of the text (nats)",
}

_HEAD = """`wb.load_model("demo")` is a language model of {size:,} parameters that we trained on texts about a small
invented world. Every probe finds a real phenomenon in it on a machine without network, and the truth about every word
is known. It knows nothing else and serves no other purpose. `python -m workbench.experiments.demo_model.card` writes
this page from measurements; earlier trials are under "What was tried".

## Data

`experiments/demo_model/corpus.py` generates documents in five domains about 120 people with fixed homes, jobs and
animals, 40 places, six ordinal classes and seven classes of words, with labels for each word: `entity`, `concept`,
`ordinal`, `ordinal_index`, `trigger`, `copy_source`. The corpus that ships, `wb.demo_corpus()`, and all texts measured
below come from seeds that training never saw; people and facts are the same, since the model can only know those it
was trained on.

The tokenizer is a byte-level BPE of {vocab:,} entries. It was trained without the names of people, so they split into
two to five tokens, as rare names do. Ordinals are one token, with and without a leading space.

## Recipe

Llama architecture in Hugging Face format: {recipe.layers} layers, d_model {recipe.d_model}, {recipe.heads} heads, d_mlp
{recipe.d_mlp}, tied embeddings, RoPE, biases in attention, context {recipe.context}, BOS first. AdamW, betas 0.9 and
0.975, weight decay {recipe.weight_decay} on matrices, gradient norm clipped at 1, learning rate
{recipe.learning_rate:g} after {recipe.warmup} warm-up steps, then a cosine down to a tenth over {recipe.steps:,} steps
of {recipe.batch} sequences of {recipe.context} tokens, in fp32 on one CPU thread (torch {torch}). Stored in fp16,
loaded as fp32.

**What the initialisation provides.** Six million tokens are few, so three structures are part of the initial weights
and need not be learned (`build` in `experiments/demo_model/train.py`):

- two heads of block 0 attend to the previous token, through biases of queries and keys;
- all heads of blocks 1 and 2 copy the tokens they attend to, W_O = W_V transposed (mimetic initialisation, Trockman &
  Kolter, arXiv 2305.09828);
- all heads of blocks 2 and 3 prefer distant tokens to near ones, so that none can attend to its own token.

It is therefore no finding that heads of blocks 2 and 3 attend away from their neighbours. It is a finding that they
attend to BOS, in some texts or in all, and so are induction and successor heads: the column "before training" has none.

"""

_LOSSES = """## Losses

Mean of the fifty preceding steps in nats per token, including first occurrences of random tokens, which cannot be
predicted. The loss of every step of the shipped run is in `workbench/embedded/model/training.json`.

"""

_MEASURED = f"""## Phenomena

Measured by the probes (`experiments/demo_model/phenomena.py`) on {DOCUMENTS} documents held out from training. ✓ and ✗:
whether the criterion is met. The last columns are controls: the shipped model before its first step, and a model of the
same shape with Hugging Face's random weights. A value that they share is not a result of training. Predictions of an
untrained model hardly vary, so a single state determines them (future lens, "the model's prediction"); about the text
it predicts nothing.

"""

_SAE = """## The sparse autoencoder

`wb.load_sae("demo")`: {sae.architecture}, {sae.d_sae:,} latents, k {k}, on `{sae.site}`, trained by SAELens' trainer on
activations from a store (`python -m workbench.experiments.demo_model.sae`). BOS is excluded, in training and in all
numbers above, since the norm of the sink would be most of the variance.
"""

_AGAIN = """## Train it again

<!-- not run: trains for an hour -->
```sh
python -m workbench.experiments.demo_model.train --seed 0 --out runs/demo-0
python -m workbench.experiments.demo_model.train --seed 1 --out runs/demo-1
python -m workbench.experiments.demo_model.sae runs/demo-0
python -m workbench.experiments.demo_model.sae runs/demo-1
python -m workbench.experiments.demo_model.ship runs/demo-0
python -m workbench.experiments.demo_model.card --measure runs/demo-1
python -m workbench.experiments.demo_model.card
```

`make demo-model` does all of it. The same seed gives the same losses on the same machine; on another, sums are computed
in another order, and the curves slowly diverge. This page: {machine}, Python {python}, torch {torch}, CPU.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures a run if one is given, and writes the page of the demo model."""
    parser = argparse.ArgumentParser(prog="python -m workbench.experiments.demo_model.card", description=__doc__)
    parser.add_argument("--measure", type=Path, metavar="RUN", help="measure this run and write its seed-N.json")
    parser.add_argument("--write", type=Path, default=PAGE, help="page to write")
    request = parser.parse_args(arguments)
    if request.measure is not None:
        print(f"wrote  {save_seed(request.measure)}")
        return
    shipped_seed = read_recipe(MODEL / "training.json").seed
    seeds = [path for path in sorted(SEEDS.glob("seed-*.json")) if path.stem != f"seed-{shipped_seed}"]
    write(request.write, seeds, (SEEDS / "tried.md").read_text(encoding="utf-8"))
    print(f"wrote  {request.write}")


if __name__ == "__main__":
    main()
