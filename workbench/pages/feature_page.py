"""A feature on one HTML page: activations, promoted tokens, related features, and contexts.

The page is a single file without scripts and without network access. Text of the model is escaped, and its control
characters are spelt out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.features.feature_store import Features
from workbench.features.labels import names_of, with_names
from workbench.features.promoted import check_sae, check_writes_residual
from workbench.features.queries import Context, coactivation, feature_contexts, feature_histogram, feature_quantiles
from workbench.figures.markup import escape
from workbench.figures.safe_text import sentence, visible
from workbench.io.checks import check
from workbench.io.errors import RequestError
from workbench.io.files import check_writable, replace_file
from workbench.model.unembed import load_unembed
from workbench.sae.autoencoder import Sae
from workbench.sae.decoder import decoder_logits, extreme_tokens, nearest_features

_TOKENS, _NEIGHBOURS, _ACROSS = 10, 10, 10
_QUANTILES = {0.1: "10 %", 0.5: "median", 0.9: "90 %"}
_TOKEN_LENGTH = 60

_CAPTION = """<p class="note">Shade: activation relative to the feature's largest. Outlined: the token whose activation
and sequence:position are on the left.</p>"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --soft: #5b6472; --line: #e4e7ec; --back: #fff; --bar: #0072b2;
  --on: 230 120 0; --off: 0 114 178 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --soft: #9aa3b2; --line: #343a46; --back: #16181d;
  --bar: #56b4e9; --on: 230 130 20; --off: 60 140 220 } }
body { font: 15px/1.5 Inter, Helvetica, Arial, sans-serif; color: var(--ink); background: var(--back);
  max-width: 72rem; margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.6rem; margin-bottom: 0 }
h2 { font-size: 1.05rem; margin: 0 0 .4rem }
.label { font-size: 1.1rem; margin: .4rem 0; overflow-wrap: anywhere }
.words { overflow-wrap: anywhere }
.from, .note { color: var(--soft); font-size: 13px; margin: .2rem 0 }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: 1.6rem;
  margin: 1.6rem 0 2rem; padding-top: 1.4rem; border-top: 1px solid var(--line) }
table { border-collapse: collapse; font-size: 13px; width: 100% }
th { text-align: right; font-weight: normal; color: var(--soft) }
th:first-child, td:first-child { text-align: left }
td { border-top: 1px solid var(--line); text-align: right; font-variant-numeric: tabular-nums }
th, td { padding: .12rem 0 .12rem .8rem }
th:first-child, td:first-child { padding-left: 0 }
code, .text { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px }
code { white-space: pre-wrap; overflow-wrap: anywhere }
svg { width: 100%; height: 9rem; display: block }
svg rect { fill: var(--bar) }
.axis { display: flex; justify-content: space-between; color: var(--soft); font-size: 12px }
section { border-top: 1px solid var(--line); padding-top: 1.4rem; margin-bottom: 2rem }
.context { display: grid; grid-template-columns: 3.5rem 1fr; gap: 0 1rem; padding: .35rem 0;
  border-top: 1px solid var(--line) }
