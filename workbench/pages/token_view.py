"""Notebook widget that shows a text with each token coloured by a value: hover for values, click to select rows.

view = TokenView(store, "resid_post", features=features)
view                                   # last line of a notebook cell
view.selection["resid_post", 3]        # the selected tokens, as rows of the store
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from workbench.features.feature_store import Features
from workbench.features.labels import names_of
from workbench.figures.token_strip import full_colour
from workbench.io.errors import RequestError, printable
from workbench.pages.feature_search import FeatureSearch
from workbench.pages.token_picture import HUES, Colouring, TokenPicture, TokenTexts, token_texts
from workbench.pages.token_values import full_activations, token_values
from workbench.store.reader import Rows, StoreOrPath, opened

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise RequestError("TokenView needs anywidget; pip install 'interp-workbench[notebook]'") from error

LIMIT = 2048
"""Maximum tokens of a sequence that are shown."""

_FOLDER = Path(__file__).parent
_NAME_LENGTH = 80
_FOUND = 8  # features that a search lists


class TokenView(anywidget.AnyWidget):
    """Widget of one sequence of a store, to look at values and features on its text and to select rows.

    The tokens are filled with the colour of `values`, or of `feature` if `colour` is "feature"; the features
    `underlined`, at most five, are drawn below them, each in a colour of its own. `layer` is an index into the layers
    of `values`. `selected` holds row ids of the store, of any sequence, and `pinned` lists of them: selections that
    stay marked while another is made. Setting `search` sets `found`, the features with these words in number, label or
    strongest tokens, and `found_count`. All of these and `sequence` can be read and set from Python while the widget is
    shown.
    """

    _esm = (_FOLDER / "token_view.js").read_text(encoding="utf-8")
    _css = (_FOLDER / "token_view.css").read_text(encoding="utf-8")

    sequence = traitlets.Int(0).tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    feature = traitlets.Int(0).tag(sync=True)
    colour = traitlets.Enum(("values", "feature"), "values").tag(sync=True)
    selected = traitlets.List(traitlets.Int()).tag(sync=True)
    underlined = traitlets.List(traitlets.Int()).tag(sync=True)
    pinned = traitlets.List(traitlets.List(traitlets.Int())).tag(sync=True)
    search = traitlets.Unicode("").tag(sync=True)

    sequences = traitlets.Int(1).tag(sync=True)
    texts = traitlets.List(traitlets.Unicode()).tag(sync=True)
    pieces = traitlets.List(traitlets.Unicode()).tag(sync=True)
    breaks = traitlets.List(traitlets.Int()).tag(sync=True)
    backward = traitlets.List(traitlets.List(traitlets.Int())).tag(sync=True)
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
    found = traitlets.List(traitlets.Dict()).tag(sync=True)
    found_count = traitlets.Int(0).tag(sync=True)
    hues = traitlets.List(traitlets.Unicode(), list(HUES)).tag(sync=True)
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

        Full colour is the 99 % quantile of the absolute values of the sequence at a layer, for at most 100 tokens their
        maximum; special tokens and the first token are excluded. For a feature it is the same quantile of its active
        tokens in the store. The key counts the tokens beyond. Each sequence costs one read of its activations; only the
        first 2,048 tokens of a longer one are shown.

        Args:
            store: Store with the tokens to show, or its path.
            values: Values that colour the tokens. A kind of site such as "resid_post" gives the L2 norm at every
                recorded layer. An array has shape (row) or (layer, row) over all rows of the store. A DataArray has
                axes (row) or (layer, row) with row ids as coordinates; tokens without a value are uncoloured. None:
                the kind of site that was recorded first.
            features: Sparse features of the store, to colour, underline and search.
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
        self._values = token_values(store, values)
        self._found = None if features is None else FeatureSearch(features)
        if not 0 <= sequence < len(self._starts):
            raise RequestError(f"sequence {sequence} does not exist; the store has 0 to {len(self._starts) - 1}")
        with self.hold_sync():
            self.sequences = len(self._starts)
            self.layers, self.measure = self._values.layers, self._values.name
            if features is not None:
                self.features = features.shape[1]
                self.feature_scales = full_activations(features).astype(float).tolist()
                names = names_of(features.labels)
                self.feature_names = {str(number): printable(name, _NAME_LENGTH) for number, name in names.items()}
            self.sequence = sequence
            self._load()

    @property
    def selection(self) -> Rows:
        """Selected tokens, as rows of the store."""
        return Rows(self._store, np.array(self.selected, np.int64))

    @property
    def pins(self) -> list[Rows]:
        """Pinned selections, oldest first, each as rows of the store."""
        return [Rows(self._store, np.array(ids, np.int64)) for ids in self.pinned]

    def __repr__(self) -> str:
        return f"TokenView({str(self._store.path)!r}, sequence {self.sequence}, {self._colouring().name})"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The live view, and a picture of it for notebooks that are only read: nbconvert, code hosts."""
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        return data | {"text/html": self._picture()}, metadata

    def _colouring(self) -> Colouring:
        """What fills the tokens now."""
        if self.colour == "feature":
            return self._activations(self.feature)
        values = np.frombuffer(self.values, np.float32).reshape(len(self.layers), len(self.texts))[self.layer]
        layer = self.layers[self.layer]
        return Colouring(f"{self.measure}{f', layer {layer}' if layer else ''}", values, self.scales[self.layer])

    def _activations(self, feature: int) -> Colouring:
        """Activations of a feature on the shown tokens."""
        entry_token, entry_feature = (np.frombuffer(part, np.int32) for part in (self.entry_token, self.entry_feature))
        activations, chosen = np.zeros(len(self.texts), np.float32), entry_feature == feature
        activations[entry_token[chosen]] = np.frombuffer(self.entry_value, np.float32)[chosen]
        name = self.feature_names.get(str(feature))
        full = sum(self.feature_scales[feature : feature + 1], 0.0)
        return Colouring(f"feature {feature}{f': {name}' if name else ''}", activations, full)

    def _picture(self) -> str:
        """The view as HTML without scripts: the tokens with their colours, the value of each on hovering."""
        selected = set(self.selected)
        facts = [f"sequence {self.sequence} of 0 to {self.sequences - 1}"]
        facts += [f"{len(selected)} selected"] if selected else []
        facts += [f"pinned selection {number}: {len(pin)} rows" for number, pin in enumerate(self.pinned, 1)]
        return TokenPicture(
            tokens=TokenTexts(self.texts, self.pieces, self.breaks, self.backward),
            places=[f"row {row}, position {position}" for row, position in zip(self.rows, self.positions, strict=True)],
            fill=self._colouring(),
            underlines=[self._activations(feature) for feature in self.underlined],
            selected=[row in selected for row in self.rows],
            pins=[[number for number, pin in enumerate(self.pinned, 1) if row in pin] for row in self.rows],
            facts=[*facts, *filter(None, [self.note]), "run the cell for the interactive view"],
        ).html()

    @traitlets.validate("sequence", "layer", "feature")
    def _check_index(self, proposal: Any) -> int:
        name, value = proposal["trait"].name, proposal["value"]
        number = {"sequence": self.sequences, "layer": len(self.layers), "feature": self.features}[name]
        if value and not 0 <= value < number:
            raise RequestError(f"{name} {value} does not exist; there are {number}: 0 to {max(0, number - 1)}")
        return value

    @traitlets.validate("underlined")
    def _check_underlined(self, proposal: Any) -> list[int]:
        chosen = list(dict.fromkeys(proposal["value"]))
        for feature in chosen:
            if not 0 <= feature < self.features:
                raise RequestError(
                    f"underlined: feature {feature} does not exist; there are {self.features}: "
                    f"0 to {max(0, self.features - 1)}"
                )
        if len(chosen) > len(HUES):
            raise RequestError(f"underlined has {len(chosen)} features; at most {len(HUES)} are legible, remove some")
        return chosen

    @traitlets.validate("selected")
    def _check_rows(self, proposal: Any) -> list[int]:
        return self._row_ids(proposal["value"])

    @traitlets.validate("pinned")
    def _check_pinned(self, proposal: Any) -> list[list[int]]:
        return [ids for ids in map(self._row_ids, proposal["value"]) if ids]

    def _row_ids(self, rows: list[int]) -> list[int]:
        return Rows(self._store, np.array(rows, np.int64)).ids.tolist()

    @traitlets.observe("sequence")
    def _sequence_changed(self, change: Any) -> None:
        if self.loaded:
            with self.hold_sync():
                self._load()

    @traitlets.observe("search")
    def _search_changed(self, change: Any) -> None:
        if self._found is not None:
            with self.hold_sync():
                self.found, self.found_count = self._found.find(self.search, _FOUND)

    def _load(self) -> None:
        """Sets the traits that the JavaScript side reads for the current sequence."""
        first = int(self._starts[self.sequence])
        last = int([*self._starts, self._store.rows][self.sequence + 1])
        ids = np.arange(first, min(last, first + LIMIT))
        tokens = self._store.tokens.slice(first, len(ids))
        values = self._values.read(ids)
        self.note = f"the first {LIMIT:,} of {last - first:,} tokens" if last - first > LIMIT else ""
        texts = token_texts(tokens["token"].to_pylist())
        self.texts, self.pieces = texts.texts, texts.pieces
        self.breaks, self.backward = texts.breaks, texts.backward
        self.rows, self.positions = ids.tolist(), tokens["position"].to_pylist()
        self.values = values.tobytes()
        # the first token of a model without BOS has the norm of a BOS
        ordinary = ~tokens["is_special"].to_numpy(zero_copy_only=False) & (tokens["position"].to_numpy() > 0)
        self.scales = [full_colour(line[ordinary]) or full_colour(line) for line in values]
        if self._features is not None:
            entries = self._features[ids].tocoo()
            self.entry_token = entries.row.astype(np.int32).tobytes()
            self.entry_feature = entries.col.astype(np.int32).tobytes()
            self.entry_value = entries.data.astype(np.float32).tobytes()
        self.loaded += 1
