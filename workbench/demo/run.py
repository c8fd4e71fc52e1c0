"""Everything on the embedded model: record, extract features, run every probe, one report.

What `workbench demo` does, in the order in which a user would do it, with nothing but the public names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

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
"""What a second recording holds, in sequences of 64 tokens: the sink metrics compare sequences of one length."""
HEAD_ROWS = 20_000
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
    "token-erasure": {"epochs": 4, "offsets": (-2, -1, 0), "late": 3},
    "tuned-lens": {"epochs": 2},
}
"""Probe to those of its settings that are not the default here: all of it is to take less than a minute."""
_FEATURES_SHOWN = 24
_LEAST = 20  # tokens of a label: on fewer, precision is luck


def demo(out: str | Path, *, say: Callable[[str], None] = print) -> Path:
    """Writes `out`/demo.acts (the store, with features), `out`/heads.acts, `out`/results and `out`/report.html; gives
    the report's path.

    `say` is told what was found, a line at a time. Resumes what was interrupted. A probe is asked of the first store
    that has what it needs; one that refuses both is reported and does not stop the others. About 50 seconds and 200 MB
    of disk.
    """
    out, model, texts = Path(out), load_model(NAME), demo_corpus()
    store = record(model, texts, sites=SITES, out=out / "demo.acts")
    heads = record(model, texts, sites=HEAD_SITES, context=64, max_rows=HEAD_ROWS, out=out / "heads.acts")
    say(f"recorded        {store.rows:,} tokens of {len(SITES)} kinds of site in {store.path}")
    say(f"recorded        {heads.rows:,} tokens of {len(HEAD_SITES)} kinds of site in {heads.path}")
    features = extract_features(store, load_sae(NAME))
    best = label_features(features)
    sections = [_features_section(features, best)]
    say(f"features        {sections[0].text[0]}")
    for name in installed_probes():
        sections.append(_probed(name, model, (store, heads), out / "results" / name))
        say(f"{name:<15} {sections[-1].text[0]}")
    path = write_report(
        sections,
        out / "report.html",
        title="Workbench demo",
        text=[
            f"The embedded model on its held-out corpus of {store.rows:,} tokens. The truth about every word is known, "
            "so what the probes find can be checked: docs/demo-model.md says how all of it was made."
        ],
    )
    say(f"report          {path}")
    return path


def label_features(features: Features) -> pd.DataFrame:
    """For each ground-truth label of the corpus the feature that tells it best: label, feature, precision, recall, f1.

    Labels: kinds of entity, concept classes, ordinal classes and their members, trigger words, and the words that are
    neither ordinal nor trigger; each with its number of tokens, those on fewer than 20 left out. A feature says yes
    where it is active at all. Best f1 first.
    """
    table = best_features(features, _labels(features.store.tokens), least=_LEAST)
    own = table["value"].astype(str)
    table["label"] = own.where(table["label"] != "word", "word " + own)
    return table[["label", "feature", "precision", "recall", "f1", "tokens"]]


def _labels(tokens: pa.Table) -> dict[str, pd.Series]:
    """Kind of label to the one that each row has."""
    table = tokens.select(["entity", "concept", "ordinal", "ordinal_index", "trigger", "word"]).to_pandas()
    table["member"] = table["ordinal"].astype("string") + " " + table["ordinal_index"].astype("Int64").astype("string")
    table["word"] = table["word"].where(table["ordinal"].isna() & table["trigger"].isna())
    return {name: table[name] for name in ("entity", "concept", "ordinal", "member", "trigger", "word")}


def _features_section(features: Features, best: pd.DataFrame) -> Section:
    good = int((best["f1"] >= 0.9).sum())
    l0 = features.counts.sum() / len(features)
    return Section(
        title="sparse features",
        text=[
            f"{features.shape[1]:,} features, {l0:.1f} active on a token; {good} of {len(best)} labels are told by one "
            f"feature with F1 of 0.9 or more, the best by feature {best['feature'][0]}: {best['label'][0]}"
        ],
        figures={"labels": _label_bars(best.head(_FEATURES_SHOWN))},
        table=best,
        provenance={"features": features.path.name, "sae": features.record.sae.name},
    )


def _label_bars(best: pd.DataFrame) -> Figure:
    import plotly.graph_objects as go

    from workbench.figures.safe_text import label
    from workbench.figures.theme import TEMPLATE

    names = [f"{label(line.label)} ({line.feature})" for line in best.itertuples()]
    figure = go.Figure(
        [
            go.Scatter(x=best[measure], y=names, name=measure, mode="markers", marker={"size": 9, "symbol": symbol})
            for measure, symbol in (("f1", "circle"), ("precision", "triangle-right"), ("recall", "triangle-left"))
        ]
    )
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": "Features that tell a label",
            "subtitle": {"text": "label of the corpus (number of the feature)"},
        },
        height=180 + 20 * len(best),
        width=760,
        margin={"t": 110},
    )
    figure.update_xaxes(range=[0, 1.03], title="share")
    figure.update_yaxes(autorange="reversed")
    return figure


def _probed(name: str, model: Model, stores: Sequence[Store], out: Path) -> Section:
    """One probe's part of the report, its result saved."""
    probe, refused = find_probe(name)(**SETTINGS.get(name, {})), []
    for store in stores:
        try:
            result = probe.run(store, model=model)
            result.save(out)
            return section(result)
        except WorkbenchError as error:
            refused.append(str(error))
    return Section(title=name, text=[f"not run: {refused[0]}"])
