"""Write the model card from measurements: `python -m workbench.experiments.demo_model.card runs/demo-0 runs/demo-1`.

The first run is the one that ships. Beside the runs stands a model of random weights, measured in the same way, so
that a reader sees what training made, what luck made and what the measure gives by itself.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import workbench as wb
from workbench.experiments.controls import random_copy
from workbench.experiments.demo_model.phenomena import Finding, measure
from workbench.experiments.demo_model.tokenizer import train_tokenizer
from workbench.experiments.demo_model.train import Recipe, build, read_recipe

PAGE = Path(__file__).parents[2] / "docs" / "demo-model.md"


@dataclass(frozen=True)
class Column:
    """One model of the table."""

    title: str
    findings: list[Finding]
    curves: Mapping[str, pd.DataFrame]


def trained(run: Path, title: str) -> Column:
    """The findings on a run's model and SAE."""
    return Column(title, *measure(wb.load_model(run / "model"), wb.load_sae(run / "sae")))


def untrained(run: Path) -> Column:
    """The findings on a model of the run's shape with Hugging Face's random weights."""
    like = wb.load_model(run / "model")
    return Column("random weights", *measure(random_copy(like)))


def begun(run: Path) -> Column:
    """The findings on the model that the run began as."""
    tokenizer = train_tokenizer(seed=0)
    module = build(read_recipe(run / "training.json"), tokenizer).eval()
    return Column("before training", *measure(wb.Model(module, tokenizer, "before training")))


def write(runs: Sequence[Path], page: Path, tried: str) -> None:
    """Measure every run and write the card."""
    recipe = read_recipe(runs[0] / "training.json")
    columns = [
        trained(run, f"seed {read_recipe(run / 'training.json').seed}" + " (shipped)" * (run == runs[0]))
        for run in runs
    ]
    columns += [begun(runs[0]), untrained(runs[0])]
    model = wb.load_model(runs[0] / "model")
    sae = wb.load_sae(runs[0] / "sae")
    size = sum(weight.numel() for weight in model.module.parameters())
    page.write_text(
        "\n".join(
            [
                _HEAD.format(size=size, recipe=recipe, vocab=model.vocab, python=f"torch {torch.__version__}"),
                _shares(recipe),
                _losses(runs),
                _phenomena(columns),
                *(_curve(name, columns) for name in ("erasure", "future_lens", "logit_lens")),
                _labels(columns[0].curves["labels"]),
                _SAE.format(sae=sae, k=sae.config()["k"]),
                tried,
                _AGAIN.format(machine=platform.machine(), python=platform.python_version(), torch=torch.__version__),
            ]
        ),
        encoding="utf-8",
    )


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shares(recipe: Recipe) -> str:
    heading = ["domain", "share of the sequences", "what it holds"]
    return _table(heading, ([domain, f"{100 * share:.0f} %", _DOMAINS[domain]] for domain, share in recipe.shares))


def _losses(runs: Sequence[Path]) -> str:
    curves = {
        f"seed {read_recipe(run / 'training.json').seed}": json.loads((run / "training.json").read_text())["loss"]
        for run in runs
    }
    steps = min(map(len, curves.values()))
    points = [point for point in (1, 100, 250, *range(500, steps, 500), steps) if point <= steps]
    rows = (
        [f"{point:,}", *(f"{np.mean(loss[max(0, point - 50) : point]):.3f}" for loss in curves.values())]
        for point in points
    )
    return _LOSSES + _table(["step", *curves], rows)


def _phenomena(columns: Sequence[Column]) -> str:
    heading = ["phenomenon", "measure", "wanted", *(column.title for column in columns)]
    rows = []
    for asked in columns[0].findings:
        measure = f"{asked.measure} ({asked.unit})" if asked.unit else asked.measure
        found = (_finding(column, asked.measure) for column in columns)
        rows.append([asked.phenomenon, measure, asked.wanted, *found])
    where = (
        f"- {column.title}: {finding.measure}: {finding.where}\n"
        for column in columns
        for finding in column.findings
        if finding.where
    )
    return _MEASURED + _table(heading, rows) + "\nWhere:\n\n" + "".join(where)


def _finding(column: Column, measure: str) -> str:
    for finding in column.findings:
        if finding.measure == measure:
            return f"{finding.value:.3g} {'✓' if finding.holds else '✗'}"
    return ""


def _curve(name: str, columns: Sequence[Column]) -> str:
    table = pd.concat([column.curves[name].assign(model=column.title) for column in columns], ignore_index=True)
    names = ["model", *(name for name in table.columns if name != "model")]
    rows = ([_text(line[name]) for name in names] for _, line in table.iterrows())
    return f"### {_CURVES[name]}\n\n" + _table(names, rows)


def _labels(best: pd.DataFrame) -> str:
    rows = ([_text(value) for value in line] for line in best.head(30).itertuples(index=False))
    return "### Labels and the features that tell them (shipped SAE, first thirty)\n\n" + _table(list(best), rows)


