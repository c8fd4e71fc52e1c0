"""A feature on one HTML page: activations, promoted tokens, related features, and contexts.

The page is a single file without scripts and without network access. Text of the model is escaped, and its control
characters are spelt out.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int64

from workbench.features.feature_store import Features
from workbench.features.labels import names_of, with_names
from workbench.features.promoted import check_sae, check_writes_residual
from workbench.features.queries import Context, coactivation, feature_contexts, feature_histogram, feature_quantiles
from workbench.figures.markup import escape, inert
from workbench.figures.readable import readable_window, vocabulary_texts
from workbench.figures.safe_text import sentence, visible
from workbench.io.checks import as_path, whole_number
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.io.files import check_writable
from workbench.io.saving import save_text
from workbench.model.unembed import load_unembed
from workbench.sae.autoencoder import Sae
from workbench.sae.decoder import decoder_logits, extreme_tokens, nearest_features

INDEX = "index.html"
"""Name of the index of features beside their pages."""

_TOKENS, _NEIGHBOURS = 10, 10
_QUANTILES = {0.1: "10 %", 0.5: "median", 0.9: "90 %"}
_TOKEN_LENGTH = 60
_STYLE = (Path(__file__).parent / "feature_page.css").read_text(encoding="utf-8")

_GROUPS, _OF_GROUP = 5, 3  # parts of the range of activations, and contexts of each
_AROUND = 4  # tokens on either side that make two contexts the same
_BINS = 60  # of the histogram of logits

_CAPTION = """<p class="note">Shade: activation, from 0 <span class="key"></span> to {scale:.3g}, the feature's largest.
Outlined: the token whose activation and sequence:position are on the left. A token shows its activation under the
pointer, or when it is reached by the tab key or touched.</p>"""


def feature_page(
    features: Features,
    feature: int,
    path: str | Path,
    *,
    sae: Sae | None = None,
    k: int = 20,
    context: int = 20,
    pages: Collection[int] | None = None,
) -> Path:
    """Writes a page about one feature to the HTML file `path`, replacing an existing file, and returns the path.

    The page shows statistics and a histogram of its activations, features that are active on the same tokens, its
    strongest contexts, and contexts of each fifth of its range of activations with its share of the active tokens;
    contexts with the same tokens around are folded. Tokens are shaded by activation / largest activation. With `sae` it
    also shows the nearest features by decoder direction and, if the SAE reconstructs the residual stream and the store
    has an unembedding, the tokens promoted and suppressed and a histogram of the logits of all tokens. Features have
    their labels.

    Args:
        features: The features.
        feature: Id of the feature.
        path: The file to write.
        sae: The SAE that made the features. None: leave its panels out.
        k: Number of strongest contexts.
        context: Number of tokens on either side.
        pages: Features that have a page beside this one (`page_name`), to which this one links, as it does to the index
            of features. None: those whose pages and index are in the folder already.

    Raises:
        RequestError: A feature that does not exist, another SAE, or a path that is a folder.
    """
    path = as_path("path", path)
    if path.is_dir():
        raise RequestError(f"{path} is a folder; name the file, such as {path / page_name(feature)}")
    check_writable(path, "path")
    index = pages is not None or _is_index(path.parent / INDEX, features)
    known = _pages_in(path.parent) if pages is None else pages
    page = feature_html(features, feature, sae=sae, k=k, context=context, pages=known, index=index)
    return save_text(path, page)


def _pages_in(folder: Path) -> list[int]:
    """Features that have a page in a folder."""
    names = (re.fullmatch(r"feature-(\d{1,18})\.html", path.name) for path in folder.glob(page_name("*")))
    return [int(name[1]) for name in names if name]


def _is_index(path: Path, features: Features) -> bool:
    """True for an index of these features, by its title."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return index_title(features).encode() in file.read(1_000)


def index_title(features: Features) -> str:
    """Returns the title of the index of features, as markup."""
    return f"<title>{escape(f'Features of {features.record.site}')}</title>"


@dataclass(frozen=True)
class FeatureCard:
    """The page of a feature, shown by the last line of a notebook cell; saved and converted notebooks keep it."""

    title: str
    html: str
    """The whole page."""

    def __repr__(self) -> str:
        return f"FeatureCard({self.title!r})"

    def _repr_html_(self) -> str:
        frame = f'<iframe sandbox title="{escape(self.title)}" srcdoc="{html.escape(self.html)}"'
        return inert(f'{frame} style="width:100%;height:42rem;border:0"></iframe>')


def feature_card(
    features: Features, feature: int, *, sae: Sae | None = None, k: int = 10, context: int = 20
) -> FeatureCard:
    """Returns the page of `feature_page` for a notebook.

    Args:
        features: The features.
        feature: Id of the feature.
        sae: The SAE that made the features. None: leave its panels out.
        k: Number of strongest contexts.
        context: Number of tokens on either side.

    Raises:
        RequestError: A feature that does not exist, or another SAE.
    """
    page = feature_html(features, feature, sae=sae, k=k, context=context)
    return FeatureCard(f"Feature {feature} of {features.record.site}", page)


