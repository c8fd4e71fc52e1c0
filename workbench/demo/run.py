"""The whole workflow on the embedded or another model: record, extract features, run every probe, write a report.

`workbench demo` runs it. The steps are those of a user, with the public names alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.corpus.repeats import random_repeats
from workbench.corpus.task_suites import prompt_pairs
from workbench.embedded import NAME, demo_corpus
from workbench.features.extract import extract_features
from workbench.features.feature_store import Features
from workbench.features.queries import best_features
from workbench.features.removal import remove
from workbench.io.checks import as_path
from workbench.io.errors import WorkbenchError
from workbench.model.load import Model, load_model
from workbench.pages.report import Section, section, write_report
from workbench.recording.record import record
from workbench.results.registry import find_probe, installed_probes
from workbench.results.result import load_result, provenance
from workbench.sae.load import load_sae

if TYPE_CHECKING:
    import pyarrow as pa
    from plotly.graph_objects import Figure

    from workbench.results.probe import Probe
    from workbench.results.result import Result
    from workbench.store.reader import Store

SITES = ("embed", "resid_post", "z")
HEAD_SITES = ("attn_received", "attn_received_entropy", "attn_entropy", "attn_first", "v_norm", "resid_norm")
"""Sites of a second recording, in sequences of 64 tokens: the sink metrics compare sequences of equal length."""
HEAD_ROWS = 20_000
BLOCK_ROWS = 2_000
"""Tokens of the recording of whole blocks."""
WITHOUT = ("function-vectors", "head-ablation", "representation-hijacking", "semantic-axes", "steering")
"""Probes that ask for more: prompts with examples, other words, heads or a direction of yours."""
REPEATS = 60
"""Sequences of random tokens that repeat."""
PAIRS, OTHER_PAIRS = 16, 6
"""Pairs of prompts, for patching: of the embedded and of another model, where a pass costs a hundred times as much."""
TASKS = ("ioi", "agreement", "copying")
"""Tasks for another model than the embedded one; the first that fits the tokenizer is taken."""
OTHER_ROWS = 3_000
"""Tokens of another model than the embedded one."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "active-dormant": {"domain": "domain"},
    "attention-sinks": {"domain": "domain"},
    "future-lens": {"epochs": 1, "horizons": 2},
    "future-prompts": {
        "prompts": ('The multi-tokens present here are "',),
        "horizons": 2,
        "row_limit": 60,
        "training_rows": 100,
        "epochs": 1,
    },
    "jacobian-lens": {"prompts": 2, "length": 40, "row_limit": 1000},
    "attention-calibration": {"row_limit": 300, "first": 0},
    "linear-probes": {"label": "domain", "row_limit": 4000, "dimensions": (1, 4)},
    "fiber-bundle": {"row_limit": 200},
    "masked-sinks": {"row_limit": 300},
    "stages": {"row_limit": 300},
    "over-squashing": {"draws": 2, "longest": 64},
    "token-characters": {"row_limit": 400, "epochs": 2},
    "token-erasure": {"epochs": 4, "offsets": (-2, -1, 0)},
    "token-microscope": {"epochs": 1, "dimension_rows": 500},
    "tuned-lens": {"epochs": 2},
    "under-trained-tokens": {"tested": 8},
    "zero-tuning": {"row_limit": 300},
}
"""Settings of each probe that differ from its defaults, so that everything takes a few minutes."""
EMBEDDED_SETTINGS = {"token-erasure": {**SETTINGS["token-erasure"], "late": 3}}
"""The same for the embedded model alone, which has four layers."""
_FEATURES_SHOWN = 24
_LEAST = 20  # minimum tokens of a label: on fewer, precision is chance


def demo(
    out: str | Path,
    *,
    model: str | Path = NAME,
    sae: str | Path | None = None,
    rows: int | None = None,
    print_line: Callable[[str], None] = print,
) -> Path:
    """Records a model on the embedded corpus, extracts features, runs every probe and writes a report.

    Takes a few minutes and 600 MB of disk for the embedded model, more for others. An interrupted run is resumed, with
    the results that it has; a finished one runs its probes anew. Each probe runs on the first store that has the
    sites it needs; a probe that no store permits is reported and does not stop the others.

    Args:
        out: Folder for `demo.acts` (the store, with features), `heads.acts`, `pairs.acts`, `repeats.acts`,
            `blocks.acts`, `results`, `report.html`.
        model: A directory, a hub id, or the name of the embedded model.
        sae: An autoencoder of the model. None: that of the embedded model, or no features for another one.
        rows: Maximum number of tokens. None: the whole corpus for the embedded model, 3,000 for another.
        print_line: Receives one line of text after each step.

    Returns:
        Path of the report.
    """
    out, embedded, loaded = as_path("out", out), str(model) == NAME, load_model(model)
    sae = NAME if sae is None and embedded else sae
    rows = OTHER_ROWS if rows is None and not embedded else rows
    stores = record_stores(loaded, out, ("facts",) if embedded else TASKS, rows, PAIRS if embedded else OTHER_PAIRS)
    sections, interrupted = [], not (out / "report.html").exists()
    for store in stores:
        kinds = len({site.name for site in store.manifest.sites})
        print_line(f"recorded        {store.rows:,} tokens of {kinds} sites in {store.path}")
    if sae is not None:
        features = extract_features(stores[0], load_sae(sae))
        assert features is not None  # None only for a share of a job
        sections.append(_features_section(features, label_features(features)))
        print_line(f"features        {sections[-1].text[0]}")
    settings = {**SETTINGS, **EMBEDDED_SETTINGS} if embedded else SETTINGS
    for name in (name for name in installed_probes() if name not in WITHOUT):
        probe, folder = find_probe(name)(**settings.get(name, {})), out / "results" / name
        sections.append(_probed(probe, loaded, stores, folder, interrupted))
        print_line(f"{name:<15} {sections[-1].text[0]}")
    path = write_report(
        sections,
        out / "report.html",
        title="Workbench demo",
        date=date.today().isoformat(),
        text=[
            f"{loaded.name} on {stores[0].rows:,} tokens of the embedded corpus, which has ground-truth labels for "
            "every word, so the probes' results can be checked. docs/demo-model.md describes it."
        ],
    )
    print_line(f"report          {path}")
    return path


