"""A text in a notebook, each token coloured by a number: hover for values, click to select rows of the store.

view = TokenView(store, "resid_post", features=features)
view                                   # in a cell of its own
view.selection["resid_post", 3]        # what was clicked, as rows of the store
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int64

from workbench.features.feature_store import Features
from workbench.figures.safe_text import visible
from workbench.io.errors import RequestError, nearest
from workbench.store.reader import Rows, Store

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise RequestError("TokenView needs anywidget; pip install 'interp-workbench[notebook]'") from error

LIMIT = 2048
"""Tokens of a sequence that are shown."""

_FOLDER = Path(__file__).parent
_TOKEN_LENGTH = 40


class TokenView(anywidget.AnyWidget):
    """A widget: one sequence of a store, a slider through sequences, layers and features, and a selection of rows.

    `layer` is the place of a layer among those of `values`; `colour` is "values" or "feature"; `selected` holds row ids
    of the store, of any sequence. These, `sequence` and `feature` can be read and set from Python while it is shown.
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
    entry_value = traitlets.Bytes(b"").tag(sync=True)
    note = traitlets.Unicode("").tag(sync=True)
    loaded = traitlets.Int(0).tag(sync=True)

    def __init__(
        self,
        store: Store,
        values: str | xr.DataArray | Float[np.ndarray, " row"] | Float[np.ndarray, "layer row"] | None = None,
        *,
        features: Features | None = None,
        sequence: int = 0,
    ) -> None:
        """
        Args:
            store: Whose tokens are shown.
            values: What colours them. A kind of site, "resid_post": the L2 norm at every recorded layer. An array over
                all rows, or over (layer, row). A variable of a result over (row) or (layer, row); rows that it lacks
                are uncoloured. None: the kind that was recorded first.
            features: Sparse features of the store, for the feature slider.
            sequence: Which sequence is shown first.

        Full colour is the largest absolute value of the sequence, special tokens apart, layer by layer. Reading a
        sequence costs its activations; of a longer one the first 2,048 tokens are shown. Raises RequestError for a site
        that was not recorded, an array of other rows, features of another store, a sequence there is not.
        """
        if not store.rows:
            raise RequestError(f"{store.path} holds no rows; record some first")
        if features is not None and features.store.path != store.path:
            raise RequestError(f"features are of {features.store.path}, not of {store.path}")
        super().__init__()
        self._store, self._features = store, features
        self._starts = np.flatnonzero(np.diff(store.tokens["sequence"].to_numpy(), prepend=-1))
        self._measured = _Measured(store, values)
        if not 0 <= sequence < len(self._starts):
            raise RequestError(f"sequence {sequence} does not exist; the store has 0 to {len(self._starts) - 1}")
        with self.hold_sync():
            self.sequences = len(self._starts)
            self.layers, self.measure = self._measured.layers, self._measured.name
            if features is not None:
                self.features = features.shape[1]
                self.feature_scales = features.max.astype(float).tolist()
            self.sequence = sequence
            self._load()

    @property
    def selection(self) -> Rows:
        """The selected tokens, as rows of the store."""
        return Rows(self._store, np.array(self.selected, np.int64))

    @traitlets.validate("sequence", "layer", "feature")
    def _within(self, proposal: Any) -> int:
        name, value = proposal["trait"].name, proposal["value"]
        number = {"sequence": self.sequences, "layer": len(self.layers), "feature": self.features}[name]
        if value and not 0 <= value < number:
            raise RequestError(f"{name} is {value} and there are {number}: 0 to {max(0, number - 1)}")
        return value

    @traitlets.validate("selected")
    def _known(self, proposal: Any) -> list[int]:
        return Rows(self._store, np.array(proposal["value"], np.int64)).ids.tolist()

    @traitlets.observe("sequence")
    def _moved(self, change: Any) -> None:
        if self.loaded:
            with self.hold_sync():
                self._load()

    def _load(self) -> None:
        """Everything about the sequence, as the page's JavaScript takes it."""
        first = int(self._starts[self.sequence])
        last = int([*self._starts, self._store.rows][self.sequence + 1])
        ids = np.arange(first, min(last, first + LIMIT))
        tokens = self._store.tokens.slice(first, len(ids))
        values = self._measured.of(ids)
        ordinary = ~tokens["is_special"].to_numpy(zero_copy_only=False)
        self.note = f"the first {LIMIT:,} of {last - first:,} tokens" if last - first > LIMIT else ""
        self.texts = [visible(token, _TOKEN_LENGTH) for token in tokens["token"].to_pylist()]
        self.rows, self.positions = ids.tolist(), tokens["position"].to_pylist()
        self.values = values.tobytes()
        counted = np.where(np.isfinite(values) & ordinary, np.abs(values), 0)
        self.scales = counted.max(1, initial=0).astype(float).tolist()
        if self._features is not None:
            entries = self._features[ids].tocoo()
            self.entry_token = entries.row.astype(np.int32).tobytes()
            self.entry_feature = entries.col.astype(np.int32).tobytes()
            self.entry_value = entries.data.astype(np.float32).tobytes()
        self.loaded += 1


class _Measured:
    """Numbers of rows, layer by layer, whatever they are given as."""

    def __init__(self, store: Store, values: Any) -> None:
        self._store, self._given = store, values
        if isinstance(values, xr.DataArray):
            if set(values.dims) not in ({"row"}, {"layer", "row"}) or "row" not in values.coords:
                raise RequestError(f"values has axes {values.dims}; (row) or (layer, row) with the rows' ids expected")
            self._given = values.transpose(..., "row")
            self.layers = [str(layer) for layer in values["layer"].values] if "layer" in values.dims else [""]
            unit = values.attrs.get("units", "")
            self.name = f"{values.name or 'value'}{f' ({unit})' if unit else ''}"
        elif isinstance(values, np.ndarray):
            self._given = np.atleast_2d(values)
            if self._given.ndim != 2 or self._given.shape[1] != store.rows:
                raise RequestError(f"values has shape {values.shape}; {store.rows} rows, or layers by rows, expected")
            self.layers = [str(layer) if values.ndim > 1 else "" for layer in range(len(self._given))]
            self.name = "value"
        else:
            names = [site.label for site in store.sites]
            kind = (names[0] if values is None else values).partition(".")[0]
            self._sites = [name for name in names if name.partition(".")[0] == kind]
            if not self._sites:
                raise RequestError(f"values {kind!r} is no recorded kind of site{nearest(kind, names)}")
            self.layers, self.name = [name.partition(".")[2] for name in self._sites], f"L2 norm of {kind}"

    def of(self, ids: Int64[np.ndarray, " row"]) -> Float[np.ndarray, "layer row"]:
        if isinstance(self._given, xr.DataArray):
            return np.atleast_2d(self._given.reindex(row=ids).to_numpy()).astype(np.float32)
        if isinstance(self._given, np.ndarray):
            return self._given[:, ids].astype(np.float32)
        norms = [self._store[name][ids].float().flatten(1).norm(dim=1).numpy() for name in self._sites]
        return np.stack(norms).astype(np.float32)
