"""The whole workflow on the embedded model: record, extract features, run every probe, write a report.

`workbench demo` runs it. The steps are those of a user, with the public names alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.corpus.repeats import random_repeats
from workbench.corpus.task_suites import prompt_pairs
from workbench.embedded import NAME, demo_corpus
from workbench.features.extract import extract_features
from workbench.features.feature_store import Features
from workbench.features.queries import best_features
from workbench.io.errors import WorkbenchError
from workbench.model.load import Model, load_model
from workbench.pages.report import Section, section, write_report
from workbench.recording.record import record
from workbench.results.registry import find_probe, installed_probes
from workbench.sae.load import load_sae

if TYPE_CHECKING:
    import pyarrow as pa
    from plotly.graph_objects import Figure

    from workbench.store.reader import Store

SITES = ("embed", "resid_post", "z")
HEAD_SITES = ("attn_received", "attn_received_entropy", "attn_entropy", "attn_first", "v_norm", "resid_norm")
"""Sites of a second recording, in sequences of 64 tokens: the sink metrics compare sequences of equal length."""
HEAD_ROWS = 20_000
WITHOUT = ("steering",)
"""Probes that ask for more than a store: a direction of yours."""
REPEATS = 60
"""Sequences of random tokens that repeat."""
PAIRS = 16
"""Pairs of prompts about facts of the embedded world, for patching."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "attention-sinks": {"domain": "domain"},
    "future-lens": {"epochs": 1, "horizons": 2},
    "future-prompts": {
        "prompts": ('The multi-tokens present here are "',),
        "horizons": 2,
        "row_limit": 60,
        "training_rows": 100,
        "epochs": 1,
    },
    "linear-probes": {"label": "domain", "row_limit": 4000, "dimensions": (1, 4)},
    "token-erasure": {"epochs": 4, "offsets": (-2, -1, 0), "late": 3},
    "tuned-lens": {"epochs": 2},
}
"""Settings of each probe that differ from its defaults, so that everything takes less than a minute."""
_FEATURES_SHOWN = 24
_LEAST = 20  # minimum tokens of a label: on fewer, precision is chance


def demo(out: str | Path, *, print_line: Callable[[str], None] = print) -> Path:
    """Records the embedded model, extracts features, runs every probe and writes a report.

    Takes about a minute and 400 MB of disk. An interrupted run is resumed. Each probe runs on the first store that
    has the sites it needs; a probe that no store permits is reported and does not stop the others.

    Args:
        out: Folder for `demo.acts` (the store, with features), `heads.acts`, `pairs.acts`, `repeats.acts`,
            `results`, `report.html`.
        print_line: Receives one line of text after each step.

    Returns:
        Path of the report.
    """
    out, model, texts = Path(out), load_model(NAME), demo_corpus()
    store = record(model, texts, sites=SITES, out=out / "demo.acts")
    heads = record(model, texts, sites=HEAD_SITES, context=64, max_rows=HEAD_ROWS, out=out / "heads.acts")
    pairs = record(model, prompt_pairs("facts", model, PAIRS).texts(), sites=("resid_post",), out=out / "pairs.acts")
    repeated = random_repeats(model.tokenizer or range(model.vocab), REPEATS)  # for induction heads
    repeats = record(model, repeated, sites=("pattern", "resid_post"), out=out / "repeats.acts")
    print_line(f"recorded        {store.rows:,} tokens of {len(SITES)} kinds of site in {store.path}")
    print_line(f"recorded        {heads.rows:,} tokens of {len(HEAD_SITES)} kinds of site in {heads.path}")
    features = extract_features(store, load_sae(NAME))
    assert features is not None  # None only for a share of a job
    best = label_features(features)
    sections = [_features_section(features, best)]
    print_line(f"features        {sections[0].text[0]}")
    for name in (name for name in installed_probes() if name not in WITHOUT):
        sections.append(_probed(name, model, (store, heads, pairs, repeats), out / "results" / name))
        print_line(f"{name:<15} {sections[-1].text[0]}")
    path = write_report(
        sections,
        out / "report.html",
        title="Workbench demo",
        text=[
            f"The embedded model on its held-out corpus of {store.rows:,} tokens. The corpus has ground-truth labels "
            "for every word, so the probes' results can be checked. docs/demo-model.md describes model and corpus."
        ],
    )
    print_line(f"report          {path}")
    return path


def label_features(features: Features) -> pd.DataFrame:
    """Returns the best feature for each ground-truth label of the corpus, highest F1 first.

    A feature predicts a label wherever it is active. Labels are kinds of entity, concept classes, ordinal classes and
    their members, trigger words, and the words that are neither ordinal nor trigger. Labels of fewer than 20 tokens are
    left out.

    Returns:
        Columns label, feature, precision, recall, f1, tokens.
    """
    table = best_features(features, _labels(features.store.tokens), least=_LEAST)
    values = table["value"].astype(str)
    table["label"] = values.where(table["label"] != "word", "word " + values)
    return table.loc[:, ["label", "feature", "precision", "recall", "f1", "tokens"]]


def _labels(tokens: pa.Table) -> dict[str, pd.Series]:
    """Labels of every row, by kind of label."""
    table = tokens.select(["entity", "concept", "ordinal", "ordinal_index", "trigger", "word"]).to_pandas()
    table["member"] = table["ordinal"].astype("string") + " " + table["ordinal_index"].astype("Int64").astype("string")
    table["word"] = table["word"].where(table["ordinal"].isna() & table["trigger"].isna())
    return {name: table[name] for name in ("entity", "concept", "ordinal", "member", "trigger", "word")}


def _features_section(features: Features, best: pd.DataFrame) -> Section:
    good = (best["f1"] >= 0.9).tolist().count(True)
    l0 = features.counts.sum() / len(features)
    return Section(
        title="sparse features",
        text=[
            f"{features.shape[1]:,} features, L0 {l0:.1f}; {good} of {len(best)} labels have a feature with F1 >= 0.9. "
            f"Best: feature {best['feature'][0]} detects {best['label'][0]}, F1 {best['f1'][0]:.2f}"
        ],
        figures={"labels": _label_bars(best.head(_FEATURES_SHOWN))},
        table=best,
        provenance={"features": features.path.name, "sae": features.record.sae.name},
    )


def _label_bars(best: pd.DataFrame) -> Figure:
    import plotly.graph_objects as go

    from workbench.figures.safe_text import label
    from workbench.figures.theme import TEMPLATE

    names = [f"{label(name)} ({feature})" for name, feature in zip(best["label"], best["feature"], strict=True)]
    figure = go.Figure(
        [
            go.Scatter(x=best[measure], y=names, name=measure, mode="markers", marker={"size": 9, "symbol": symbol})
            for measure, symbol in (("f1", "circle"), ("precision", "triangle-right"), ("recall", "triangle-left"))
        ]
    )
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": "Best feature per label",
            "subtitle": {
                "text": "label of the corpus (index of the feature); a feature predicts a label where it is active"
            },
        },
        height=180 + 20 * len(best),
        width=760,
        margin={"t": 110},
    )
    figure.update_xaxes(range=[0, 1.03], title="score")
    figure.update_yaxes(autorange="reversed")
    return figure


def _probed(name: str, model: Model, stores: Sequence[Store], out: Path) -> Section:
    """Runs one probe, saves its result, and returns its section of the report."""
    probe, refused = find_probe(name)(**SETTINGS.get(name, {})), []
    for store in stores:
        try:
            result = probe.run(store, model=model)
            result.save(out)
            return section(result)
        except WorkbenchError as error:
            refused.append(str(error))
    return Section(title=name, text=[f"not run: {refused[0]}"])
