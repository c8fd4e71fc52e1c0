"""Notebook widget that shows a text with each token coloured by a value: hover for values, click to select rows.

view = TokenView(store, "resid_post", features=features)
view                                   # last line of a notebook cell
view.selection["resid_post", 3]        # the selected tokens, as rows of the store
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int64

from workbench.features.feature_store import Features
from workbench.features.labels import names_of
from workbench.figures.markup import escape, inert
from workbench.figures.safe_text import visible
from workbench.io.errors import RequestError, nearest, printable
from workbench.store.reader import Rows, Store, StoreOrPath, opened

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise RequestError("TokenView needs anywidget; pip install 'interp-workbench[notebook]'") from error

LIMIT = 2048
"""Maximum tokens of a sequence that are shown."""

_FOLDER = Path(__file__).parent
_TOKEN_LENGTH = 40
_NAME_LENGTH = 80
_ABOVE, _BELOW = "230,125,15", "30,120,200"
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9;max-width:60rem;unicode-bidi:isolate"


class TokenView(anywidget.AnyWidget):
    """Widget of one sequence of a store, with sliders for sequence, layer and feature and a selection of rows.

    `layer` is an index into the layers of `values`; `colour` is "values" or "feature"; `selected` holds row ids of the
    store, of any sequence. These, `sequence` and `feature` can be read and set from Python while the widget is shown.
    """

    _esm = (_FOLDER / "token_view.js").read_text(encoding="utf-8")
    _css = (_FOLDER / "token_view.css").read_text(encoding="utf-8")

    sequence = traitlets.Int(0).tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    feature = traitlets.Int(0).tag(sync=True)
    colour = traitlets.Enum(("values", "feature"), "values").tag(sync=True)
    selected = traitlets.List(traitlets.Int()).tag(sync=True)

    sequences = traitlets.Int(1).tag(sync=True)
    texts = traitlets.List(traitlets.Unicode()).tag(sync=True)
    rows = traitlets.List(traitlets.Int()).tag(sync=True)
    positions = traitlets.List(traitlets.Int()).tag(sync=True)
    layers = traitlets.List(traitlets.Unicode()).tag(sync=True)
    measure = traitlets.Unicode("").tag(sync=True)
    values = traitlets.Bytes(b"").tag(sync=True)
    scales = traitlets.List(traitlets.Float()).tag(sync=True)
    features = traitlets.Int(0).tag(sync=True)
    feature_scales = traitlets.List(traitlets.Float()).tag(sync=True)
    entry_token = traitlets.Bytes(b"").tag(sync=True)
    entry_feature = traitlets.Bytes(b"").tag(sync=True)
    feature_names = traitlets.Dict().tag(sync=True)
    entry_value = traitlets.Bytes(b"").tag(sync=True)
    note = traitlets.Unicode("").tag(sync=True)
    loaded = traitlets.Int(0).tag(sync=True)

    def __init__(
        self,
        store: StoreOrPath,
        values: str | xr.DataArray | Float[np.ndarray, " row"] | Float[np.ndarray, "layer row"] | None = None,
        *,
        features: Features | None = None,
        sequence: int = 0,
    ) -> None:
        """Opens the widget on one sequence.

        Full colour is the largest absolute value of the sequence at a layer, special tokens excluded. Each sequence
        costs one read of its activations; only the first 2,048 tokens of a longer one are shown.

        Args:
            store: Store with the tokens to show, or its path.
            values: Values that colour the tokens. A kind of site such as "resid_post" gives the L2 norm at every
                recorded layer. An array has shape (row) or (layer, row) over all rows of the store. A DataArray has
                axes (row) or (layer, row) with row ids as coordinates; tokens without a value are uncoloured. None:
                the kind of site that was recorded first.
            features: Sparse features of the store, for the feature slider.
            sequence: Sequence to show first.

        Raises:
            RequestError: For a site that was not recorded, an array of another shape, features of another store, or a
                sequence that does not exist.
        """
        store = opened(store)
        if not store.rows:
            raise RequestError(f"store {str(store.path)!r} has no rows; record some texts first")
        if features is not None and features.store.path != store.path:
            raise RequestError(
                f"features belong to {str(features.store.path)!r}, not to {str(store.path)!r}; open those of this store"
            )
        store.require_whole_sequences("a view of whole sequences")
        super().__init__()
        self._store, self._features = store, features
        self._starts = np.flatnonzero(np.diff(store.tokens["sequence"].to_numpy(), prepend=-1))
        self._values = _token_values(store, values)
        if not 0 <= sequence < len(self._starts):
            raise RequestError(f"sequence {sequence} does not exist; the store has 0 to {len(self._starts) - 1}")
        with self.hold_sync():
            self.sequences = len(self._starts)
            self.layers, self.measure = self._values.layers, self._values.name
            if features is not None:
                self.features = features.shape[1]
                self.feature_scales = features.max.astype(float).tolist()
                names = names_of(features.labels)
                self.feature_names = {str(number): printable(name, _NAME_LENGTH) for number, name in names.items()}
            self.sequence = sequence
            self._load()

    @property
    def selection(self) -> Rows:
        """Selected tokens, as rows of the store."""
        return Rows(self._store, np.array(self.selected, np.int64))

    def __repr__(self) -> str:
        return f"TokenView({str(self._store.path)!r}, sequence {self.sequence}, {self._colouring()[0]})"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The live view, and a picture of it for notebooks that are only read: nbconvert, code hosts."""
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        return data | {"text/html": self._picture()}, metadata

    def _colouring(self) -> tuple[str, Float[np.ndarray, " token"], float]:
        """What colours the tokens now: its name, one value for each token, and the value of full colour."""
        count = len(self.texts)
        if self.colour == "feature":
            token, feature = (np.frombuffer(part, np.int32) for part in (self.entry_token, self.entry_feature))
            activations, chosen = np.zeros(count, np.float32), feature == self.feature
            activations[token[chosen]] = np.frombuffer(self.entry_value, np.float32)[chosen]
            name = self.feature_names.get(str(self.feature))
            return (
                f"feature {self.feature}{f': {name}' if name else ''}",
                activations,
                sum(self.feature_scales[self.feature : self.feature + 1]),
            )
        values = np.frombuffer(self.values, np.float32).reshape(len(self.layers), count)[self.layer]
        layer = self.layers[self.layer]
        return f"{self.measure}{f', layer {layer}' if layer else ''}", values, self.scales[self.layer]

    def _picture(self) -> str:
        """The view as HTML without scripts: the tokens with their colours, the value of each on hovering."""
        name, values, scale = self._colouring()
        selected = set(self.selected)
        tokens = "".join(
            _token(
                text,
                f"row {row}, position {position}: {_number(value)}",
                value / scale if scale else 0,
                row in selected,
            )
            for text, row, position, value in zip(self.texts, self.rows, self.positions, values.tolist(), strict=True)
        )
        facts = [f"sequence {self.sequence} of 0 to {self.sequences - 1}", f"{name}: full colour at {_number(scale)}"]
        facts += [f"{len(selected)} selected"] if selected else []
        foot = "; ".join([*facts, *filter(None, [self.note]), "run the cell for the interactive view"])
        return inert(f'<pre style="{_TEXT}">{tokens}</pre><div style="font-size:12px">{escape(foot)}</div>')

    @traitlets.validate("sequence", "layer", "feature")
    def _check_index(self, proposal: Any) -> int:
        name, value = proposal["trait"].name, proposal["value"]
        number = {"sequence": self.sequences, "layer": len(self.layers), "feature": self.features}[name]
        if value and not 0 <= value < number:
            raise RequestError(f"{name} {value} does not exist; there are {number}: 0 to {max(0, number - 1)}")
        return value

    @traitlets.validate("selected")
    def _check_rows(self, proposal: Any) -> list[int]:
        return Rows(self._store, np.array(proposal["value"], np.int64)).ids.tolist()

    @traitlets.observe("sequence")
    def _sequence_changed(self, change: Any) -> None:
        if self.loaded:
            with self.hold_sync():
                self._load()

    def _load(self) -> None:
        """Sets the traits that the JavaScript side reads for the current sequence."""
        first = int(self._starts[self.sequence])
        last = int([*self._starts, self._store.rows][self.sequence + 1])
        ids = np.arange(first, min(last, first + LIMIT))
        tokens = self._store.tokens.slice(first, len(ids))
        values = self._values.read(ids)
        ordinary = ~tokens["is_special"].to_numpy(zero_copy_only=False)
        self.note = f"the first {LIMIT:,} of {last - first:,} tokens" if last - first > LIMIT else ""
        self.texts = [visible(token, _TOKEN_LENGTH) for token in tokens["token"].to_pylist()]
        self.rows, self.positions = ids.tolist(), tokens["position"].to_pylist()
        self.values = values.tobytes()
        magnitudes = np.where(np.isfinite(values) & ordinary, np.abs(values), 0)
        self.scales = magnitudes.max(1, initial=0).astype(float).tolist()
        if self._features is not None:
            entries = self._features[ids].tocoo()
            self.entry_token = entries.row.astype(np.int32).tobytes()
            self.entry_feature = entries.col.astype(np.int32).tobytes()
            self.entry_value = entries.data.astype(np.float32).tobytes()
        self.loaded += 1


