"""Memory maps of one site's files, one for each segment, read as one array over all rows."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped

from workbench.io.errors import DataError
from workbench.io.tensors import STORED, map_rows

_FAR = 256 << 10  # bytes between rows beyond which reading ahead is useless
_madvise = ctypes.CDLL(None).madvise


class SiteMaps:
    """Read-only memory maps of a site's files, each opened when a row of it is first read.

    bfloat16 comes as its uint16 bits. Safe to use from several threads and after a fork.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        starts: Int64[np.ndarray, " segments_plus_1"],
        row: tuple[int, ...],
        dtype: str,
        opening: Callable[[int], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Maps nothing yet.

        Args:
            paths: The files.
            starts: First row of each, then the number of rows.
            row: Shape of one row.
            dtype: Stored type.
            opening: Gives the context in which a file, by its number, is opened.
        """
        self._paths, self._starts, self._opening = paths, starts, opening
        self._row, self._dtype = row, np.dtype(STORED[dtype][1])
        self._row_bytes = int(np.prod(row, dtype=np.int64)) * self._dtype.itemsize
        self._maps: list[np.ndarray | None] = [None] * len(paths)
        self._addresses = np.zeros(len(paths), np.int64)
        self._scattered: set[int] = set()  # files whose last rows were read far from each other
        self._lock = threading.Lock()

    def segment(self, index: int) -> Shaped[np.ndarray, "row ..."]:
        """Returns the rows of one file, without a copy. DataError where the file does not fit the manifest."""
        if (rows := self._maps[index]) is not None:
            return rows
        with self._lock:  # a map that another thread replaced would leave its address behind
            if (rows := self._maps[index]) is None:
                with self._opening(index):
                    rows = self._map(index)
                self._maps[index] = rows
                self._addresses[index] = rows.__array_interface__["data"][0]
        return rows

    def _map(self, index: int) -> Shaped[np.ndarray, "row ..."]:
        rows = map_rows(self._paths[index])
        expected = (int(self._starts[index + 1] - self._starts[index]), *self._row)
        if rows.shape != expected or rows.dtype != self._dtype:
            raise DataError(
                f"{self._paths[index]} holds {rows.shape} {rows.dtype}, the manifest has {expected} "
                f"{self._dtype}; run workbench verify on its store"
            )
        return rows

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "row ..."]:
        """Returns a copy of the rows from `start` up to `stop`, both within the array."""
        values = np.empty((stop - start, *self._row), self._dtype)
        row = start
        while row < stop:
            index = int(np.searchsorted(self._starts, row, side="right")) - 1
            begin, end = int(self._starts[index]), min(stop, int(self._starts[index + 1]))
            if index in self._scattered:
                self._advise(index, mmap.MADV_NORMAL)
                self._scattered.discard(index)
            values[row - start : end - start] = self.segment(index)[row - begin : end - begin]
            row = end
        return values

    def gather(self, ids: Int64[np.ndarray, " row"]) -> Shaped[np.ndarray, "row ..."]:
        """Returns a copy of the rows `ids`, in their order. IndexError for one that is not within the array.

        Grouping the rows by file and putting the copies back in order would touch each row twice, at half the speed
        of a single file. Instead NumPy sees the process's memory as one array whose rows begin at every byte, of
        which this is one gather, whatever the number of files.
        """
        if not len(ids):
            return self.read(0, 0)
        if ids.min() < 0 or ids.max() >= self._starts[-1]:  # an address out of range would end the process
            raise IndexError(f"rows {ids.min()} to {ids.max()} are not within 0 to {self._starts[-1] - 1}")
        far = len(ids) * _FAR < self._starts[-1] * self._row_bytes
        if len(self._paths) == 1 and not far:
            return self.segment(0).take(ids, axis=0)
        segments = np.searchsorted(self._starts, ids, side="right") - 1
        if not self._addresses[segments].all():
            for index in np.unique(segments):
                self.segment(int(index))
        if far:  # or each row would also fetch its surroundings, up to megabytes
            for index in set(segments.tolist()) - self._scattered:
                self._advise(index, mmap.MADV_RANDOM)
                self._scattered.add(index)
        addresses = self._addresses[segments] + (ids - self._starts[segments]) * self._row_bytes
        lowest = int(addresses.min())
        memory = np.asarray(_Memory(lowest, int(addresses.max()) + 1 - lowest, self._row_bytes))
        return memory[addresses - lowest].view(self._dtype).reshape(-1, *self._row)

    def _advise(self, index: int, advice: int) -> None:
        """Advises the kernel how a file's rows will be read; this affects speed alone."""
        rows = self.segment(index)
        address = int(self._addresses[index])
        start = address - address % mmap.PAGESIZE
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + rows.nbytes - start), advice)


class _Memory:
    """`count` overlapping rows of this process's memory, for NumPy: row i begins i bytes after `address`."""

    def __init__(self, address: int, count: int, row_bytes: int) -> None:
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (address, True),
            "shape": (count,),
            "strides": (1,),
            "typestr": f"|V{row_bytes}",
        }
