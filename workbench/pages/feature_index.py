"""All features of a feature store on one HTML page: sortable and searchable, without network access."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from workbench.features.feature_store import Features
from workbench.features.labels import names_of
from workbench.figures.markup import escape
from workbench.figures.readable import byte_names, may_be_bytes, readable_tokens
from workbench.figures.safe_text import visible
from workbench.io.checks import as_path, whole_number
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.io.files import check_writable
from workbench.io.saving import save_text
from workbench.pages.feature_page import INDEX, feature_page, index_title, page_name
from workbench.sae.autoencoder import Sae

_FOLDER = Path(__file__).parent
_READ = 16  # strongest rows of a feature whose tokens are looked at
_SPLIT = 4  # tokens on either side that may share a character
_TOKEN_LENGTH, _NAME_LENGTH = 24, 200
_COLUMNS = {"feature": "feature", "active": "active tokens", "max": "largest activation", "label": "label"}


def feature_index(features: Features, path: str | Path, *, tokens: int = 5, pages: Collection[int] = ()) -> Path:
    """Writes one HTML page with a line for every feature, replacing an existing file, and returns the path.

    A line has the feature's share of active tokens, its largest activation, its label, and the tokens on which it is
    strongest. The page sorts by any column and filters by words while they are typed: about 5 MB and 50 ms for 65,536
    features. Cost: reads the strongest rows of every feature.

    Args:
        features: The features.
        path: The file to write.
        tokens: Number of different tokens to show for each feature.
        pages: Features that have a page beside this one (`page_name`), to which they link.

    Raises:
        RequestError: A path that is a folder, or no token to show.
    """
    path = as_path("path", path)
    tokens = whole_number("tokens", tokens, at_least=1)
    if path.is_dir():
        raise RequestError(f"{path} is a folder; name the file, such as {path / 'index.html'}")
    check_writable(path, "path")
    return save_text(path, _page(features, tokens, pages))


def feature_pages(
    features: Features, folder: str | Path, chosen: Collection[int], *, sae: Sae | None = None, k: int = 20
) -> list[Path]:
    """Writes the pages of some features and the index of all into a folder; they link to each other.

    Cost: about 0.2 s a page.

    Args:
        features: The features.
        folder: The folder to write.
        chosen: Features that get a page.
        sae: The SAE that made the features, for promoted tokens and nearest features.
        k: Number of strongest contexts of each page.

    Returns:
        The files, the index first.

    Raises:
        RequestError: A feature that does not exist, another SAE, or a folder that is a file or has the name of a page.
    """
    folder = as_path("folder", folder)
    if folder.suffix.lower() in (".html", ".htm") and not folder.is_dir():
        raise RequestError(f"folder {str(folder)!r} is the name of a page; name its folder, {str(folder.parent)!r}")
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"folder {str(folder)!r} is a file; name a folder")
    for feature in chosen:
        features.rows_of(feature)
    paths = [
        feature_page(features, feature, folder / page_name(feature), sae=sae, k=k, pages=chosen) for feature in chosen
    ]
    return [feature_index(features, folder / INDEX, pages=chosen), *paths]


def strongest_tokens(features: Features, tokens: int) -> tuple[list[list[int]], list[str]]:
    """Returns for each feature the codes of different tokens it is strongest on, and the text of each code.

    At most the 16 rows with the largest activations of a feature are looked at. A part of a character that is split
    over several tokens is named by its bytes: `<0xD0>`.
    """
    starts, counts, words = features.by_feature["indptr"][:-1], features.counts, list(features.texts.words)
    codes = np.full((_READ, features.shape[1]), -1, np.int64)
    possible = np.array([may_be_bytes(word) for word in words], bool)
    parts: dict[int, int] = {}  # code of the bytes for that of a token
    for rank in range(_READ):
        active = np.flatnonzero(counts > rank)
        rows = features.by_feature["row"][starts[active] + rank]
        codes[rank, active] = features.texts.codes[rows]
        for at in np.flatnonzero(possible[codes[rank, active]]).tolist():
            code = int(codes[rank, active[at]])
            if _is_split(features, int(rows[at])):
                if code not in parts:
                    parts[code] = len(words)
                    words.append(byte_names(words[code]))
                codes[rank, active[at]] = parts[code]
    return [_distinct(column, tokens) for column in codes.T], words


def _is_split(features: Features, row: int) -> bool:
    """True for a token that shares a character with its neighbours."""
    near, texts = features.texts.near(row, _SPLIT), features.texts
    tokens = [texts.words[code] for code in texts.codes[near]]
    return readable_tokens(tokens)[row - near.start] != tokens[row - near.start]


def _distinct(codes: Int64[np.ndarray, " rank"], tokens: int) -> list[int]:
    return list(dict.fromkeys(codes[codes >= 0].tolist()))[:tokens]


def _data(features: Features, tokens: int, pages: Collection[int]) -> dict[str, Any]:
    """What the page's script reads: columns of the features, and the words that their tokens number."""
    strongest, words = strongest_tokens(features, tokens)
    used = sorted({code for codes in strongest for code in codes})
    place = {code: number for number, code in enumerate(used)}
    names = names_of(features.labels)
    return {
        "rows": len(features),
        "active": features.counts.tolist(),
        "max": [float(f"{value:.3g}") for value in features.max.tolist()],
        "tokens": [[place[code] for code in codes] for codes in strongest],
        "words": [visible(words[code], _TOKEN_LENGTH) for code in used],
        "labels": {str(number): visible_name(name) for number, name in names.items()},
        "pages": sorted(int(feature) for feature in pages),
    }


def visible_name(name: str) -> str:
    """Returns a label in one line, cut to 200 characters, its control characters spelt out, its spaces kept."""
    return " ".join(visible(part, _NAME_LENGTH) for part in name.split(" "))[:_NAME_LENGTH]


def _page(features: Features, tokens: int, pages: Collection[int]) -> str:
    record = features.record
    title = f"Features of {record.site}"
    script = (_FOLDER / "feature_index.js").read_text(encoding="utf-8")
    style = (_FOLDER / "feature_index.css").read_text(encoding="utf-8")
    code = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{code}'; style-src 'unsafe-inline'; base-uri 'none'"
    data = json.dumps(_data(features, tokens, pages), separators=(",", ":"), ensure_ascii=False)
    count = counted(features.shape[1], "feature")
    source = f"SAE {record.sae.name}, {count}; model {features.store.manifest.model.name}"
    heads = "".join(
        f'<th scope="col"><button type="button" data-column="{name}">{heading}</button></th>'
        for name, heading in _COLUMNS.items()
    )
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"{index_title(features)}<style>{style}</style></head><body>",
            f'<h1>{escape(title)}</h1><p class="from">{escape(source)}; {counted(len(features), "token")}</p>',
            '<form role="search"><label>Search number, label or token <input type="search" name="words"></label>',
            '<label><input type="checkbox" name="dead"> never active ones, too</label>',
            '<span role="status"></span></form>',
            f'<div class="wide" tabindex="0" role="region" aria-label="features"><table><thead><tr>{heads}',
            '<th scope="col">strongest on</th></tr></thead><tbody></tbody></table></div>',
            '<p class="turn"><button type="button" name="back">Previous 100</button>',
            '<button type="button" name="on">Next 100</button></p>',
            f'<script type="application/json">{data.replace("<", chr(92) + "u003c")}</script>',
            f"<script>{script}</script></body></html>\n",
        ]
    )
