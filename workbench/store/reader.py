"""Reader of a store: every site is one array over all rows, on the disk until it is indexed.

store = open_store("runs/demo.acts")
store["resid_post", 3][:100]                       # torch.Tensor (100, d_model)
store.where("token = ' Monday'")["resid_post", 3]  # torch.Tensor (n_selected, d_model)
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from workbench.corpus.places import add_places
from workbench.io.checks import as_path, check_kind
from workbench.io.errors import RequestError
from workbench.store.groups import segment_tables
from workbench.store.growth import delete_sites
from workbench.store.layers import LayeredArray, layer_number, layered_array, not_recorded
from workbench.store.manifest import SEGMENTS, Manifest, SiteRecord, as_lines, facts, read_manifest
from workbench.store.maps import SiteMaps
from workbench.store.new_columns import store_columns
from workbench.store.packed_copy import pack
from workbench.store.query import Parameters, select_rows
from workbench.store.row_array import RowArray
from workbench.store.selected_rows import Rows, row_ids
from workbench.store.temporary import TemporaryFolder, temporary_folder
from workbench.store.token_table import read_tokens
from workbench.store.unchanged import refuse_changed, unchanged
from workbench.store.verify import verify

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_OPEN_MAPS = 32_768  # Linux grants a process 65,530


def open_store(path: str | os.PathLike[str]) -> Store:
    """Opens the store at `path` as it is now; rows committed later appear when it is opened again.

    Reads its manifest alone.

    Raises:
        RequestError: There is no store at `path`.
        DataError: The manifest is damaged.
    """
    path = as_path("path", path).absolute()
    return Store(path, read_manifest(path), temporary_folder(path))


def opened(store: StoreOrPath, name: str = "store") -> Store:
    """Returns a store as it is, or opens the one at a path.

    Args:
        store: What the caller of a public function gave.
        name: Name of the argument.

    Raises:
        RequestError: There is no store at the path, or what was given is neither.
    """
    if isinstance(store, str | os.PathLike) and not isinstance(store, Store):  # which has a path itself
        return open_store(store)
    check_kind(name, store, Store, "a store (wb.open_store) or its path")
    return store


@dataclass(frozen=True, eq=False, repr=False)
class Store:
    """A recording on the disk. Pickles as its path: another process opens it as it is at that moment."""

    path: Path
    manifest: Manifest
    temporary: TemporaryFolder | None = None
    """Folder of a temporary store, which is removed with the last handle of it."""

    __iter__ = None  # a store is indexed by site; Python would otherwise try 0, 1, 2, ...

    def __reduce__(self) -> tuple[Callable[[Path], Store], tuple[Path]]:
        return open_store, (self.path,)

    def __repr__(self) -> str:
        return as_lines(self._facts)

    def _repr_html_(self) -> str:
        from workbench.figures.markup import card

        return card("Store", self._facts)

    def __len__(self) -> int:
        return self.rows

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def rows(self) -> int:
        """Number of rows, one per token."""
        return int(self.manifest.starts[-1])

    @property
    def sites(self) -> tuple[SiteRecord, ...]:
        """The recorded sites."""
        return self.manifest.sites

    @cached_property
    def tokens(self) -> pa.Table:
        """Token table of all rows: columns as in `workbench.store.token_table.COLUMNS`, the row's place in its sequence
        (`sequence_length`, `position_from_end`, `is_last`), then metadata and labels.

        Read at the first use, into about 60 bytes a row; `where` and `Rows.tokens` do not need it.
        """
        with unchanged(self.path, self.manifest):
            tokens = read_tokens(segment_tables(self.path, self.manifest.segments), self._columns)
        return add_places(tokens, self.manifest.chosen)

    @overload
    def __getitem__(self, site: str | tuple[str, int]) -> ActivationArray: ...

    @overload
    def __getitem__(self, site: tuple[str, slice | Sequence[int]]) -> LayeredArray: ...

    def __getitem__(self, site: str | tuple[str, int | slice | Sequence[int]]) -> ActivationArray | LayeredArray:
        """Returns the array of a site: `store["resid_post", 3]`, `store["resid_post.3"]`, or by any of its names.

        Layer -1 is the model's last one. A slice or a list of layers gives them as one array (row, layer, ...), read
        when it is indexed; `:` stands for all recorded layers. RequestError for a layer that was not recorded.
        """
        kind, layer = site if isinstance(site, tuple) and len(site) == 2 else (site, None)
        if not isinstance(kind, str):
            example = self.sites[0].label if self.sites else "resid_post.0"
            raise RequestError(
                f"{site!r} is not a site; write store[{example!r}], and store[{example!r}][rows] for rows"
            )
        if layer is None:
            return ActivationArray(self, self._record(kind))
        if isinstance(layer, int | np.integer):
            return ActivationArray(self, self._record(f"{kind}.{layer_number(self.manifest, int(layer))}"))
        return layered_array(self, kind, layer)

    def _record(self, label: str) -> SiteRecord:
        for record in self.sites:
            if record.has_name(label):
                return record
        raise not_recorded(self.path, self.manifest, label)

    def require(self, *sites: str) -> None:
        """Raises RequestError, with the record command that would record it, for a site that was not recorded."""
        for label in sites:
            if not any(record.has_name(label) for record in self.sites):
                raise not_recorded(self.path, self.manifest, label)

    def where(self, predicate: str, parameters: Parameters = ()) -> Rows:
        """Returns the rows for which an SQL condition is true: "token = ' Monday' AND position > 0".

        Args:
            predicate: Condition over the columns of the token table. It may use window functions, and subqueries of
                the table `tokens`: "token IN (SELECT token FROM tokens WHERE is_last)".
            parameters: Values of placeholders: `store.where("token = ?", [" Monday"])`, or a mapping for `$name`.

        Raises:
            RequestError: A condition that DuckDB refuses; the text names the columns.
        """
        with unchanged(self.path, self.manifest):
            return Rows(self, select_rows(self.path, self.manifest, predicate, parameters))

    def require_whole_sequences(self, purpose: str) -> None:
        """Raises RequestError for a store of chosen rows; `purpose` names what needs the others, "a future lens"."""
        if self.manifest.chosen:
            raise RequestError(
                f"{purpose} needs whole sequences, and {self.path} holds chosen rows ({self.manifest.choice}); record "
                "the texts again without where= and keep="
            )

    def figures(self) -> dict[str, Figure]:
        """Returns overview figures by name: "sites" and their sizes, the most frequent "tokens", "norms" by layer.

        Reads the token table and 1,024 rows of each site.
        """
        from workbench.figures.store_overview import overview  # plotly
        from workbench.store.summary import summarize

        return overview(summarize(self))

    def figure(self, name: str | None = None) -> Figure:
        """Returns one of `figures`, by default the first. RequestError for an unknown name."""
        figures = self.figures()
        if name is not None and name not in figures:
            raise RequestError(f"figure {name!r} is none of {', '.join(figures)}")
        return figures[name or next(iter(figures))]

    def delete_sites(self, sites: Sequence[str] | str) -> Store:
        """Deletes sites and their files, and returns the store without them; features of them stay.

        Args:
            sites: Labels (`resid_post.3`), names, or kinds (`resid_post`: every layer).

        Raises:
            RequestError: A site that is not recorded, all sites, or a store that is not finished.
        """
        refuse_changed(self, self.path, read_manifest(self.path))
        return replace(self, manifest=delete_sites(self.path, sites))

    def save(self, path: str | os.PathLike[str]) -> Store:
        """Copies the store, with its features, to a new folder, and opens it there; see `pack`.

        Raises:
            RequestError: Something is at `path`, or not enough space.
            DataError: A damaged file, or a full disk.
        """
        return open_store(pack(self, path))

    def verify(self) -> pd.DataFrame:
        """Returns the findings of a full check, none for a sound store; see `wb.verify`. Reads every byte once."""
        return verify(self.path)

    @property
    def _facts(self) -> dict[str, str]:
        lines = facts(self.path, self.manifest)
        if self.temporary:
            lines["store"] = f"temporary, removed with its last handle; .save(PATH) keeps it: {self.path}"
        return lines

    @cached_property
    def _columns(self) -> pa.Schema | None:
        """Columns of the token table; None: no rows."""
        with unchanged(self.path, self.manifest):
            return store_columns(self.path, self.manifest)

    @cached_property
    def _maps(self) -> Callable[[SiteRecord], SiteMaps]:
        """Maps of a site; those of the latest sites stay open."""
        open_maps = functools.partial(_open_maps, self.path, self.manifest)  # not `self`: a cycle would keep a store
        return functools.lru_cache(max(1, _OPEN_MAPS // max(1, len(self.manifest.segments))))(open_maps)


def _open_maps(path: Path, manifest: Manifest, site: SiteRecord) -> SiteMaps:
    files = [path / SEGMENTS / segment.name / site.file for segment in manifest.segments]
    return SiteMaps(files, manifest.starts, site.shape, site.dtype, functools.partial(unchanged, path, manifest))


StoreOrPath = Store | str | os.PathLike[str]
"""What functions that read a store take: an opened one, or its path."""


@dataclass(frozen=True, eq=False, repr=False)
class ActivationArray(RowArray):
    """One site over all rows: axes (row, ...), read from the disk where it is indexed.

    `array[3]`, slices, integer arrays, masks and `Rows` give torch tensors that own their memory: an edit never reaches
    the store. (A view of the file would crash the process that writes to it, or, copied on write, keep the edit in the
    next read.) Reads cost as much as those of a NumPy memory map, whatever the number of segments; gathers are fastest
    in row order. Pickles as path and name, and is safe to use after a fork.
    """

    def __repr__(self) -> str:
        return f"{super().__repr__()} {self.site.dtype}"

    def __getitem__(self, index: Any) -> Float[Tensor, "*shape"]:
        """Returns activations of a row, a slice, integers of any shape (negative ones from the end), a mask, or `Rows`.

        Integers keep their order and shape: indices (a, b) give (a, b, d_model). IndexError beyond the end.
        """
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._tensor(self._maps.read(start, max(start, stop)))
            return self._tensor(self._maps.gather(np.arange(start, stop, step)))
        ids = row_ids(index, self.store, self.site.label)
        if not ids.ndim:
            return self._tensor(self._maps.read(int(ids), int(ids) + 1))[0]
        return self._tensor(self._maps.gather(ids.reshape(-1))).reshape(*ids.shape, *self.site.shape)

    def view(self, segment: int) -> Shaped[np.ndarray, "row ..."]:
        """Returns one segment's rows as a read-only memory map, without a copy; bfloat16 as its uint16 bits."""
        return self._maps.segment(segment)

    @property
    def _maps(self) -> SiteMaps:
        return self.store._maps(self.site)

    def _tensor(self, values: np.ndarray) -> Tensor:
        # allocated by NumPy, not torch: its large arrays use huge pages, and filling them takes a fifth of the time
        tensor = torch.from_numpy(values)
        return tensor.view(torch.bfloat16) if self.dtype == torch.bfloat16 else tensor
