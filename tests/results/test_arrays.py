"""Arrays of a result come back as they were, type, names, axes and attributes included, or are refused by name."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as some
from hypothesis.extra import numpy as arrays

from workbench.io.errors import DataError, RequestError
from workbench.results.arrays import read_dataset, write_dataset

DATES = ["2020-01-01T00:00:00.000000001", "NaT", "1600-02-29"]
VALUES = {
    "float16": np.array([0.1, np.inf, np.nan], "f2"),
    "float64": np.array([0.1, -0.0, np.nan]),
    "another byte order": np.array([1.5, 2, 3], ">f4"),
    "int64 within 32 bits": np.array([-(2**31), 2**31 - 1, 0]),
    "int64 within 53 bits": np.array([2**40, -(2**53), 1]),
    "int64 beyond 53 bits": np.array([2**53 + 1, -(2**63), 1]),
    "uint8": np.array([255, 0, 1], "u1"),
    "uint16": np.array([65535, 0, 1], "u2"),
    "uint32": np.array([2**32 - 1, 0, 1], "u4"),
    "uint64": np.array([2**64 - 1, 0, 1], "u8"),
    "bool": np.array([True, False, True]),
    "complex": np.array([1 + 2j, complex(np.nan, -0.0), complex(0, np.inf)]),
    "complex64": np.array([1 + 2j, 0, 3j], "c8"),
    "text": np.array(["größe", "", " b "]),
    "text of NUL and surrogates": np.array(["\ud800", "a\0b", "😀"]),
    "bytes": np.array([b"\xff", b"", b"abc"]),
    "dates": np.array(DATES, "M8[ns]"),
    "days": np.array(["2020-01-01", "NaT", "-0044-03-15"], "M8[D]"),
    "durations": np.array([1, -5, "NaT"], "m8[ms]"),
    "objects": np.array(["a", None, 1.5], object),
    "objects of text": np.array(["a", "b\0", "ü"], object),
    "numbers and flags": np.array([True, 2**70, float("nan")], object),
    "no rows": np.empty((0, 2), "f2"),
    "no columns": np.empty((3, 0), "U7"),
    "a number": np.array(2**60 + 1),
    "a word": np.array("word"),
    "an object": np.array(None, object),
}


def round_trip(data: xr.Dataset) -> xr.Dataset:
    netcdf, record = write_dataset(data)
    return read_dataset(netcdf, json.loads(json.dumps(dataclasses.asdict(record))), "result.json")


def assert_comes_back(data: xr.Dataset) -> xr.Dataset:
    again = round_trip(data)
    xr.testing.assert_identical(again, data)
    assert {name: part.dtype for name, part in again.variables.items()} == {
        name: part.dtype for name, part in data.variables.items()
    }
    assert set(again.xindexes) == set(data.xindexes)
    return again


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_with_their_type(name):
    values = VALUES[name]
    assert_comes_back(xr.Dataset({"x": ([f"axis {i}" for i in range(values.ndim)], values)}))


NUMPY = some.one_of(  # xarray changes the unit of dates, or refuses them
    arrays.boolean_dtypes(),
    arrays.integer_dtypes(endianness="?"),
    arrays.unsigned_integer_dtypes(endianness="?"),
    arrays.floating_dtypes(endianness="?"),
    arrays.complex_number_dtypes(endianness="?", sizes=(64, 128)),
    arrays.byte_string_dtypes(),
    arrays.unicode_string_dtypes(),
)


@settings(max_examples=60)
@given(arrays.arrays(NUMPY, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)))
def test_any_array_of_numpy_comes_back(values):
    again = round_trip(xr.Dataset({"x": ([f"d{i}" for i in range(values.ndim)], values)}))["x"].values
    assert again.dtype == values.dtype
    np.testing.assert_array_equal(again, values)


@settings(max_examples=40)
@given(some.dictionaries(some.text(min_size=1, max_size=4), some.integers(1, 3), max_size=4))
def test_any_names_of_variables_and_axes_come_back(sizes):
    assert_comes_back(xr.Dataset({name: ([f"of {name}"], np.arange(size)) for name, size in sizes.items()}))


def test_names_that_netcdf_lacks_do_not_collide():
    names = ["größe", "array0", "a/b", "a b ", "", "0", "byte"]
    assert_comes_back(xr.Dataset({name: (f"axis{i}", [i]) for i, name in enumerate(names)}))


def test_attributes_come_back():
    attrs = {
        "units": "seconds",  # which xarray reads as an encoded duration
        "scale_factor": 2.0,
        "missing_value": 1.0,
        "coordinates": "x",
        "between": ["a", "b"],
        "nothing": None,
        "yes": True,
        "table": {"a": [1, None, "b"]},
        "no number": float("nan"),
        "numbers": np.arange(3),
        "one": np.float32(0.5),
        "größe": "größe",
        "": "",
    }
    assert_comes_back(xr.Dataset({"x": ("layer", np.arange(3.0), attrs)}, attrs=attrs))


def test_coordinates_and_indexes_come_back():
    levels = pd.MultiIndex.from_product([["a", "ü"], [1, 2**40]], names=["word", "count"])
    data = xr.Dataset({"x": ("pair", np.arange(4.0)), "y": (("layer", "head"), np.eye(2))})
    data = data.assign_coords(xr.Coordinates.from_pandas_multiindex(levels, "pair"))
    data = data.assign_coords(layer=[3, 5], head=[0, 1], label=("layer", ["one", "two"]), scalar=1.5)
    again = assert_comes_back(data.drop_indexes("head"))
    assert again.sel(word="ü", count=2**40)["x"].item() == 3
    assert again.indexes["pair"].equals(levels)


def test_the_file_is_netcdf_that_others_read():
    data = xr.Dataset(
        {"x": ("layer", np.arange(3, dtype="f2"), {"units": "nats"}), "word": ("layer", ["a", "ü", ""])},
        coords={"layer": [0, 1, 2]},
    )
    read = xr.open_dataset(io.BytesIO(write_dataset(data)[0]), engine="scipy")
    assert read["x"].attrs["units"] == "nats"
    assert read["x"].values.tolist() == [0, 1, 2]
    assert read["word"].values.tolist() == ["a", "ü", ""]
    assert read["layer"].values.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"gap": ("x", [object()])}, r"data\['gap'\] holds a object .*; give numbers, text, or None"),
        ({"gap": ("x", np.array([[1], None], object))}, r"data\['gap'\] holds a list \(\[1\]\)"),
        ({"gap": ("x", pd.Categorical(["a"]))}, r"data\['gap'\] is of pandas' type category; "),
        ({"gap": ("x", pd.interval_range(0, 2))}, r"data\['gap'\] is of pandas' type interval.*; "),
        ({"gap": ("x", np.array([1], np.longdouble))}, r"data\['gap'\] is of type float128, "),
        ({"gap": ("x", np.array([(1, 2)], "i4,i4"))}, r"data\['gap'\] is of type \[.*, which a result cannot hold"),
        ({7: ("x", [1])}, "data has the name 7, a int; names must be text"),
        ({"gap": (("x", 3), [[1]])}, "data has the name 3, a int; names must be text"),
        ({"gap": ("x", [1], {"a": {1, 2}})}, r"'a' of attributes of data\['gap'\] is a set \({1, 2}\); give text"),
        ({"gap": ("x", [1], {"a": {1: 2}})}, r"'a' of attributes of data\['gap'\] has the name 1, a int"),
        ({"gap": ("x", [1], {"a": [np.datetime64("2020-01-01")]})}, r"'a' of attributes of data\['gap'\] is a date"),
        ({"gap": ("x", [1], {"a": 1j})}, r"'a' of attributes of data\['gap'\] is a complex"),
    ],
)
def test_others_are_refused_by_name(data, text):
    with pytest.raises(RequestError, match=text) as caught:
        write_dataset(xr.Dataset(data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shape": [4]}, "the array 'x' has the shape"),
        ({"stored": "other"}, "the array 'other' is missing"),
        ({"stored": None}, "the array 'x' of shape .* has no values"),
        ({"dims": 3}, "expected a list, found 3"),
        ({"more": 3}, "unknown key 'more'"),
    ],
)
def test_a_record_that_does_not_fit_the_file(change, text):
    netcdf, record = write_dataset(xr.Dataset({"x": ("layer", [1.0, 2, 3])}))
    known = json.loads(json.dumps(dataclasses.asdict(record)))
    known["arrays"][0] |= change
    with pytest.raises(DataError, match=text):
        read_dataset(netcdf, known, "result.json")
