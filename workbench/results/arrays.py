"""Arrays of a result on the disk: values in a netCDF 3 file, and their names, types, axes and attributes in JSON.

netCDF 3 has integers of up to 32 bits, two types of floats and characters. Each array is written in the first of these
that holds its values exactly, integers beyond 53 bits and dates as text, and gets its own type again when it is read.
Every value is compared when it is written; what would not come back is refused by name.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.io.errors import DataError, RequestError, shown
from workbench.io.parse import parse

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr

_LONGEST = (1 << 31) - 4  # bytes of a variable of netCDF 3
_INT32, _EXACT_FLOAT = 1 << 31, 1 << 53
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.@+-]{0,199}")
_FOR_READERS = ("units", "long_name", "value_under_null")
_TEXT_ATTRIBUTE = "_Encoding"


@dataclass(frozen=True)
class ArrayRecord:
    """One variable or coordinate."""

    name: str
    stored: str | None
    """Name in the netCDF file; None for an array without values, which that format does not have."""
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    """NumPy's name of the type: "<f2", "<M8[ns]", "|O"."""
    encoding: str
    """number, text, or json: one JSON value a cell, for objects."""
    attrs: dict[str, Any]
    coordinate: bool


@dataclass(frozen=True)
class DatasetRecord:
    """Everything of an `xarray.Dataset` except the values."""

    arrays: tuple[ArrayRecord, ...]
    attrs: dict[str, Any]
    levels: dict[str, Any]
    """Axis to the names of the levels of its `pandas.MultiIndex`."""
    unindexed: tuple[str, ...]
    """Coordinates of an axis of the same name that have no index."""


def write_dataset(data: xr.Dataset) -> tuple[bytes, DatasetRecord]:
    """Returns the bytes of a netCDF 3 file with the values of `data`, and the record of all else.

    Raises:
        RequestError: A name, type, value or attribute that would not be read back as it is; the message names it.
    """
    levels, plain = _without_multiindex(data)
    names, dims, file = _Names("array"), _Names("axis"), _NetCdf()
    records = []
    for key, variable in plain.variables.items():
        _check_names("data", key, *variable.dims)
        name = str(key)
        values = _values(name, variable)
        encoding, encoded = _encode(name, values)
        stored = names(name) if values.size else None
        record = ArrayRecord(
            name,
            stored,
            tuple(map(str, variable.dims)),
            values.shape,
            values.dtype.str,
            encoding,
            _attributes(f"data[{name!r}]", variable.attrs),
            name in plain.coords,
        )
        records.append(record)
        if stored is not None:
            if not _equal(_decode(encoded, record), values):
                raise RequestError(f"data[{name!r}] of type {values.dtype} cannot be saved exactly; give another type")
            file.add(stored, [dims(axis) for axis in record.dims], encoded, record)
    unindexed = tuple(str(name) for name in plain.coords if name in plain.dims and name not in plain.xindexes)
    unindexed = tuple(name for name in unindexed if name not in levels)
    return file.bytes(), DatasetRecord(tuple(records), _attributes("data", data.attrs), levels, unindexed)


def read_dataset(netcdf: bytes, record: object, where: str) -> xr.Dataset:
    """Returns the dataset that `write_dataset` was given.

    Args:
        netcdf: Bytes of the file.
        record: JSON value of the `DatasetRecord`.
        where: File of the record, for messages.

    Raises:
        DataError: The record is not one, or does not fit the file.
    """
    import numpy as np
    import xarray as xr

    known: DatasetRecord = parse(DatasetRecord, record, where)
    raw = _read_netcdf(netcdf)
    variables: dict[str, xr.Variable] = {}
    for array in known.arrays:
        if array.stored is not None and array.stored not in raw:
            raise DataError(f"{where}: the array {array.stored!r} is missing from the netCDF file")
        if array.stored is None and 0 not in array.shape:
            raise DataError(f"{where}: the array {array.name!r} of shape {array.shape} has no values")
        if array.stored is None:
            values = np.empty(array.shape, np.dtype(array.dtype))
        else:
            values = _decode(raw[array.stored], array)
        variables[array.name] = xr.Variable(array.dims, values, array.attrs)
    coordinates = {array.name for array in known.arrays if array.coordinate}
    data = xr.Dataset(variables, attrs=known.attrs).set_coords(coordinates)
    data = data.drop_indexes([name for name in known.unindexed if name in data.xindexes])
    return data.set_index({axis: list(names) for axis, names in known.levels.items()}) if known.levels else data