def _token(text: str, value: str, strength: float, selected: bool) -> str:
    """A token as markup, in the colours of token_view.js."""
    alpha = 0.65 * min(1, abs(strength)) if np.isfinite(strength) else 0
    colour = f"background-color:rgba({_BELOW if strength < 0 else _ABOVE},{alpha:.3f})" if alpha else ""
    style = ";".join(filter(None, (colour, "outline:2px solid" if selected else "")))
    return f'<span title="{escape(value)}" style="{style}">{escape(text)}</span> '


def _number(value: float) -> str:
    return f"{value:.4g}" if np.isfinite(value) else "none"


@dataclass(frozen=True)
class _TokenValues:
    """Values of tokens by layer; `read` gives those of some row ids."""

    name: str
    layers: list[str]
    read: Callable[[Int64[np.ndarray, " row"]], Float[np.ndarray, "layer row"]]


def _token_values(store: Store, values: str | xr.DataArray | np.ndarray | None) -> _TokenValues:
    if isinstance(values, xr.DataArray):
        return _labelled_values(values)
    if isinstance(values, np.ndarray):
        array = np.atleast_2d(values)
        if array.ndim != 2 or array.shape[1] != store.rows:
            raise RequestError(f"values has shape {values.shape}; expected ({store.rows},) or (layers, {store.rows})")
        layers = [str(layer) if values.ndim > 1 else "" for layer in range(len(array))]
        return _TokenValues("value", layers, lambda ids: array[:, ids].astype(np.float32))
    return _norms(store, values)


