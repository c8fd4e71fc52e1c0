"""Tests of flipped bits: the same answer, or an error that names the file; never another answer without a word."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from answers_example import SEGMENTS, UNEMBED, answers
from store_example import values, write_store
from warned import warned

from workbench.io.errors import WorkbenchError
from workbench.model.unembed import save_unembed
from workbench.store import groups
from workbench.store.reader import open_store

FLIPS = 20


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("flips") / "x"
    write_store(path, SEGMENTS, unembed=lambda file: save_unembed(UNEMBED, file, torch.float32), unembed_reason=None)
    return path


def flipped(data: bytes, count: int, seed: int = 0):
    rng = random.Random(seed)
    for _ in range(count):
        bit = rng.randrange(8 * len(data))
        yield data[: bit // 8] + bytes([data[bit // 8] ^ (1 << bit % 8)]) + data[bit // 8 + 1 :]


def outcomes(path: Path, file: Path, expected) -> dict[str, int]:
    data, counts = file.read_bytes(), {"named": 0, "unnamed": 0, "same": 0, "another": 0}
    try:
        for changed in flipped(data, FLIPS):
            file.write_bytes(changed)
            try:
                counts["same" if answers(path) == expected else "another"] += 1
            except WorkbenchError as error:
                counts["named" if str(file) in str(error) else "unnamed"] += 1
    finally:
        file.write_bytes(data)
    return counts


@pytest.mark.parametrize(
    "name", ["manifest.json", "segments/00001/segment.json", "segments/00001/tokens.parquet", "unembed.safetensors"]
)
def test_a_flipped_bit_is_an_error_that_names_the_file(path, name):
    expected = answers(path)
    assert outcomes(path, path / name, expected)["named"] == FLIPS
    assert answers(path) == expected


def test_a_flipped_bit_in_a_group_is_reported_and_the_tables_of_its_segments_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "SIZE", 2)
    unembed = {"unembed": lambda file: save_unembed(UNEMBED, file, torch.float32), "unembed_reason": None}
    path = write_store(tmp_path / "x", SEGMENTS, **unembed)
    expected, (group,) = answers(path), (path / "tokens").glob("*.parquet")
    assert groups.token_files(path, open_store(path).manifest)[0] == (group, 0)
    with warned(f"^{group} is damaged: its bytes are not .*; the tables of its segments are read instead$") as warnings:
        assert outcomes(path, group, expected)["same"] == FLIPS
    assert len(warnings) == 1
    (path / "segments" / "00001" / "tokens.parquet").unlink()  # not read while the group is sound
    assert open_store(path).where("true").ids.tolist() == list(range(16))


def test_a_flipped_bit_in_the_header_of_activations_is_an_error_or_changes_nothing(path):
    file = path / "segments" / "00001" / "resid_post.0.safetensors"
    data, site, unnamed = file.read_bytes(), open_store(path).sites[0], []
    header, expected = len(data) - 4 * site.row_bytes, values(site, 5, 4)
    try:
        for changed in flipped(data[:header], 3 * FLIPS):
            file.write_bytes(changed + data[header:])
            try:
                assert np.array_equal(open_store(path)["resid_post", 0][5:9].numpy(), expected)
            except WorkbenchError as error:
                unnamed += [] if str(file) in str(error) else [str(error)]
    finally:
        file.write_bytes(data)
    assert unnamed == []


def test_a_file_that_changes_after_its_first_use_is_compared_again(path):
    file, store = path / "segments" / "00001" / "tokens.parquet", open_store(path)
    data, rows = file.read_bytes(), store.where("source = 'web'").ids.tolist()
    file.write_bytes(next(flipped(data, 1)))
    with pytest.raises(WorkbenchError, match=r"tokens\.parquet is damaged"):
        store.where("source = 'web'")
    file.write_bytes(data)
    assert store.where("source = 'web'").ids.tolist() == rows