def page_name(feature: int | str) -> str:
    """Returns the name of a feature's file beside the pages of others: `feature-17.html`."""
    return f"feature-{feature}.html"


def feature_html(
    features: Features,
    feature: int,
    *,
    sae: Sae | None,
    k: int,
    context: int,
    pages: Collection[int] = (),
    index: bool = False,
) -> str:
    """Returns the page that `feature_page` writes; with `index` it links to the index of features beside it."""
    k = whole_number("k", k, at_least=1)
    context = whole_number("context", context, at_least=1)
    rows, values = features.rows_of(feature)
    if sae is not None:
        check_sae(features, sae)
    title = f"Feature {feature} of {features.record.site}"
    scale = float(np.abs(values[[0, -1]]).max()) if len(rows) else 1.0
    coactive = _features_table(coactivation(features, feature), ("both", "lift", "jaccard"), pages)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
            f'<p class="from"><a href="{INDEX}">All features</a></p>' if index else "",
            f"<h1>{escape(title)}</h1>{_label(features, feature)}",
            f'<p class="from">{escape(_source(features))}</p>',
            '<div class="panels">',
            _panel("Activations", _statistics(features, feature), _bars(features, feature)),
            *(_decoder_panels(features, feature, sae, pages) if sae else ()),
            _panel("Coactive features", coactive),
            "</div>",
            _strongest(features, feature, k, context, scale),
            _across(features, feature, context, scale),
            "</body></html>\n",
        ]
    )


def _source(features: Features) -> str:
    model = features.store.manifest.model.name
    sae = f"SAE {features.record.sae.name}, {counted(features.shape[1], 'feature')}"
    return f"{sae}; model {model}; {counted(len(features), 'token')}"


def _label(features: Features, feature: int) -> str:
    """Description and other labels of the feature, in their own lines; nothing without labels."""
    if feature not in features.labels.index:
        return ""
    name, values = names_of(features.labels).get(feature), features.labels.loc[feature].dropna()
    other_labels = [f"{column} {_cell(value)}" for column, value in values.items() if value != name]
    first = "" if name is None else f'<p class="label">{sentence(name)}</p>'
    return first + (f'<p class="from">{sentence("; ".join(other_labels))}</p>' if other_labels else "")


def _panel(title: str, *parts: str) -> str:
    return f"<div><h2>{escape(title)}</h2>{''.join(parts)}</div>"


def _statistics(features: Features, feature: int) -> str:
    active = int(features.counts[feature])
    share = f"Active on {active:,} of {counted(len(features), 'token')} ({100 * active / max(1, len(features)):.3g} %)"
    if not active:
        return f'<p class="note">{share}</p>'
    quantiles = feature_quantiles(features, list(_QUANTILES))[feature]
    values = ", ".join(f"{name} {value:.3g}" for name, value in zip(_QUANTILES.values(), quantiles, strict=True))
    return f'<p class="note">{share}. Activation: {values}, largest {features.max[feature]:.3g}.</p>'


def _bars(features: Features, feature: int) -> str:
    counts, edges = feature_histogram(features, feature)
    return _histogram(counts, edges, "activation") if counts.any() else ""


def _histogram(counts: Int64[np.ndarray, " bin"], edges: Float[np.ndarray, " edge"], unit: str, of: str = "") -> str:
    """A histogram as SVG (plotly would add 5 MB to the page): bars above 0 and below 0 have their own colours."""
    width, heights = 100 / len(counts), 100 * counts / counts.max()
    bars = "".join(
        f'<rect class="{"off" if edges[n + 1] <= 0 else "on"}" x="{n * width:.3f}" y="{100 - height:.3f}" '
        f'width="{0.85 * width:.3f}" height="{height:.3f}">'
        f"<title>{edges[n]:.3g} to {edges[n + 1]:.3g}: {counts[n]:,}</title></rect>"
        for n, height in enumerate(heights)
        if height
    )
    first, last, highest = f"{edges[0]:.3g}", f"{edges[-1]:.3g}", f"{counted(int(counts.max()), 'token')}{of}"
    label = f"Histogram of {unit} from {first} to {last}, highest bar {highest}"
    return (
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{label}">{bars}</svg>'
        f'<div class="axis"><span>{first}</span><span>{unit}</span><span>{last}</span></div>'
        f'<p class="note">Highest bar: {highest}.</p>'
    )


def _decoder_panels(features: Features, feature: int, sae: Sae, pages: Collection[int]) -> Iterable[str]:
    """Panels that need the SAE: promoted and suppressed tokens, nearest features."""
    try:
        check_writes_residual(features, sae)
        unembed = load_unembed(features.store.path)
        effects = decoder_logits(sae, unembed, [feature])[0]
    except RequestError as error:
        yield _panel("Promoted tokens", f'<p class="note">{escape(str(error))}</p>')
    else:
        table = extreme_tokens(effects, unembed, _TOKENS)
        table["token"] = vocabulary_texts(unembed.tokens or (), table["token_id"], table["token"])
        yield _panel("Promoted tokens", _tokens_table(table.iloc[:_TOKENS]))
        yield _panel("Suppressed tokens", _tokens_table(table.iloc[: -_TOKENS - 1 : -1]))
        counts, edges = np.histogram(effects.double().cpu().numpy(), bins=_BINS)
        yield _panel("Logits of all tokens", _histogram(counts, edges, "logit", " of the vocabulary"))
    nearest = nearest_features(sae, feature, _NEIGHBOURS)
    yield _panel("Nearest by decoder", _features_table(with_names(nearest, features.labels), ("cosine",), pages))


