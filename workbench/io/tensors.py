"""Safetensors files that need not fit in memory: written piece by piece, read as memory maps.

The library that owns the format writes tensors that are in memory as a whole. The format is eight bytes of header
length, a JSON header, and the bytes of the tensors: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

from workbench.io.errors import DataError, RequestError, WorkbenchError, first_line
from workbench.io.files import fsync, new_file
from workbench.io.parse import load_json
from workbench.io.reading import check_regular, explain_unreadable, open_file

STORED = {"float16": ("F16", "<f2"), "bfloat16": ("BF16", "<u2"), "float32": ("F32", "<f4")}
"""Types of activations: name in the header, NumPy type of the map. NumPy has no bfloat16: its bits come as uint16."""

_TYPES = STORED | {
    "uint16": ("U16", "<u2"),
    "uint32": ("U32", "<u4"),
    "int32": ("I32", "<i4"),
    "int64": ("I64", "<i8"),
}
_NAMES = {code: name for name, (code, _) in _TYPES.items()}
_ALIGNMENT = 64  # of the first tensor: a cache line, and more than any type needs
_LONGEST_HEADER = 1 << 20
_MOST_AXES, _MOST_VALUES = 32, 1 << 58

VERIFY = "run workbench verify on its store"
"""Advice in errors about a damaged file of a store."""


@dataclass(frozen=True)
class TensorHeader:
    """Header of a file with one tensor."""

    name: str
    dtype: str
    """float16, bfloat16 or float32."""
    shape: tuple[int, ...]
    """(rows, ...)"""
    metadata: dict[str, str]
    """The store's: `site`, `model` (fingerprint of the weights), `axes`."""
    offset: int
    """Position of the tensor's first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * _item_bytes(self.dtype)


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the header describes it; `begin` counts from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        return self.begin + math.prod(self.shape) * _item_bytes(self.dtype)


# ---- writing ----------------------------------------------------------------------------------------------


class TensorFile:
    """A new file for one tensor of known shape; row ranges may be written in any order, from several threads.

    Writes go through `pwrite`: a writable memory map would count every page as memory of the process. The file is
    opened for each write, so that a thousand sites do not need a thousand descriptors.
    """

    def __init__(self, path: Path, name: str, dtype: str, shape: tuple[int, ...], metadata: Mapping[str, str]) -> None:
        """Creates `path`, which must not exist, for a tensor of `shape` (rows, ...), and writes its header."""
        self.path, self.dtype, self.shape = path, dtype, shape
        header = header_bytes(name, dtype, shape, metadata)
        self._offset = len(header)
        self._written: list[tuple[int, int]] = []  # append is atomic, so threads need no lock
        with open(path, "xb") as file:
            file.write(header)

    def write(self, first_row: int, rows: Shaped[np.ndarray, "row ..."]) -> None:
        """Writes `rows` from row `first_row` on: contiguous and of the stored type, or uint16 bits of a 2-byte type.

        Raises:
            RequestError: Rows of another type or shape, or beyond the end.
            OSError: For example, the disk is full.
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
            data = memoryview(rows.data).cast("B")
            _write_at(self.path, data, self._offset + first_row * (len(data) // len(rows)))
            self._written.append((first_row, last_row))

    def finish(self) -> None:
        """Waits until the file is on the disk. DataError where a row was not written exactly once."""
        expected = 0
        for first, last in [*sorted(self._written), (self.shape[0], self.shape[0])]:
            if first != expected:
                problem = f"{expected} was not written" if first > expected else f"{first} was written twice"
                raise DataError(f"{self.path.name}: row {problem}; nothing was committed")
            expected = last
        fsync(self.path)


class ArrayFile:
    """A file of several arrays of known type and shape. Made by `new_arrays`."""

    def __init__(self, file: BinaryIO, name: str, layout: Mapping[str, tuple[str, int | tuple[int, ...]]]) -> None:
        self._file, self._name = file, name
        self._layout = dict(sorted(layout.items(), key=lambda item: -_item_bytes(item[1][0])))
        self._tensors: dict[str, _Tensor] = {}
        end = 0
        for array, (dtype, shape) in self._layout.items():
            self._tensors[array] = _Tensor(dtype, (shape,) if isinstance(shape, int) else shape, end)
            end = self._tensors[array].end
        header = _header_bytes(self._tensors, {})
        self._data = len(header)
        self._next = {array: tensor.begin for array, tensor in self._tensors.items()}
        file.write(header)

    def append(self, name: str, values: Shaped[np.ndarray, "entry ..."]) -> None:
        """Writes `values`, of the array's type, behind those written before. RequestError for another type."""
        dtype, length = self._layout[name]
        begin, end = self._next[name], self._next[name] + values.nbytes
        if values.dtype != np.dtype(dtype) or end > self._tensors[name].end:
            raise RequestError(f"{self._name}: {name} takes {length} of {dtype}, not {len(values)} {values.dtype}")
        self._file.seek(self._data + begin)
        self._file.write(np.ascontiguousarray(values).data)
        self._next[name] = end

    def check_complete(self) -> None:
        """DataError where an array was not written to its end."""
        if short := [name for name, tensor in self._tensors.items() if self._next[name] != tensor.end]:
            raise DataError(f"{self._name}: {short[0]} was not written to its end; nothing was committed")


@contextmanager
def new_arrays(path: Path, layout: Mapping[str, tuple[str, int | tuple[int, ...]]]) -> Iterator[ArrayFile]:
    """Yields a file to append arrays to; at the end of the block it is on the disk and takes the name `path`.

    `layout`: (type, length or shape) by name. The widest type comes first, so that every array begins at a multiple
    of its item size. An exception, or an array that is not complete (DataError), leaves nothing behind.
    """
    with new_file(path) as file:
        arrays = ArrayFile(file, path.name, layout)
        yield arrays
        arrays.check_complete()


def header_bytes(name: str, dtype: str, shape: tuple[int, ...], metadata: Mapping[str, str]) -> bytes:
    """Returns the bytes before the tensor in a file with one tensor."""
    return _header_bytes({name: _Tensor(dtype, shape, 0)}, metadata)


def _header_bytes(tensors: Mapping[str, _Tensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, tensor in tensors.items():
        offsets = (tensor.begin, tensor.end)
        header[name] = {"dtype": _TYPES[tensor.dtype][0], "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_at(path: Path, data: memoryview, position: int) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        while data:
            written = os.pwrite(descriptor, data, position)
            data, position = data[written:], position + written
    finally:
        os.close(descriptor)


# ---- reading ----------------------------------------------------------------------------------------------


def read_header(path: str | os.PathLike[str]) -> TensorHeader:
    """Returns the header of a file with one tensor, after checking that it describes exactly the bytes of the file.

    Raises:
        DataError: Truncated, damaged, or a file with another number or type of tensors.
    """
    tensors, metadata, offset = _read_header(path, VERIFY)
    if len(tensors) != 1 or next(iter(tensors.values())).dtype not in STORED:
        content = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items()) or "nothing"
        raise DataError(f"{path} must hold one tensor of {', '.join(STORED)}, and holds {content[:80]}; {VERIFY}")
    ((name, tensor),) = tensors.items()
    return TensorHeader(name, tensor.dtype, tensor.shape, metadata, offset)


def map_rows(path: str | os.PathLike[str]) -> Shaped[np.ndarray, "row ..."]:
    """Returns the tensor as a read-only view of the file, axes (row, ...): nothing is read until it is indexed.

    bfloat16 comes as its uint16 bits. Arrow makes the map: NumPy's keeps a file descriptor for as long as it lives,
    of which a process has some thousand, and indexing an `np.memmap` takes several times as long as an array.
    """
    header = read_header(path)
    with pa.memory_map(os.fspath(path)) as file:
        first = file.read_buffer(1)  # maps the whole file; the kernel fetches ahead only what is "read"
    return np.asarray(_Mapped(first, header.dtype, header.shape, header.offset))


def map_arrays(
    path: Path, layout: Mapping[str, tuple[str, int]], advice: str = "extract the features again"
) -> dict[str, Shaped[np.ndarray, " entry"]]:
    """Returns the arrays as read-only views of the file. `layout`: (type, length) by name, as it must be.

    The kernel begins to fetch the whole file. `advice`: what to do about a damaged file.

    Raises:
        DataError: The file is missing, truncated, damaged, or holds something else.
    """
    tensors, offset = _read_layout(path, layout, advice)
    with pa.memory_map(os.fspath(path)) as file:
        first = file.read_buffer()
    return {
        name: np.asarray(_Mapped(first, tensor.dtype, tensor.shape, offset + tensor.begin))
        for name, tensor in tensors.items()
    }


@dataclass(frozen=True)
class StreamedArray:
    """An array of a file whose slices are read into memory of their own: a view's pages stay in memory once read."""

    path: Path
    dtype: np.dtype
    length: int
    offset: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> Shaped[np.ndarray, " entry"]:
        """Returns consecutive entries."""
        start, stop, _ = part.indices(self.length)
        size = max(0, stop - start)
        return np.fromfile(self.path, self.dtype, size, offset=self.offset + start * self.dtype.itemsize)


def stream_arrays(
    path: Path, layout: Mapping[str, tuple[str, int]], advice: str = "extract the features again"
) -> dict[str, StreamedArray]:
    """Returns the arrays of a file to be read slice by slice; otherwise as `map_arrays`."""
    tensors, offset = _read_layout(path, layout, advice)
    return {
        name: StreamedArray(path, np.dtype(tensor.dtype), tensor.shape[0], offset + tensor.begin)
        for name, tensor in tensors.items()
    }


def _read_layout(path: Path, layout: Mapping[str, tuple[str, int]], advice: str) -> tuple[dict[str, _Tensor], int]:
    """The tensors of a file and where their bytes begin; DataError unless it has this layout."""
    tensors, _, offset = _read_header(path, advice)
    content = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if content != {name: (dtype, (length,)) for name, (dtype, length) in layout.items()}:
        raise DataError(f"{path} is truncated or damaged (it holds {content}); {advice}")
    return tensors, offset


def array_bytes(path: Path) -> int:
    """Returns the bytes of all arrays of a finished file, without its header: lengths follow from them."""
    with open_file(path, "extract the features again") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


@contextmanager
def open_safetensors(path: str | os.PathLike[str], advice: str, device: str = "cpu") -> Iterator[Any]:
    """Yields a safetensors file of any content, opened for torch by the library of the format.

    Inside, every exception about the file becomes a DataError; `advice` is the end of its text.

    Raises:
        DataError: The file is missing, damaged, or no regular file; also a tensor that is not there.
    """
    from safetensors import safe_open  # takes seconds: torch

    check_regular(path, advice)
    try:
        with safe_open(os.fspath(path), framework="pt", device=device) as file:
            yield file
    except WorkbenchError:
        raise
    except Exception as error:  # SafetensorError, OSError, RuntimeError and MemoryError of absurd shapes
        raise DataError(f"{os.fspath(path)} is damaged ({first_line(error)}); {advice}") from None


class _Mapped:
    """A tensor of a file in memory, for NumPy; keeps the map for as long as the array lives."""

    def __init__(self, first: pa.Buffer, dtype: str, shape: tuple[int, ...], offset: int) -> None:
        self.map = first
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (first.address + offset, True),
            "shape": shape,
            "typestr": _TYPES[dtype][1],
        }


def _read_header(path: str | os.PathLike[str], advice: str) -> tuple[dict[str, _Tensor], dict[str, str], int]:
    """Tensors in the order of their bytes, metadata, and the position of the first tensor's first byte."""
    with open_file(path, advice) as file, explain_unreadable(path, advice):
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        whole = size >= 8 and length <= min(size - 8, _LONGEST_HEADER)
        text = file.read(length) if whole else b""
    try:
        if not whole:
            raise ValueError(f"{size} bytes, header of {length}")
        header = load_json(text)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("metadata that is no text")
        return _check_tensors(header, size - 8 - length), metadata, 8 + length
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error) if type(error) is ValueError else f"header {text[:80]!r}"
        raise DataError(f"{path} is truncated or damaged ({reason}); {advice}") from None


def _check_tensors(header: dict[str, Any], data_bytes: int) -> dict[str, _Tensor]:
    """The tensors, which must follow each other without a gap. ValueError with the reason otherwise."""
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape = tuple(entry["shape"])
        if not all(type(length) is int and length >= 0 for length in shape) or len(shape) > _MOST_AXES:
            raise ValueError(f"{name} has the shape {str(shape)[:80]}")
        if math.prod(length or 1 for length in shape) > _MOST_VALUES:  # NumPy refuses it, even if there is no value
            raise ValueError(f"{name} has the shape {str(shape)[:80]}")
        tensors[name] = _Tensor(_NAMES[entry["dtype"]], shape, end)
        begin, end = end, tensors[name].end
        if entry["data_offsets"] != [begin, end]:
            raise ValueError(f"{name} does not lie where its header says")
    if end != data_bytes:
        raise ValueError(f"{data_bytes} bytes of tensors, where its header asks for {end}")
    return tensors


def _item_bytes(dtype: str) -> int:
    return np.dtype(_TYPES[dtype][1]).itemsize