def _labelled_values(values: xr.DataArray) -> _TokenValues:
    if set(values.dims) not in ({"row"}, {"layer", "row"}) or "row" not in values.coords:
        raise RequestError(
            f"values has axes {values.dims}; expected (row) or (layer, row), with row ids as coordinates"
        )
    ordered = values.transpose(..., "row")
    layers = [str(layer) for layer in values["layer"].values] if "layer" in values.dims else [""]
    unit = values.attrs.get("units", "")
    return _TokenValues(
        f"{values.name or 'value'}{f' ({unit})' if unit else ''}",
        layers,
        lambda ids: np.atleast_2d(ordered.reindex(row=ids).to_numpy()).astype(np.float32),
    )


def _norms(store: Store, kind: str | None) -> _TokenValues:
    """L2 norms at every recorded layer of a kind of site."""
    names = [site.label for site in store.sites]
    kind = (names[0] if kind is None else kind).partition(".")[0]
    sites = [name for name in names if name.partition(".")[0] == kind]
    if not sites:
        raise RequestError(f"values: no site of kind {kind!r} was recorded{nearest(kind, names)}")
    return _TokenValues(
        f"L2 norm of {kind}",
        [name.partition(".")[2] for name in sites],
        lambda ids: np.stack([store[name][ids].float().flatten(1).norm(dim=1).numpy() for name in sites]),
    )