def _tokens_table(table: pd.DataFrame) -> str:
    lines = [
        (f"<code>{escape(visible(token, _TOKEN_LENGTH))}</code>", f"{logit:+.3f}")
        for token, logit in zip(table["token"], table["logit"], strict=True)
    ]
    return _table(("token", "logit"), lines)


def _features_table(table: pd.DataFrame, columns: Sequence[str], pages: Collection[int]) -> str:
    if table.empty:
        return '<p class="note">none</p>'
    named = ("description",) if "description" in table else ()
    rows = table.head(_NEIGHBOURS)[["feature", *columns, *named]].itertuples(index=False)
    lines = [
        (_linked(feature, pages), *map(_cell, rest[: len(columns)]), *map(_words, rest[len(columns) :]))
        for feature, *rest in rows
    ]
    return _table(("feature", *columns, *named), lines)


def _linked(feature: int, pages: Collection[int]) -> str:
    return f'<a href="{page_name(feature)}">{feature}</a>' if feature in pages else str(feature)


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


def _strongest(features: Features, feature: int, k: int, context: int, scale: float) -> str:
    rows = features.rows_of(feature)[0]
    groups = _alike(feature_contexts(features, feature, rows[: 4 * k], context))[:k]
    return _section("Strongest contexts", _folded(groups, scale), scale)


def _across(features: Features, feature: int, context: int, scale: float) -> str:
    """Contexts of each fifth of the range of activations, from the top: evenly spaced by rank."""
    rows, values = features.rows_of(feature)
    if not len(rows):
        return ""
    edges = np.linspace(float(values[0]), min(0.0, float(values[-1])), _GROUPS + 1)
    ends = np.searchsorted(-values.astype(np.float64), -edges, side="right")
    ends[0], ends[-1] = 0, len(rows)
    parts = []
    for high, low, first, last in zip(edges[:-1], edges[1:], ends[:-1], ends[1:], strict=True):
        chosen = rows[np.unique(np.linspace(first, last - 1, _OF_GROUP).astype(int))] if last > first else []
        share = f"{100 * (last - first) / len(rows):.3g} % of its {counted(len(rows), 'active token')}"
        parts.append(f"<h3>{low:.3g} to {high:.3g} <small>{share}</small></h3>")
        parts.append(_folded(_alike(feature_contexts(features, feature, chosen, context)), scale))
    return _section("Contexts across the range of activations", "".join(parts), scale)


def _alike(contexts: Sequence[Context]) -> list[list[Context]]:
    """Groups of contexts with the same tokens around, in the order of their first ones."""
    groups: dict[tuple[str, ...], list[Context]] = {}
    for context in contexts:
        groups.setdefault(context.tokens[max(0, context.at - _AROUND) : context.at + _AROUND + 1], []).append(context)
    return list(groups.values())


def _folded(groups: Sequence[Sequence[Context]], scale: float) -> str:
    return "".join(
        _context(first, scale)
        + (
            f"<details><summary>{len(more)} more with the same tokens around</summary>"
            f"{''.join(_context(context, scale) for context in more)}</details>"
            if more
            else ""
        )
        for first, *more in groups
    )


def _section(title: str, markup: str, scale: float) -> str:
    caption = _CAPTION.format(scale=scale)
    return f"<section><h2>{escape(title)}</h2>{caption}{markup}</section>" if markup else ""


def _context(context: Context, scale: float) -> str:
    place = f"{context.sequence}:{context.position}"
    value = f'{context.activations[context.at]:.3g}<small title="sequence:position">{place}</small>'
    text = "".join(
        _shaded(token, activation, scale, is_target=n == context.at)
        for n, (token, activation) in enumerate(
            zip(readable_window(context.tokens), context.activations.tolist(), strict=True)
        )
    )
    return f'<div class="context"><div class="value">{value}</div><div class="text">{text}</div></div>'


def _shaded(token: str, activation: float, scale: float, *, is_target: bool) -> str:
    markup = _token(token) + ("<br>" * token.endswith("\n"))
    if not activation:
        return f'<span style="--a:0">{markup}</span>'
    kind = " ".join(name for name, applies in (("here", is_target), ("below", activation < 0)) if applies)
    share = min(1.0, abs(activation) / scale)
    style = f"--a:{0.12 + 0.68 * share:.2f}"
    return f'<span class="{kind}" style="{style}" title="{activation:.4g}" tabindex="0">{markup}</span>'


def _token(token: str) -> str:
    """A token as markup: spaces unchanged, other white space and control characters spelt out."""
    return escape(" ".join(visible(part, _TOKEN_LENGTH) for part in token.split(" ")))
