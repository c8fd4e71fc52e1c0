"""Everything on the embedded model: record, extract features, run every probe, one report.

What `workbench demo` does, in the order in which a user would do it, with nothing but the public names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from workbench.embedded import NAME, demo_corpus
from workbench.errors import WorkbenchError
from workbench.models import load_model
from workbench.probe import find_probe, installed_probes
from workbench.recorder import record
from workbench.report import Section, section, write_report
from workbench.sae.extract import extract_features
from workbench.sae.features import Features
from workbench.sae.load import load_sae

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from workbench.store.reader import Store

SITES = ("embed", "resid_post")
_FEATURES_SHOWN = 24


def demo(out: str | Path, *, say: Callable[[str], None] = print) -> Path:
    """Writes `out`/demo.acts (the store, with features), `out`/results and `out`/report.html; gives the report's path.

    `say` is told what was found, a line at a time. Resumes what was interrupted. A probe that refuses the store is
    reported and does not stop the others. About half a minute and 120 MB of disk.
    """
    out = Path(out)
    store = record(load_model(NAME), demo_corpus(), sites=SITES, out=out / "demo.acts")
    say(f"recorded  {store.rows:,} tokens of {len(SITES)} kinds of site in {store.path}")
    features = extract_features(store, load_sae(NAME))
    best = label_features(features)
    sections = [_features_section(features, best)]
    say(f"features  {sections[0].text[0]}")
    for name in installed_probes():
        sections.append(_probed(name, store, out / "results" / name))
        say(f"{name:<9} {sections[-1].text[0]}")
    path = write_report(
        sections,
        out / "report.html",
        title="Workbench demo",
        text=[
            f"The embedded model on its held-out corpus of {store.rows:,} tokens. The truth about every word is known, "
            "so what the probes find can be checked: docs/demo-model.md says how all of it was made."
        ],
    )
    say(f"report    {path}")
    return path


def label_features(features: Features) -> pd.DataFrame:
    """For each ground-truth label of the corpus the feature that tells it best: label, feature, precision, recall, f1.

    Labels: kinds of entity, concept classes, ordinal classes and their members, trigger words. Best f1 first.
    """
    tokens = features.store.tokens.select(["entity", "concept", "ordinal", "ordinal_index", "trigger"]).to_pandas()
    lines = []
    for columns in (["entity"], ["concept"], ["ordinal"], ["ordinal", "ordinal_index"], ["trigger"]):
        for values, rows in tokens.groupby(columns, observed=True).indices.items():
            values = values if isinstance(values, tuple) else (values,)
            mask = np.zeros(len(tokens), bool)
            mask[rows] = True
            found = features.enrichment(mask).iloc[0]
            label = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
            told = {name: float(found[name]) for name in ("precision", "recall", "f1")}
            lines.append({"label": label, "feature": int(found["feature"]), **told, "tokens": len(rows)})
    return pd.DataFrame(lines).sort_values("f1", ascending=False, kind="stable", ignore_index=True)


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
        source={"features": features.path.name, "sae": features.record.sae.name},
    )


def _label_bars(best: pd.DataFrame) -> Figure:
    import plotly.graph_objects as go

    from workbench.figures.text import label
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


def _probed(name: str, store: Store, out: Path) -> Section:
    """One probe's part of the report, its result saved."""
    try:
        result = find_probe(name)().run(store)
        result.save(out)
    except WorkbenchError as error:
        return Section(title=name, text=[f"not run: {error}"])
    return section(result)
