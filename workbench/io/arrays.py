"""A safetensors file of several one-dimensional arrays, each written from its beginning on, read as memory maps.

The library that owns the format writes arrays it holds whole; an index of features may not fit in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

from workbench.io.errors import DataError, RequestError
from workbench.io.files import new_file

CODES = {"uint16": "U16", "int32": "I32", "int64": "I64", "float16": "F16", "float32": "F32"}
"""NumPy type -> its name in the header."""

_DTYPES = {code: np.dtype(dtype).newbyteorder("<") for dtype, code in CODES.items()}
_ALIGNMENT = 64
_LONGEST_HEADER = 1 << 20


class ArrayFile:
    """A new file for arrays of known type and length. Made by `new_arrays`."""

    def __init__(self, file: BinaryIO, name: str, layout: Mapping[str, tuple[str, int]]) -> None:
        self._file, self._name = file, name
        self._layout = dict(sorted(layout.items(), key=lambda item: -np.dtype(item[1][0]).itemsize))
        header, self._ends, self._next = {}, {}, {}
        end = 0
        for name, (dtype, length) in self._layout.items():
            begin, end = end, end + length * np.dtype(dtype).itemsize
            header[name] = {"dtype": CODES[dtype], "shape": [length], "data_offsets": [begin, end]}
            self._next[name], self._ends[name] = begin, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._data = 8 + len(text)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def append(self, name: str, values: Shaped[np.ndarray, " entry"]) -> None:
        """Write `values`, of the array's type, behind what was written of it so far. RequestError for another type."""
        dtype, length = self._layout[name]
        begin, end = self._next[name], self._next[name] + values.nbytes
        if values.dtype != np.dtype(dtype) or end > self._ends[name]:
            raise RequestError(f"{self._name}: {name} takes {length} of {dtype}, not {len(values)} {values.dtype}")
        self._file.seek(self._data + begin)
        self._file.write(np.ascontiguousarray(values))
        self._next[name] = end

    def check_complete(self) -> None:
        """DataError where an array was not written to its end."""
        if short := [name for name in self._layout if self._next[name] != self._ends[name]]:
            raise DataError(f"{self._name}: {short[0]} was not written to its end; nothing was committed")


@contextmanager
def new_arrays(path: Path, layout: Mapping[str, tuple[str, int]]) -> Iterator[ArrayFile]:
    """Yields a file to append arrays to; at the end of the block it is on the disk and takes the name `path`.

    `layout`: (type, length) by name; the widest type comes first, so that every array begins at a multiple of its own
    width. An exception, or an array that is not complete (DataError), leaves nothing behind.
    """
    with new_file(path) as file:
        arrays = ArrayFile(file, path.name, layout)
        yield arrays
        arrays.check_complete()


def array_bytes(path: Path) -> int:
    """Bytes of a finished file's arrays together, without its header: lengths can be told from them."""
    with open(path, "rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def map_arrays(path: Path, layout: Mapping[str, tuple[str, int]]) -> dict[str, Shaped[np.ndarray, " entry"]]:
    """The arrays as read-only views of the file, nothing read until they are indexed. `layout` is what it must hold.

    Raises:
        DataError: The file is missing, truncated, damaged, or holds something else.
    """
    try:
        with pa.memory_map(os.fspath(path)) as file:
            data = file.read_buffer()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}; extract the features again") from None
    length = int.from_bytes(memoryview(data)[:8], "little")
    try:
        if len(data) < 8 or length > min(len(data) - 8, _LONGEST_HEADER):
            raise ValueError(f"{len(data)} bytes")
        header = json.loads(bytes(memoryview(data)[8 : 8 + length]))
        header.pop("__metadata__", None)
        found = {name: (_DTYPES[part["dtype"]].name, part["shape"]) for name, part in header.items()}
        if found != {name: (dtype, [count]) for name, (dtype, count) in layout.items()}:
            raise ValueError(f"it holds {found}")
        arrays, end = {}, 0
        for name, part in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, begin = _DTYPES[part["dtype"]], end
            end += part["shape"][0] * dtype.itemsize
            if part["data_offsets"] != [begin, end] or 8 + length + end > len(data):
                raise ValueError(f"{name} does not lie where its header says")
            arrays[name] = np.frombuffer(data, dtype, part["shape"][0], 8 + length + begin)
        if 8 + length + end != len(data):
            raise ValueError(f"{len(data)} bytes where its header asks for {8 + length + end}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is truncated or damaged ({error}); extract the features again") from None
    return arrays
