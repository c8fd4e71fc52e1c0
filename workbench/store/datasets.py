"""Rows of a store as a dataset of torch, shuffled in blocks, and as a dataset of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from workbench.io.checks import check, check_kind
from workbench.io.errors import RequestError, nearest
from workbench.store.reader import ActivationArray, Store, StoreOrPath, opened
from workbench.store.row_array import RowArray
from workbench.store.selected_rows import Rows

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, eq=False)
class RowDataset(IterableDataset):
    """Batches of activations for training: `torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)`.

    Every pass has each row once. Shuffling reads blocks of consecutive rows in random order, and mixes the rows of as
    many blocks as fit in a buffer; so a disk reads in runs, whatever the number of rows. The workers of a DataLoader
    divide the blocks. Memory: twice the buffer in each worker.

    Args:
        arrays: Array of a store, such as `store["resid_post", 3]`, `store["resid_post", 0:8]` or
            `wb.head_results(store, 3)`, or several by name.
        rows: Rows to read. None: all.
        batch_rows: Rows of a batch; the last one of each worker may have fewer.
        shuffle: Shuffle rows. False: in row order.
        seed: Seed of the order, which is then the same in every pass. None: that of torch, another order in each pass.
        columns: Columns of the token table to add to each batch.
        block_rows: Consecutive rows that are read together.
        buffer_bytes: Bytes of rows that are mixed with each other.
    """

    arrays: RowArray | Mapping[str, RowArray]
    rows: Rows | None = None
    batch_rows: int = field(default=4096, kw_only=True)
    shuffle: bool = field(default=True, kw_only=True)
    seed: int | None = field(default=None, kw_only=True)
    columns: Sequence[str] = field(default=(), kw_only=True)
    block_rows: int = field(default=512, kw_only=True)
    buffer_bytes: int = field(default=256 << 20, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("batch_rows", "block_rows", "buffer_bytes"):
            check(name, getattr(self, name), at_least=1, whole=True)
        check("seed", self.seed, at_least=0, whole=True, optional=True)
        object.__setattr__(self, "columns", (self.columns,) if isinstance(self.columns, str) else tuple(self.columns))
        object.__setattr__(self, "_passes", [0])
        for array in self._by_name.values():
            check_kind("arrays", array, RowArray, "an array of a store, such as store['resid_post', 3]")
        check_kind("rows", self.rows, (Rows, NoneType), "rows of a store, such as store.where('position > 0')")
        if not self._by_name:
            raise RequestError("arrays is empty; give an array such as store['resid_post', 3]")
        if len({array.store.path for array in self._by_name.values()}) > 1:
            raise RequestError("arrays are of different stores; give arrays of one store, whose rows belong together")
        known = self._store.tokens.column_names if self.columns else ()
        for name in self.columns:
            if name not in known:
                raise RequestError(f"columns: {name!r} is no column of the tokens{nearest(name, known)}")
            if name in self._by_name:
                raise RequestError(f"columns: {name!r} is also the name of an array; rename the array")
        if not len(self._ids):
            raise RequestError("rows: no row is selected")

    def __iter__(self) -> Iterator[Tensor | dict[str, Any]]:
        """Yields batches: a tensor (row, ...), or with several arrays or columns a dictionary of them and `row`."""
        worker = get_worker_info()
        generator = np.random.default_rng(self._entropy(worker))
        starts = np.arange(0, len(self._ids), self.block_rows)
        if self.shuffle:
            generator.shuffle(starts)
        if worker is not None:
            starts = starts[worker.id :: worker.num_workers]
        rest_ids = self._ids[:0]
        for first in range(0, len(starts), self._blocks):
            parts = [self._ids[start : start + self.block_rows] for start in starts[first : first + self._blocks]]
            ids = np.concatenate([rest_ids, *parts])
            order = generator.permutation(len(ids)) if self.shuffle else np.arange(len(ids))
            whole = len(ids) if first + self._blocks >= len(starts) else len(ids) // self.batch_rows * self.batch_rows
            values = {name: array[ids] for name, array in self._by_name.items()} if whole else {}
            for begin in range(0, whole, self.batch_rows):
                places = order[begin : begin + self.batch_rows]
                yield self._batch(values, torch.from_numpy(places), ids[places])
            rest_ids = ids[order[whole:]]

    def _batch(self, values: Mapping[str, Tensor], places: Tensor, ids: np.ndarray) -> Tensor | dict[str, Any]:
        batch: dict[str, Any] = {name: part[places] for name, part in values.items()}
        if not isinstance(self.arrays, Mapping) and not self.columns:
            (activations,) = batch.values()
            return activations
        return (
            batch | {"row": torch.from_numpy(ids)} | {name: _entries(self._tokens[name], ids) for name in self.columns}
        )

    def _entropy(self, worker: Any) -> list[int]:
        """Seeds of one pass, the same in all workers."""
        self._passes[0] += 1  # pyright: ignore[reportAttributeAccessIssue]
        if self.seed is not None:
            return [self.seed]
        if worker is None:
            return [int(torch.empty((), dtype=torch.int64, device="cpu").random_())]
        return [worker.seed - worker.id, self._passes[0]]  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def _by_name(self) -> Mapping[str, RowArray]:
        return self.arrays if isinstance(self.arrays, Mapping) else {"activations": self.arrays}

    @property
    def _store(self) -> Store:
        return next(iter(self._by_name.values())).store

    @cached_property
    def _ids(self) -> Int64[np.ndarray, " row"]:
        return np.arange(self._store.rows) if self.rows is None else self.rows.ids_in(self._store)

    @cached_property
    def _tokens(self) -> dict[str, pa.ChunkedArray | np.ndarray]:
        return {name: _as_values(self._store.tokens[name]) for name in self.columns}

    @property
    def _blocks(self) -> int:
        """Blocks that fit in the buffer."""
        row_bytes = sum(array.site.row_bytes for array in self._by_name.values())
        return max(1, self.buffer_bytes // max(1, row_bytes * self.block_rows))


def _as_values(column: pa.ChunkedArray) -> pa.ChunkedArray | np.ndarray:
    numeric = pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)
    return column.to_numpy() if numeric and not column.null_count else column


def _entries(column: pa.ChunkedArray | np.ndarray, ids: np.ndarray) -> Tensor | list[Any]:
    """Entries of a column: numbers and booleans as a tensor, others, and those with nulls, as a list."""
    return torch.from_numpy(column[ids]) if isinstance(column, np.ndarray) else column.take(pa.array(ids)).to_pylist()


def to_hf_dataset(
    rows: StoreOrPath | Rows, sites: Sequence[str] | str, columns: Sequence[str] | None = None
) -> Dataset:
    """Returns rows as a `datasets.Dataset`: a column for each site, beside columns of the token table.

    Of a whole store the activations are the memory-mapped files themselves, without a copy; of selected rows they are
    copied. bfloat16, which Arrow lacks, becomes float32 in memory.

    Args:
        rows: A store, its path, or rows of one.
        sites: Labels or names of sites: "resid_post.3".
        columns: Columns of the token table. None: all; (): none.

    Raises:
        RequestError: A site that was not recorded, or an unknown column.
    """
    from datasets import Dataset  # takes seconds

    rows = rows if isinstance(rows, Rows) else opened(rows, "rows")
    store = rows if isinstance(rows, Store) else rows.store
    table = rows.tokens
    column_names = table.column_names if columns is None else [columns] if isinstance(columns, str) else list(columns)
    for name in column_names:
        if name not in table.column_names:
            raise RequestError(f"columns: {name!r} is no column of the tokens{nearest(name, table.column_names)}")
    table = table.select(column_names)
    for index, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(index, column.name, table[column.name].cast(pa.string()))
    for name in (sites,) if isinstance(sites, str) else sites:
        array = store[name]
        values = _whole(array) if rows is store else pa.chunked_array([_lists(array[rows])])
        table = table.append_column(array.site.label, values)
    return Dataset(table)


def _whole(array: ActivationArray) -> pa.ChunkedArray:
    """All rows, as Arrow arrays over the memory maps of the segments."""
    if array.dtype == torch.bfloat16:
        return pa.chunked_array([_lists(values) for _, values in array.blocks()])
    segments = range(len(array.store.manifest.segments))
    return pa.chunked_array([_lists(array.view(segment)) for segment in segments], _list_type(array))


def _lists(values: Tensor | np.ndarray) -> pa.Array:
    """Rows as lists of fixed length, one level for each axis after the first; the numbers are not copied."""
    if isinstance(values, Tensor):
        values = (values.float() if values.dtype == torch.bfloat16 else values).contiguous().numpy()
    flat: Any = pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), values.size, [None, pa.py_buffer(values)])
    for length in reversed(values.shape[1:]):
        flat = pa.FixedSizeListArray.from_arrays(flat, length)
    return flat


def _list_type(array: ActivationArray) -> pa.DataType:
    kind: pa.DataType = pa.float16() if array.dtype == torch.float16 else pa.float32()
    for length in reversed(array.shape[1:]):
        kind = pa.list_(kind, length)
    return kind