# ---- values -------------------------------------------------------------------------------------------------


def _values(name: str, variable: xr.Variable) -> np.ndarray:
    """The values as a NumPy array; text of pandas becomes objects."""
    import numpy as np

    kind = variable.dtype
    if not isinstance(kind, np.dtype):
        if getattr(kind, "name", "") not in ("str", "string"):
            raise RequestError(f"data[{name!r}] is of pandas' type {kind}; give numbers, or text by astype(object)")
        kind = np.dtype(object)
    if kind.kind not in "fiubcmMUSO" or kind.char in "gG":
        raise RequestError(f"data[{name!r}] is of type {kind}, which a result cannot hold; give another type")
    return np.asarray(variable.values, dtype=kind)


def _encode(name: str, values: np.ndarray) -> tuple[str, np.ndarray]:
    """Name of the encoding, and the values in a type of netCDF 3; characters and complex numbers add an axis."""
    import numpy as np

    kind, wide = values.dtype.kind, values.dtype.itemsize
    if kind == "f":
        return "number", values.astype(np.float64 if wide == 8 else np.float32)
    if kind == "c":
        part = np.float64 if wide == 16 else np.float32
        return "number", np.stack([np.real(values), np.imag(values)], axis=-1).astype(part)
    if kind in "iubm":
        return _encode_whole(values.astype(np.int64) if kind == "m" else values)
    if kind == "S":
        return "text", _characters(values)
    if kind == "M" or all(type(cell) is str and _is_plain(cell) for cell in values.ravel().tolist()):
        return "text", _characters(np.strings.encode(values.astype(str), "utf-8"))
    return "json", _characters(_json_cells(name, values).astype("S"))


def _encode_whole(values: np.ndarray) -> tuple[str, np.ndarray]:
    import numpy as np

    small = {"b1": "i1", "i1": "i1", "u1": "i2", "i2": "i2", "u2": "i4"}.get(values.dtype.str[1:])
    if small or not values.size:
        return "number", values.astype(small or "i4")
    least, most = int(values.min()), int(values.max())
    if least >= -_INT32 and most < _INT32:
        return "number", values.astype(np.int32)
    if least >= -_EXACT_FLOAT and most <= _EXACT_FLOAT:
        return "number", values.astype(np.float64)
    return "text", _characters(values.astype(str).astype("S"))


def _is_plain(text: str) -> bool:
    """Text that an array of characters gives back: no NUL at its end, no lone surrogate."""
    return not text.endswith("\0") and not any("\ud800" <= character <= "\udfff" for character in text)


def _characters(text: np.ndarray) -> np.ndarray:
    import numpy as np

    text = text.astype(f"S{max(1, text.dtype.itemsize)}")
    return np.frombuffer(text.tobytes(), "S1").reshape(*text.shape, text.dtype.itemsize)


def _json_cells(name: str, values: np.ndarray) -> np.ndarray:
    import numpy as np

    cells = []
    for cell in values.ravel():
        plain = cell.item() if isinstance(cell, np.generic) else cell
        if type(plain) not in (str, int, float, bool, type(None)):
            raise RequestError(
                f"data[{name!r}] holds a {type(cell).__name__} ({shown(cell)}); give numbers, text, or None"
            )
        cells.append(json.dumps(plain))
    return np.array(cells, dtype=str).reshape(values.shape)


def _decode(raw: np.ndarray, record: ArrayRecord) -> np.ndarray:
    """The values that `_encode` was given."""
    import numpy as np

    kind = np.dtype(record.dtype)
    if record.encoding == "number":
        if kind.kind == "c":
            values = np.ascontiguousarray(raw.astype(f"f{kind.itemsize // 2}")).view(f"c{kind.itemsize}")[..., 0]
            values = values.astype(kind)
        else:
            values = raw.astype(np.int64).astype(kind) if kind.kind == "m" else raw.astype(kind)
    else:
        values = np.frombuffer(raw.tobytes(), f"S{raw.shape[-1]}").reshape(raw.shape[:-1])
        if record.encoding == "json":
            cells = [json.loads(cell) for cell in values.ravel().tolist()]
            values = _objects(cells, values.shape).astype(kind)
        elif kind.kind != "S":
            text = np.strings.decode(values, "utf-8")
            text = _objects(text.ravel().tolist(), text.shape) if kind.kind == "O" else text
            values = text.astype(np.int64).astype(kind) if kind.kind == "m" else text.astype(kind)
        else:
            values = values.astype(kind)
    if values.shape != record.shape:
        raise DataError(f"the array {record.name!r} has the shape {values.shape}, not {record.shape}")
    return values


