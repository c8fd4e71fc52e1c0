"""Tests of safetensors files with one tensor: compatible with the library, and damage is reported."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from store_example import BRAIN, HALF, SINGLE, as_numpy, values

from workbench.io.errors import DataError, RequestError
from workbench.io.tensors import TensorFile, map_rows, read_header
from workbench.store.manifest import SiteRecord


def tensor_file(path: Path, site: SiteRecord, rows: int = 5) -> Path:
    file = TensorFile(path, site.label, site.dtype, (rows, *site.shape), {"site": site.name, "model": "m"})
    for row in reversed(range(rows)):
        file.write(row, values(site, row, 1))
    file.finish()
    return path


@pytest.mark.parametrize("site", [HALF, SINGLE, BRAIN], ids=lambda site: site.dtype)
def test_tensor_files_open_with_the_safetensors_library(tmp_path, site):
    from safetensors.torch import load_file as load_torch

    path = tensor_file(tmp_path / "t.safetensors", site)
    assert np.array_equal(as_numpy(load_torch(path)[site.label]), values(site, 0, 5))
    assert np.array_equal(map_rows(path), values(site, 0, 5))
    with safe_open(path, "np") as file:
        assert file.metadata() == {"site": site.name, "model": "m"}
    assert read_header(path).offset % 64 == 0


def test_the_libraries_own_files_are_read(tmp_path):
    from safetensors.numpy import save_file

    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    save_file({"x": array}, tmp_path / "x.safetensors", metadata={"site": "s"})
    assert np.array_equal(map_rows(tmp_path / "x.safetensors"), array)
    assert read_header(tmp_path / "x.safetensors").metadata == {"site": "s"}


def test_a_tensor_without_rows(tmp_path):
    path = tensor_file(tmp_path / "t.safetensors", HALF, rows=0)
    assert map_rows(path).shape == (0, 3)
    assert load_file(path)["resid_post.0"].shape == (0, 3)


def test_a_map_cannot_be_written_to(tmp_path):
    rows = map_rows(tensor_file(tmp_path / "t.safetensors", HALF))
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "is truncated or damaged (29 bytes of tensors, where its header asks for 30)"),
        (lambda data: data + b"x", "is truncated or damaged (31 bytes of tensors"),
        (lambda data: data[:5], "is truncated or damaged (5 bytes, header of"),
        (lambda data: b"\xff" * 8 + data[8:], "is truncated or damaged (222 bytes, header of 1844674407"),
        (lambda data: data.replace(b"[5,3]", b"[5,2]"), "(resid_post.0 does not lie where its header says)"),
        (lambda data: data.replace(b"[5,3]", b"[-5,"), "is truncated or damaged ("),
        (lambda data: data.replace(b"[5,3]", b"[-5,3]"), "is truncated or damaged ("),
        (lambda data: data.replace(b"F16", b"I64"), "(resid_post.0 does not lie where its header says)"),
        (
            lambda data: data.replace(b"F16", b"U16"),
            "must hold one tensor of float16, bfloat16, float32, and",
        ),
        (lambda data: data.replace(b"F16", b"I16"), "is truncated or damaged (header b'"),
        (lambda data: data.replace(b'"dtype"', b'"dtipe"'), "is truncated or damaged (header b'"),
        (lambda data: data[:8] + b"[" + data[9:], "is truncated or damaged ("),
    ],
)
def test_a_damaged_tensor_file_is_refused_before_it_is_mapped(tmp_path, damage, message):
    path = tmp_path / "t.safetensors"
    data = tensor_file(path, HALF).read_bytes()
    path.write_bytes(damage(data))
    with pytest.raises(DataError, match=re.escape(message)):
        map_rows(path)


def test_a_file_with_two_tensors_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3, np.float32), "y": np.zeros(3, np.float32)}, tmp_path / "t.safetensors")
    with pytest.raises(DataError, match="and holds x float32, y float32"):
        map_rows(tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    ("first", "rows", "message"),
    [
        (0, np.zeros((2, 3), np.float32), "t takes float16 as float16 or its bits, not float32"),
        (0, np.zeros((2, 4), np.float16), "t takes contiguous rows of (3,), not (4,)"),
        (0, np.zeros((3, 2), np.float16).T, "t takes contiguous rows of (3,), not (3,)"),
        (4, np.zeros((2, 3), np.float16), "t has 5 rows; 4 to 6 do not fit"),
        (-1, np.zeros((2, 3), np.float16), "t has 5 rows; -1 to 1 do not fit"),
    ],
)
def test_rows_that_do_not_fit_the_file_are_refused(tmp_path, first, rows, message):
    file = TensorFile(tmp_path / "t", "x", "float16", (5, 3), {})
    with pytest.raises(RequestError, match=re.escape(message)):
        file.write(first, rows)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([(0, 2)], "t: row 2 was not written; nothing was committed"),
        ([(3, 2), (0, 2)], "t: row 2 was not written"),
        ([(0, 3), (2, 3)], "t: row 2 was written twice"),
        ([], "t: row 0 was not written"),
    ],
)
def test_a_file_is_finished_when_every_row_was_written_once(tmp_path, written, message):
    file = TensorFile(tmp_path / "t", "x", "float16", (5, 3), {})
    for first, rows in written:
        file.write(first, np.zeros((rows, 3), np.float16))
    with pytest.raises(DataError, match=re.escape(message)):
        file.finish()