def record_stores(
    model: Model, out: Path, tasks: Sequence[str], rows: int | None, pair_count: int = PAIRS
) -> list[Store]:
    """Records the corpus, heads, whole blocks, repeated tokens, and pairs of prompts of the first task that fits.

    Sites that the model lacks are left out: a state-space model has no heads.
    """
    texts = demo_corpus()
    head_rows, block_rows = (most if rows is None else min(most, rows) for most in (HEAD_ROWS, BLOCK_ROWS))
    longest = min(60, model.vocab // 3)  # of a block; random tokens that repeat show induction heads
    ids = model.tokenizer or range(model.vocab)
    period, filler = (min(20, longest), longest), (1, max(1, longest // 2))
    repeated = random_repeats(ids, REPEATS, period=period, filler=filler)
    requests: tuple[tuple[str, Any, Sequence[str], dict[str, Any]], ...] = (
        ("demo.acts", texts, SITES, {"max_rows": rows}),
        ("heads.acts", texts, (*HEAD_SITES, "v", "mlp_post"), {"max_rows": head_rows, "context": 64}),
        ("repeats.acts", repeated, ("pattern", "resid_post"), {}),
        ("blocks.acts", texts, block_sites(model), {"max_rows": block_rows, "context": 64}),
    )
    kinds = {site.kind for site in model.site_map.recordable.values()}
    stores = [
        record(model, documents, sites=known, out=out / name, **options)
        for name, documents, sites, options in requests
        if (known := [site for site in sites if site.split(".")[0] in kinds])
    ]
    for task in tasks:
        try:
            pairs = prompt_pairs(task, model, pair_count).texts()
        except WorkbenchError:  # no pair fits the tokenizer
            continue
        return [*stores, record(model, pairs, sites=("resid_post",), out=out / "pairs.acts")]
    return stores


def block_sites(model: Model) -> list[str]:
    """Returns sites of queries and keys as the model scores them, and of whole blocks."""
    kinds = {site.split(".")[0] for site in model.sites}
    scores = ["rot_q", "rot_k"] if {"rot_q", "rot_k"} <= kinds else ["q", "k"]
    return ["pattern", "v", *scores, "resid_pre.0", "resid_post"]


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
    from workbench.figures.themed import ThemedFigure

    names = [f"{label(name)} ({feature})" for name, feature in zip(best["label"], best["feature"], strict=True)]
    figure = ThemedFigure(
        [
            go.Scatter(x=best[measure], y=names, name=measure, mode="markers", marker={"size": 9, "symbol": symbol})
            for measure, symbol in (("f1", "circle"), ("precision", "triangle-right"), ("recall", "triangle-left"))
        ]
    )
    figure.update_layout(
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
    lowest = float(best[["f1", "precision", "recall"]].min(axis=None))
    margin = max(0.03 * (1 - lowest), 0.002)  # half of a mark
    figure.update_xaxes(range=[lowest - margin, 1 + margin], title="score; the axis begins at the lowest, not at 0")
    figure.update_yaxes(autorange="reversed")
    return figure


def _probed(probe: Probe, model: Model, stores: Sequence[Store], out: Path, interrupted: bool) -> Section:
    """Runs one probe, saves its result, and returns its section of the report."""
    refused = []
    for store in stores:
        try:
            result = _saved(out, probe, store) if interrupted else None
            if result is None:
                result = probe.run(store, model=model)
                if out.exists():  # of an earlier run, with other settings perhaps
                    remove(out)
                result.save(out)
            return section(result)
        except WorkbenchError as error:
            refused.append(str(error))
    return Section(title=probe.name, text=[f"not run: {refused[0]}"])


def _saved(out: Path, probe: Probe, store: Store) -> Result | None:
    """The result of an interrupted run, where it is of the same store, settings and version."""
    if not (out / "result.json").exists():
        return None
    saved, expected = load_result(out), provenance(store, probe)
    known = {name: saved.provenance.get(name) for name in expected}
    return saved if json.dumps(known, sort_keys=True) == json.dumps(expected, sort_keys=True) else None
