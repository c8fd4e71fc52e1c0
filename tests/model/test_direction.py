"""Directions: their values, their file, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

import workbench as wb

MADE = {"method": "by hand", "rows": [3, 4]}


def test_a_direction_keeps_a_copy_in_float32():
    values = np.arange(4.0)
    direction = wb.Direction("resid_post.1", values, "count", MADE)
    values[:] = 9
    assert direction.vector.dtype == torch.float32
    assert direction.vector.tolist() == [0, 1, 2, 3]
    assert repr(direction) == "Direction('count' at resid_post.1, 4, L2 norm 3.742)"


def test_unit_and_cosine_are_numpys():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(2, 3, 5)) * 1e3
    first, second = (wb.Direction("z.0", part, "x") for part in (a, b))
    np.testing.assert_allclose(first.unit().vector, a / np.linalg.norm(a), rtol=1e-6)
    expected = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(first.cosine(second), expected, rtol=1e-6)
    assert first.cosine(first) == pytest.approx(1)


def test_a_file_gives_the_direction_back_and_opens_elsewhere(tmp_path):
    vector = torch.randn(3, 5)
    path = wb.Direction("z.0", vector, "a 'name' ✓", MADE).save(tmp_path / "new" / "d.safetensors")
    again = wb.load_direction(path)
    assert torch.equal(again.vector, vector)
    assert (again.site, again.name, again.made_of) == ("z.0", "a 'name' ✓", MADE)
    with safe_open(path, "np") as file:
        np.testing.assert_array_equal(file.get_tensor("direction"), vector.numpy())
    wb.Direction("z.0", -vector, "other").save(path)  # its own kind of file is replaced
    assert torch.equal(wb.load_direction(path).vector, -vector)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("", [1.0], "x"), "site must be a text"),
        (("resid_post.1", [1.0], ""), "name must be a text"),
        (("resid_post.1", [1.0, float("nan")], "x"), "not finite"),
        (("resid_post.1", [1e39], "x"), "not finite in float32"),
        (("resid_post.1", [], "x"), "no value"),
        (("resid_post.1", "abc", "x"), "array of numbers"),
        (("resid_post.1", [1.0], "x", {"a": float("inf")}), "what JSON holds"),
        (("resid_post.1", [1.0], "x", {"a": torch.zeros(1)}), "what JSON holds"),
    ],
)
def test_a_direction_refuses(settings, message):
    with pytest.raises(wb.RequestError, match=message):
        wb.Direction(*settings)


def test_zero_has_no_unit_vector_and_other_shapes_no_cosine():
    zero, wide = wb.Direction("z.0", [0.0, 0.0], "nothing"), wb.Direction("z.0", [1.0, 0.0, 0.0], "x")
    with pytest.raises(wb.RequestError, match="'nothing' is 0"):
        zero.unit()
    with pytest.raises(wb.RequestError, match=r"shape \(2,\).*\(3,\)"):
        zero.cosine(wide)


def test_other_files_are_refused_and_kept(tmp_path):
    direction = wb.Direction("z.0", [1.0], "x")
    with pytest.raises(wb.RequestError, match=r"must end in \.safetensors"):
        direction.save(tmp_path / "d.pt")
    with pytest.raises(wb.RequestError, match="no direction at"):
        wb.load_direction(tmp_path / "d.safetensors")
    save_file({"direction": np.ones(1, np.float32)}, tmp_path / "d.safetensors")
    with pytest.raises(wb.RequestError, match="is no direction"):
        wb.load_direction(tmp_path / "d.safetensors")
    before = (tmp_path / "d.safetensors").read_bytes()
    with pytest.raises(wb.RequestError, match="exists and is no direction"):
        direction.save(tmp_path / "d.safetensors")
    assert (tmp_path / "d.safetensors").read_bytes() == before


def test_a_changed_byte_is_found(tmp_path):
    path = wb.Direction("z.0", [1.0, 2.0, 3.0], "x", MADE).save(tmp_path / "d.safetensors")
    data = bytearray(path.read_bytes())
    name = data.index(b"by hand")
    for place in (3, 40, 120, name, len(data) - 2):
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises((wb.DataError, wb.RequestError)):
            wb.load_direction(path)