def _text(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


_DOMAINS = {
    "story": "two people over several days; names, places, days, feelings, things",
    "facts": "who lives where, works as what, keeps which animal",
    "lists": "consecutive days, months, number words, digits, letters, ordinals",
    "copy": "meaningless passages, repeated",
    "backcopy": "a bigram chain; after a trigger word the word before it returns",
    "random repeats": "3 to 64 random tokens, repeated until the sequence is full; no text",
}

_CURVES = {
    "erasure": "Token erasure: accuracy of the linear probe for the previous token, 95 % intervals over documents",
    "future_lens": "Future lens: N = 1 accuracy by layer, of what the model says",
    "logit_lens": "Logit lens: mean cross-entropy of the text (nats)",
}

_HEAD = """# The embedded model

`wb.load_model("demo")` is a language model of {size:,} parameters, trained by us on texts of a little world that we
made up, so that every probe has a real phenomenon to find on a machine without network, and so that the truth about
every word is known. It knows nothing else and is good for nothing else. This page is written by
`python -m workbench.experiments.demo_model.card`, from measurements; earlier trials stand under "What was tried".

## Data

`experiments/demo_model/corpus.py` makes documents in five domains about 120 people with fixed homes, jobs and animals,
40 places, six ordinal classes and seven classes of words, with labels for each word: `entity`, `concept`, `ordinal`,
`ordinal_index`, `trigger`, `copy_source`. The corpus that ships, `wb.demo_corpus()`, and everything measured below come
from seeds that training never saw; the people and their facts are the same, as they must be to be known.

The tokenizer is a byte-level BPE of {vocab:,} entries. Names of people are left out of what it learns from: they split
into two to five tokens, as rare names do. Ordinals are one token with and without a leading space.

## Recipe

Llama architecture, plain Hugging Face format: {recipe.layers} layers, d_model {recipe.d_model}, {recipe.heads} heads,
d_mlp {recipe.d_mlp}, tied embeddings, RoPE, biases in attention, context {recipe.context}, BOS first. AdamW, betas 0.9
and 0.975, weight decay {recipe.weight_decay} on matrices, gradient norm clipped at 1, learning rate
{recipe.learning_rate:g} after {recipe.warmup} steps of warm-up and then a cosine down to a tenth over {recipe.steps:,}
steps of {recipe.batch} sequences of {recipe.context} tokens, in fp32 on one CPU thread ({python}). Stored in fp16,
loaded as fp32.

**What the start gives and training does not have to find.** Six million tokens are few, so the weights begin as random
ones with three helps (`build` in `experiments/demo_model/train.py`):

- two heads of block 0 attend to the previous token, through biases of queries and keys;
- all heads of blocks 1 and 2 copy what they attend to, W_O = W_V transposed (mimetic initialisation, Trockman & Kolter,
  arXiv 2305.09828);
- all heads of blocks 2 and 3 prefer what is far to what is near, so that none can rest on its own token.

That heads of blocks 2 and 3 look away from their neighbours is therefore no discovery. That they come to rest on BOS,
in some texts or in all, is one, as are induction and successor heads: the column "before training" has none of them.

"""

_LOSSES = """## Losses

Mean over the fifty steps before, in nats a token, first occurrences of random tokens included (they cannot be
predicted). Every step's loss of the shipped run is in `workbench/embedded/model/training.json`.

"""

_MEASURED = """## Phenomena

Measured by the probes (`experiments/demo_model/phenomena.py`) on 300 documents held out from training. ✓ and ✗: whether
it is as wanted. The last columns are the shipped model before its first step, and a model of the same shape with
Hugging Face's random weights: what they have as well, training did not make. What such a model says next hardly
varies, so one state tells it all (future lens, "what the model says"); of the text it knows nothing.

"""

_SAE = """## The sparse autoencoder

`wb.load_sae("demo")`: {sae.architecture}, {sae.d_sae:,} latents, k {k}, on `{sae.site}`; trained by SAELens' trainer on
activations read from a store (`python -m workbench.experiments.demo_model.sae`), BOS left out, since the sink's norm
would be most of the variance. All its numbers above leave BOS out too.
"""

_AGAIN = """## Making it again

```sh
python -m workbench.experiments.demo_model.train --seed 0 --out runs/demo-0
python -m workbench.experiments.demo_model.train --seed 1 --out runs/demo-1
python -m workbench.experiments.demo_model.sae runs/demo-0
python -m workbench.experiments.demo_model.sae runs/demo-1
python -m workbench.experiments.demo_model.card runs/demo-0 runs/demo-1
python -m workbench.experiments.demo_model.ship runs/demo-0
```

`make demo-model` does all of it. The same seed gives the same losses on the same machine; on another, sums are made in
another order, and the curves drift apart slowly. This page: {machine}, Python {python}, torch {torch}, CPU.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--write", type=Path, default=PAGE)
    asked = parser.parse_args(arguments)
    write(asked.runs, asked.write, (Path(__file__).parent / "tried.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
