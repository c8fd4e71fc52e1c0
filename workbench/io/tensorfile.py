"""A safetensors file with one tensor: written range by range in any order, read as a memory map.

The library that owns the format writes tensors it holds whole; a recording's do not fit in memory. The format is
eight bytes of header length, a JSON header, and the tensor's bytes: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

from workbench.io.errors import DataError, RequestError
from workbench.io.files import fsync

STORED = {"float16": ("F16", "<f2"), "bfloat16": ("BF16", "<u2"), "float32": ("F32", "<f4")}
"""Name in the header, and the NumPy type of the map. NumPy has no bfloat16: its bits come as uint16."""

_DTYPES = {code: dtype for dtype, (code, _) in STORED.items()}
_ALIGNMENT = 64  # of the tensor's first byte: a cache line, and more than any type asks for
_LONGEST_HEADER = 1 << 20


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of its tensor."""

    name: str
    dtype: str
    """float16, bfloat16 or float32."""
    shape: tuple[int, ...]
    """(rows, ...)"""
    metadata: dict[str, str]
    """The store's own: `site`, `model` (fingerprint of the weights), `axes`."""
    offset: int
    """Position of the tensor's first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * np.dtype(STORED[self.dtype][1]).itemsize


class TensorFile:
    """A new file for one tensor of known shape; row ranges may be written in any order, from several threads.

    Writes go through `pwrite`: a writable memory map would count every page as the process's own memory. The file
    is opened for each write, so that a thousand sites need no thousand descriptors.
    """

    def __init__(self, path: Path, name: str, dtype: str, shape: tuple[int, ...], metadata: Mapping[str, str]) -> None:
        """Create `path`, which must not exist, for a tensor of `shape` (rows, ...), and write its header."""
        self.path, self.dtype, self.shape = path, dtype, shape
        header = header_bytes(name, dtype, shape, metadata)
        self._offset = len(header)
        self._written: list[tuple[int, int]] = []  # append is atomic, so threads need no lock
        with open(path, "xb") as file:
            file.write(header)

    def write(self, first_row: int, rows: Shaped[np.ndarray, "row ..."]) -> None:
        """Write `rows` from row `first_row` on: contiguous and of the stored type, or uint16 bits of a 2-byte type.

        Raises:
            RequestError: Rows of another type or shape, or beyond the end.
            OSError: The disk is full, for one.
        """
        stored = np.dtype(STORED[self.dtype][1])
        if rows.dtype != stored and not (stored.itemsize == 2 and rows.dtype == np.uint16):
            raise RequestError(f"{self.path.name} takes {self.dtype} as {stored} or its bits, not {rows.dtype}")
        if rows.shape[1:] != self.shape[1:] or not rows.flags.c_contiguous:
            raise RequestError(f"{self.path.name} takes contiguous rows of {self.shape[1:]}, not {rows.shape[1:]}")
        last_row = first_row + len(rows)
        if not 0 <= first_row <= last_row <= self.shape[0]:
            raise RequestError(f"{self.path.name} has {self.shape[0]} rows; {first_row} to {last_row} do not fit")
        if rows.size:
            data = memoryview(rows).cast("B")
            _write_at(self.path, data, self._offset + first_row * (len(data) // len(rows)))
            self._written.append((first_row, last_row))

    def finish(self) -> None:
        """Wait until the file is on the disk. DataError where a row was not written exactly once."""
        expected = 0
        for first, last in [*sorted(self._written), (self.shape[0], self.shape[0])]:
            if first != expected:
                what = f"{expected} was not written" if first > expected else f"{first} was written twice"
                raise DataError(f"{self.path.name}: row {what}; nothing was committed")
            expected = last
        fsync(self.path)


def read_header(path: str | os.PathLike[str]) -> TensorHeader:
    """The header of a file with one tensor, after checking that it describes exactly the bytes that are there.

    Raises:
        DataError: Truncated, damaged, or a file with another number or type of tensors.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise DataError(f"{path} is truncated or no safetensors file: {size} bytes, header of {length}")
            text = file.read(length)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; run workbench verify on its store") from None
    header = _parse_header(path, text, 8 + length)
    if header.offset + header.nbytes != size:
        raise DataError(
            f"{path} is truncated or damaged: {size} bytes, where its header asks for {header.offset + header.nbytes}"
        )
    return header


def map_rows(path: str | os.PathLike[str]) -> Shaped[np.ndarray, "row ..."]:
    """The tensor as a read-only view of the file, axes (row, ...): nothing is read until it is indexed.

    bfloat16 comes as its uint16 bits. Arrow makes the map: NumPy's keeps a file descriptor for as long as it lives,
    of which a process has some thousand, and indexing an `np.memmap` takes several times as long as an array.
    """
    header = read_header(path)
    with pa.memory_map(os.fspath(path)) as file:
        first = file.read_buffer(1)  # the map is of the whole file, but what is "read" the kernel fetches ahead, whole
    return np.asarray(_Mapped(first, header))


class _Mapped:
    """A file's tensor in memory, for NumPy; keeps the map for as long as the array lives."""

    def __init__(self, first: pa.Buffer, header: TensorHeader) -> None:
        self.map = first
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (first.address + header.offset, True),
            "shape": header.shape,
            "typestr": STORED[header.dtype][1],
        }


def header_bytes(name: str, dtype: str, shape: tuple[int, ...], metadata: Mapping[str, str]) -> bytes:
    """What stands in a file before its tensor."""
    code, stored = STORED[dtype]
    end = math.prod(shape) * np.dtype(stored).itemsize
    tensor = {"dtype": code, "shape": shape, "data_offsets": (0, end)}
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), name: tensor}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _parse_header(path: str | os.PathLike[str], text: bytes, offset: int) -> TensorHeader:
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        ((name, tensor),) = entries.items()
        shape = tuple(tensor["shape"])
        header = TensorHeader(name, _DTYPES[tensor["dtype"]], shape, metadata, offset)
        whole = tensor["data_offsets"] == [0, header.nbytes] and all(type(n) is int and n >= 0 for n in shape)
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise DataError(f"{path} has a damaged header, or more than one tensor: {text[:80]!r}")
    return header


def _write_at(path: Path, data: memoryview, position: int) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        while data:
            written = os.pwrite(descriptor, data, position)
            data, position = data[written:], position + written
    finally:
        os.close(descriptor)