.value { text-align: right; font-variant-numeric: tabular-nums }
.value small { display: block; color: var(--soft); font-size: 11px }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7 }
.text span { unicode-bidi: isolate; border-radius: 2px; background: rgb(var(--on) / var(--a)) }
.text span.below { background: rgb(var(--off) / var(--a)) }
.text span.here { outline: 1.5px solid rgb(var(--on)) }
"""


def feature_page(
    features: Features,
    feature: int,
    path: str | Path,
    *,
    sae: Sae | None = None,
    k: int = 20,
    context: int = 20,
) -> Path:
    """Writes a page about one feature to the HTML file `path`, replacing an existing file, and returns the path.

    The page shows statistics and a histogram of its activations, features that are active on the same tokens, its
    strongest contexts, and contexts across its range of activations; tokens are shaded by activation / largest
    activation. With `sae` it also shows the nearest features by decoder direction and, if the SAE reconstructs the
    residual stream and the store has an unembedding, the tokens promoted and suppressed. Features have their labels.

    Args:
        features: The features.
        feature: Id of the feature.
        path: The file to write.
        sae: The SAE that made the features. None: leave its panels out.
        k: Number of strongest contexts.
        context: Number of tokens on either side.

    Raises:
        RequestError: A feature that does not exist, another SAE, or a path that is a folder.
    """
    path = Path(path)
    check("k", k, at_least=1)
    check("context", context, at_least=1)
    rows, values = features.rows_of(feature)
    if path.is_dir():
        raise RequestError(f"{path} is a folder; name the file, such as {path / f'feature-{feature}.html'}")
    check_writable(path, "path")
    if sae is not None:
        check_sae(features, sae)
    title = f"Feature {feature} of {features.record.site}"
    ranks = rows[np.unique(np.linspace(0, max(0, len(rows) - 1), _ACROSS + 2).astype(int))[1:-1]]
    scale = float(np.abs(values[[0, -1]]).max()) if len(rows) else 1.0
    page = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>{_label(features, feature)}",
        f'<p class="from">{escape(_source(features))}</p>',
        '<div class="panels">',
        _panel("Activations", _statistics(features, feature), _bars(features, feature)),
        *(_decoder_panels(features, feature, sae) if sae else ()),
        _panel("Coactive features", _features_table(coactivation(features, feature), ("both", "lift", "jaccard"))),
        "</div>",
        _contexts("Strongest contexts", feature_contexts(features, feature, rows[: 4 * k], context)[:k], scale),
        _contexts(
            "Contexts across the range of activations", feature_contexts(features, feature, ranks, context), scale
        ),
        "</body></html>\n",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "\n".join(page).encode("utf-8", "replace"))
    return path


def _source(features: Features) -> str:
    model = features.store.manifest.model.name
    return f"SAE {features.record.sae.name}, {features.shape[1]:,} features; model {model}; {len(features):,} tokens"


def _label(features: Features, feature: int) -> str:
    """Description and other labels of the feature, in their own lines; nothing without labels."""
    if feature not in features.labels.index:
        return ""
    name, values = names_of(features.labels).get(feature), features.labels.loc[feature].dropna()
    others = [f"{column} {_cell(value)}" for column, value in values.items() if value != name]
    first = "" if name is None else f'<p class="label">{sentence(name)}</p>'
    return first + (f'<p class="from">{sentence("; ".join(others))}</p>' if others else "")


def _panel(title: str, *parts: str) -> str:
    return f"<div><h2>{escape(title)}</h2>{''.join(parts)}</div>"


def _statistics(features: Features, feature: int) -> str:
    active = int(features.counts[feature])
    share = f"Active on {active:,} of {len(features):,} tokens ({100 * active / max(1, len(features)):.3g} %)"
    if not active:
        return f'<p class="note">{share}</p>'
    quantiles = feature_quantiles(features, list(_QUANTILES))[feature]
    values = ", ".join(f"{name} {value:.3g}" for name, value in zip(_QUANTILES.values(), quantiles, strict=True))
    return f'<p class="note">{share}. Activation: {values}, largest {features.max[feature]:.3g}.</p>'


def _bars(features: Features, feature: int) -> str:
    """The histogram, as SVG: plotly would add 5 MB to the page."""
    counts, edges = feature_histogram(features, feature)
    if not counts.any():
        return ""
    width, heights = 100 / len(counts), 100 * counts / counts.max()
    bars = "".join(
        f'<rect x="{n * width:.3f}" y="{100 - height:.3f}" width="{0.85 * width:.3f}" height="{height:.3f}">'
        f"<title>{edges[n]:.3g} to {edges[n + 1]:.3g}: {counts[n]:,}</title></rect>"
        for n, height in enumerate(heights)
        if height
    )
    first, last = f"{edges[0]:.3g}", f"{edges[-1]:.3g}"
    label = f"Histogram of activations from {first} to {last}, highest bar {counts.max():,} tokens"
    return (
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{label}">{bars}</svg>'
        f'<div class="axis"><span>{first}</span><span>activation</span><span>{last}</span></div>'
        f'<p class="note">Highest bar: {counts.max():,} tokens.</p>'
    )


def _decoder_panels(features: Features, feature: int, sae: Sae) -> Iterable[str]:
    """Panels that need the SAE: promoted and suppressed tokens, nearest features."""
    try:
        check_writes_residual(features, sae)
        unembed = load_unembed(features.store.path)
        effects = decoder_logits(sae, unembed, [feature])[0]
    except RequestError as error:
        yield _panel("Promoted tokens", f'<p class="note">{escape(str(error))}</p>')
    else:
        table = extreme_tokens(effects, unembed, _TOKENS)
        yield _panel("Promoted tokens", _tokens_table(table.iloc[:_TOKENS]))
        yield _panel("Suppressed tokens", _tokens_table(table.iloc[: -_TOKENS - 1 : -1]))
    nearest = nearest_features(sae, feature, _NEIGHBOURS)
    yield _panel("Nearest by decoder", _features_table(with_names(nearest, features.labels), ("cosine",)))


def _tokens_table(table: pd.DataFrame) -> str:
    lines = [
        (f"<code>{escape(visible(token, _TOKEN_LENGTH))}</code>", f"{logit:+.3f}")
        for token, logit in zip(table["token"], table["logit"], strict=True)
    ]
    return _table(("token", "logit"), lines)


def _features_table(table: pd.DataFrame, columns: Sequence[str]) -> str:
    if table.empty:
        return '<p class="note">none</p>'
    named = ("description",) if "description" in table else ()
    shown = table.head(_NEIGHBOURS)[["feature", *columns, *named]].itertuples(index=False)
    lines = [
        (str(feature), *map(_cell, rest[: len(columns)]), *map(_words, rest[len(columns) :]))
        for feature, *rest in shown
    ]
    return _table(("feature", *columns, *named), lines)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)


def _words(value: object) -> str:
    """A description as markup; nothing where a feature has none."""
    return f'<span class="words">{sentence(value)}</span>' if isinstance(value, str) else ""


def _table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """An HTML table; `lines` are markup."""
    head = "".join(f"<th>{name}</th>" for name in heading)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{body}</table>"


def _contexts(title: str, contexts: Sequence[Context], scale: float) -> str:
    if not contexts:
        return ""
    return (
        f"<section><h2>{escape(title)}</h2>{_CAPTION}"
        f"{''.join(_context(context, scale) for context in contexts)}</section>"
    )


def _context(context: Context, scale: float) -> str:
    place = f"{context.sequence}:{context.position}"
    value = f'{context.activations[context.at]:.3g}<small title="sequence:position">{place}</small>'
    text = "".join(
        _shaded(token, activation, scale, here=n == context.at)
        for n, (token, activation) in enumerate(zip(context.tokens, context.activations.tolist(), strict=True))
    )
    return f'<div class="context"><div class="value">{value}</div><div class="text">{text}</div></div>'


def _shaded(token: str, activation: float, scale: float, *, here: bool) -> str:
    shown = _token(token)
    if not activation:
        return f'<span style="--a:0">{shown}</span>'
    kind = " ".join(name for name, applies in (("here", here), ("below", activation < 0)) if applies)
    share = min(1.0, abs(activation) / scale)
    return f'<span class="{kind}" style="--a:{0.12 + 0.68 * share:.2f}" title="{activation:.4g}">{shown}</span>'


def _token(token: str) -> str:
    """A token as markup: spaces unchanged, other white space and control characters spelt out."""
    return escape(" ".join(visible(part, _TOKEN_LENGTH) for part in token.split(" ")))
