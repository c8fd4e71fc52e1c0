"""What the linked views of a store ask for: text, norms, sinks, attention, lens columns, features, neighbours.

Every answer is a small dictionary for JSON. Only the rows that are asked for are read, so that a large store opens at
once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64

from workbench.features.feature_store import Features
from workbench.features.labels import names_of
from workbench.figures.readable import CONTINUED, readable_tokens, readable_window, vocabulary_texts
from workbench.figures.safe_text import visible
from workbench.io.errors import RequestError
from workbench.io.torch_state import plain_torch
from workbench.model.unembed import Unembed, load_unembed
from workbench.pages.feature_page import feature_html
from workbench.store.reader import Store

TOKENS = 512
"""Maximum tokens of a sequence that are shown."""

_TOP, _FEATURES, _NEIGHBOURS = 5, 12, 10
_AROUND, _SPLIT = 6, 4  # tokens of a neighbour's text on either side, and more of them that may share a character
_SINK_ROWS = 2_000  # rows that the map of sinks is the mean of
_SEARCHED = 20_000  # rows that neighbours are searched in
_NORMS = ("resid_post", "resid_mid", "resid_pre", "mlp_out", "attn_out", "embed")


@dataclass(frozen=True)
class LinkedView:
    """Answers about one store, and about features of it, one folder of them or several."""

    store: Store
    features: tuple[Features, ...] = ()

    def about(self) -> dict[str, Any]:
        """Returns what was recorded: name, model, rows, sequences, kinds of site with their layers, features."""
        sites: dict[str, list[int]] = {}
        for site in self.store.sites:
            kind, _, layer = site.label.partition(".")
            if layer.isdecimal():
                sites.setdefault(kind, []).append(int(layer))
        return {
            "name": self.store.path.name,
            "path": str(self.store.path),
            "model": self.store.manifest.model.name,
            "rows": self.store.rows,
            "sequences": len(self._starts),
            "sites": {kind: sorted(layers) for kind, layers in sites.items()},
            "norms": [kind for kind in _NORMS if kind in sites],
            "features": [[folder.path.name, folder.shape[1]] for folder in self.features],
        }

    def sequence(self, number: int) -> dict[str, Any]:
        """Returns the tokens of a sequence: text, row id, position, document; at most 512."""
        rows = self._rows(number)
        tokens = self.store.tokens.take(rows)
        texts = tokens["token"].to_pylist()
        return {
            "sequence": number,
            "first": int(rows[0]),
            "texts": [visible_words(text, 40) for text in readable_tokens(texts)],
            "ends": [text.endswith("\n") for text in texts],
            "positions": tokens["position"].to_pylist(),
            "document": tokens["document"][0].as_py(),
            "left_out": int(self._ends[number] - self._starts[number]) - len(rows),
        }

    def norms(self, number: int, site: str, layer: int) -> dict[str, Any]:
        """Returns the L2 norm of a site at every token of a sequence, and the largest one of a sample of the store.

        The sample is of at most 2,000 later tokens: the norm of first tokens is often a hundred times as large.
        """
        key = (site, layer)
        if key not in self._largest_norms:
            rows = self._later_rows if len(self._later_rows) else self._rows(number)
            self._largest_norms[key] = float(np.max(_finite(self._norms(site, layer, rows)), initial=0))
        values = self._norms(site, layer, self._rows(number))
        return {"values": _short(values), "full": _short([self._largest_norms[key]])[0]}

    def sinks(self) -> dict[str, Any]:
        """Returns the mean attention of later tokens to the first one by layer and head, over at most 2,000 rows."""
        kind = next((name for name in ("attn_first", "pattern") if self._layers(name)), None)
        if kind is None:
            return {"layers": [], "values": [], "rows": 0}
        layers, rows = self._layers(kind), self._later_rows
        return {"layers": layers, "values": [self._first(kind, layer, rows) for layer in layers], "rows": len(rows)}

    def head(self, number: int, layer: int, head: int) -> dict[str, Any]:
        """Returns the attention pattern of a head over a sequence, one list a query token with a value a key token.

        Of a store of chosen rows, keys that were not chosen have no token and are left out.
        """
        if layer not in self._layers("pattern"):
            raise RequestError(f"pattern.{layer} was not recorded; record pattern to see heads over the text")
        array, rows = self.store["pattern", layer], self._rows(number)
        self._check("head", head, array.shape[1])
        keys = self.store.tokens["position"].take(rows).to_numpy()
        pattern = array[rows].float().numpy()[:, head, keys]
        return {"pattern": [_short(line[: query + 1]) for query, line in enumerate(pattern)]}

    @plain_torch()
    def lens(self, row: int) -> dict[str, Any]:
        """Returns the logit lens of a row: the top tokens and their probabilities at every layer of resid_post."""
        self._check("row", row, self.store.rows)
        layers = self._layers("resid_post")
        if not layers:
            raise RequestError("resid_post was not recorded; record it to see the lens")
        unembed = self._unembed
        states = torch.stack([self.store["resid_post", layer][[row]][0].float() for layer in layers])
        with torch.inference_mode():
            values, ids = unembed(states).softmax(-1).topk(_TOP)
        names = [
            vocabulary_texts(unembed.tokens or (), line, [unembed.token(token) for token in line])
            for line in ids.tolist()
        ]
        texts = [[visible(name, 24) for name in line] for line in names]
        return {"layers": layers, "tokens": texts, "probabilities": [_short(line) for line in values.numpy()]}

    def active(self, folder: int, row: int) -> dict[str, Any]:
        """Returns the strongest features of a row: id, activation, largest activation, label."""
        features = self._folder(folder)
        self._check("row", row, self.store.rows)
        line, names = features[[row]], names_of(features.labels)
        order = np.argsort(-np.asarray(line.data, float))[:_FEATURES]
        lines = [
            (int(line.indices[at]), *_short([line.data[at], features.max[line.indices[at]]])) for at in order.tolist()
        ]
        return {"features": [[*entry, visible_words(names.get(entry[0], ""))] for entry in lines]}

    def feature(self, folder: int, number: int, feature: int) -> dict[str, Any]:
        """Returns the activation of a feature at every token of a sequence, and its largest one in the store."""
        features = self._folder(folder)
        self._check("feature", feature, features.shape[1])
        values = features[self._rows(number)][:, [feature]].toarray()[:, 0]
        return {"values": _short(values), "full": _short([features.max[feature]])[0]}

    def card(self, folder: int, feature: int) -> str:
        """Returns the page of a feature."""
        return feature_html(self._folder(folder), feature, sae=None, k=10, context=15)

    @plain_torch()
    def neighbours(self, row: int, site: str, layer: int) -> dict[str, Any]:
        """Returns the rows with the largest cosine similarity to a row at a site, among at most 20,000 rows."""
        self._check("row", row, self.store.rows)
        array = self.store[site, layer]
        searched = np.unique(np.linspace(0, self.store.rows - 1, _SEARCHED).astype(np.int64))
        direction = torch.nn.functional.normalize(array[[row]].float().flatten(1), dim=1)[0]
        parts = [
            torch.nn.functional.normalize(array[part].float().flatten(1), dim=1) @ direction
            for part in np.array_split(searched, -(-len(searched) // 4_096))
        ]
        similarity = torch.cat(parts).numpy()
        similarity[searched == row] = -2
        best = np.argsort(-similarity)[:_NEIGHBOURS]
        rows = searched[best]
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        words = [self._around(int(neighbour), int(number)) for neighbour, number in zip(rows, numbers, strict=True)]
        return {
            "neighbours": [
                [int(neighbour), int(number), value, *text]
                for neighbour, number, value, text in zip(rows, numbers, _short(similarity[best]), words, strict=True)
            ],
            "searched": len(searched),
        }

    @cached_property
    def _starts(self) -> Int64[np.ndarray, " sequence"]:
        return np.flatnonzero(np.diff(self.store.tokens["sequence"].to_numpy(), prepend=-1))

    @cached_property
    def _ends(self) -> Int64[np.ndarray, " sequence"]:
        return np.append(self._starts[1:], self.store.rows)

    @cached_property
    def _largest_norms(self) -> dict[tuple[str, int], float]:
        return {}

    @plain_torch()
    def _norms(self, site: str, layer: int, rows: Int64[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
        return self.store[site, layer][rows].float().flatten(1).norm(dim=1).numpy()

    @cached_property
    def _unembed(self) -> Unembed:
        return load_unembed(self.store.path)

    @cached_property
    def _later_rows(self) -> Int64[np.ndarray, " row"]:
        position = self.store.tokens["position"].to_numpy()
        later = np.flatnonzero(position > 0)
        return later[np.unique(np.linspace(0, max(0, len(later) - 1), _SINK_ROWS).astype(int))] if len(later) else later

    def _folder(self, number: int) -> Features:
        if not self.features:
            raise RequestError("no features are shown; give features= (--features)")
        self._check("folder", number, len(self.features))
        return self.features[number]

    def _layers(self, kind: str) -> list[int]:
        return self.about()["sites"].get(kind, [])

    def _first(self, kind: str, layer: int, rows: Int64[np.ndarray, " row"]) -> list[float | None]:
        values = self.store[kind, layer][rows].float()
        return _short((values if kind == "attn_first" else values[:, :, 0]).mean(0).numpy())

    def _rows(self, number: int) -> Int64[np.ndarray, " row"]:
        self._check("sequence", number, len(self._starts))
        return np.arange(self._starts[number], min(self._ends[number], self._starts[number] + TOKENS))

    def _around(self, row: int, number: int) -> tuple[str, str, str]:
        """Text before a row, of the row, and after it."""
        start, end = int(self._starts[number]), int(self._ends[number])
        first, last = max(start, row - _AROUND - _SPLIT), min(end, row + 1 + _AROUND + _SPLIT)
        texts = readable_window(self.store.tokens["token"][first:last].to_pylist())
        low, high = max(0, row - _AROUND - first), row + 1 + _AROUND - first
        while low > 0 and texts[low] == CONTINUED:  # a character is whole at its first token
            low -= 1
        words = [visible_words(text) for text in texts]
        return "".join(words[low : row - first]), words[row - first], "".join(words[row - first + 1 : high])

    @staticmethod
    def _check(name: str, value: int, count: int) -> None:
        if not 0 <= value < count:
            raise RequestError(f"{name} {value} does not exist; there are {count}: 0 to {count - 1}")


ANSWERS: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...]]] = {
    "about": (LinkedView.about, ()),
    "sequence": (LinkedView.sequence, ("number",)),
    "norms": (LinkedView.norms, ("number", "site", "layer")),
    "sinks": (LinkedView.sinks, ()),
    "head": (LinkedView.head, ("number", "layer", "head")),
    "lens": (LinkedView.lens, ("row",)),
    "active": (LinkedView.active, ("folder", "row")),
    "feature": (LinkedView.feature, ("folder", "number", "feature")),
    "neighbours": (LinkedView.neighbours, ("row", "site", "layer")),
}
"""Answers by name, and the names of their parameters: whole numbers, but for `site`."""


def visible_words(text: str, limit: int = 200) -> str:
    """Returns a text in one line with its spaces, control characters spelt out; words are cut to `limit`."""
    return " ".join(visible(part, limit) for part in text.split(" "))


def _finite(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return values[np.isfinite(values)]


def _short(values: Float[np.ndarray, " n"] | list[Any]) -> list[float | None]:
    """Numbers with four digits; None for what is not finite."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in np.asarray(values, float).tolist()]