def _objects(cells: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    import numpy as np

    values = np.empty(len(cells), object)
    values[:] = cells
    return values.reshape(shape)


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Equality of type, shape and every value; NaN equals NaN."""
    import numpy as np

    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if first.dtype.kind == "O":
        pairs = zip(first.ravel(), second.ravel(), strict=True)
        return all(a == b or (a != a and b != b) for a, b in pairs)
    return bool(np.array_equal(first, second, equal_nan=first.dtype.kind in "fcmM"))


# ---- names and attributes -----------------------------------------------------------------------------------


class _Names:
    """Names that netCDF allows: the given one where it is plain and free, else a numbered one."""

    def __init__(self, word: str) -> None:
        self._word, self._known = word, {}

    def __call__(self, name: str) -> str:
        if name not in self._known:
            stored, number = name, 0
            while not _PLAIN_NAME.fullmatch(stored) or stored in self._known.values():
                stored, number = f"{self._word}{number}", number + 1
            self._known[name] = stored
        return self._known[name]


def _check_names(where: str, *names: object) -> None:
    for name in names:
        if not isinstance(name, str):
            raise RequestError(f"{where} has the name {shown(name)}, a {type(name).__name__}; names must be text")


def _attributes(where: str, attrs: Mapping[Any, Any]) -> dict[str, Any]:
    return json_value(f"attributes of {where}", attrs)


def json_value(where: str, value: Any) -> Any:
    """Returns a value as JSON reads it back: arrays and tuples as lists. RequestError, naming `where`, for others."""
    import numpy as np

    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        _check_names(where, *value)
        return {key: json_value(f"{key!r} of {where}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(where, item) for item in value]
    if isinstance(value, str):
        return str(value)
    if value is None or type(value) in (bool, int, float):
        return value
    raise RequestError(f"{where} is a {type(value).__name__} ({shown(value)}); give text, numbers, a list or None")


def _without_multiindex(data: xr.Dataset) -> tuple[dict[str, Any], xr.Dataset]:
    """Names of the levels by axis, and the dataset with each level as a coordinate of its own."""
    levels = {}
    for index, variables in data.xindexes.group_by_index():
        axis = getattr(index, "dim", None)
        if len(variables) > 1 and axis in variables:
            names = [name for name in variables if name != axis]
            _check_names("data", axis, *names)
            levels[axis] = names
    return levels, data.reset_index(list(levels)) if levels else data


# ---- the file -----------------------------------------------------------------------------------------------


class _NetCdf:
    """A netCDF 3 file in memory."""

    def __init__(self) -> None:
        from scipy.io import netcdf_file

        self._buffer = io.BytesIO()
        self._file = netcdf_file(self._buffer, "w", version=2)
        self._lengths: dict[str, int] = {}

    def add(self, name: str, dims: list[str], values: np.ndarray, record: ArrayRecord) -> None:
        if values.nbytes > _LONGEST:
            raise RequestError(f"data[{record.name!r}] takes {values.nbytes:,} bytes; a result holds up to 2 GiB")
        for length in values.shape[len(dims) :]:
            dims = [*dims, f".{'text' if values.dtype.kind == 'S' else 'part'}{length}"]
        for axis, length in zip(dims, values.shape, strict=True):
            if axis not in self._lengths:
                self._file.createDimension(axis, length)
                self._lengths[axis] = length
        variable = self._file.createVariable(name, values.dtype, tuple(dims))
        variable[...] = values
        readable = {key: record.attrs[key] for key in _FOR_READERS if isinstance(record.attrs.get(key), str)}
        if record.encoding != "number" and record.dtype[1] != "S":
            readable[_TEXT_ATTRIBUTE] = "utf-8"
        for key, text in readable.items():
            if text:
                setattr(variable, key, text.encode("utf-8", "replace"))

    def bytes(self) -> bytes:
        self._file.flush()
        content = self._buffer.getvalue()
        self._file.close()
        return content


def _read_netcdf(content: bytes) -> dict[str, np.ndarray]:
    from scipy.io import netcdf_file

    with netcdf_file(io.BytesIO(content), "r", mmap=False) as file:
        return {name: variable[...].copy() for name, variable in file.variables.items()}
