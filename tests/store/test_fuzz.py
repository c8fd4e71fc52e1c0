"""Seeded fuzz of the readers of a store: every damaged file is the same answer or one line that says so."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from answers_example import SEGMENTS, UNEMBED, answers
from mutations import fuzz, safetensors, whole
from store_example import seal, write_store

from workbench.io.files import sha256_bytes
from workbench.io.parse import to_checked_json
from workbench.model.unembed import load_unembed, save_unembed
from workbench.store.manifest import parse_segment, read_manifest, write_manifest
from workbench.store.reader import open_store
from workbench.store.verify import verify


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "x"
    write_store(path, SEGMENTS, unembed=lambda file: save_unembed(UNEMBED, file, torch.float32), unembed_reason=None)
    return path


def with_checksum(data: bytes):
    """The manifest's JSON, whose checksum is that of the changed content, as an editor of it would write."""
    value, build = whole(data)

    def sealed(changed) -> bytes:
        try:
            return to_checked_json(changed).encode() if isinstance(changed, dict) else build(changed)
        except (ValueError, TypeError):  # NaN
            return build(changed)

    return value, sealed


def test_damaged_manifests(path):
    def read():
        store = open_store(path)
        return store.manifest, repr(store), store.manifest.fingerprint, verify(path).shape

    expected = read()
    outcomes = fuzz(lambda: read()[0], path / "manifest.json", is_original=lambda answer: answer == expected[0])
    assert outcomes["DataError"] > 0.8 * outcomes.total()
    fuzz(read, path / "manifest.json", parts=with_checksum, seed=1)


def test_damaged_records_of_segments(path):
    file = path / "segments" / "00001" / "segment.json"
    fuzz(lambda: parse_segment(file.read_bytes(), file), file)
    expected = answers(path)
    fuzz(lambda: answers(path), file, seed=1, count=20, is_original=lambda answer: answer == expected)


def test_damaged_token_tables(path):
    file, expected = path / "segments" / "00001" / "tokens.parquet", answers(path)
    fuzz(lambda: answers(path), file, count=20, is_original=lambda answer: answer == expected)
    assert "error" not in set(verify(path)["severity"])


def test_damaged_activations_are_read_or_refused(path):
    file = path / "segments" / "00001" / "resid_post.0.safetensors"
    fuzz(
        lambda: open_store(path)["resid_post", 0][5:9].shape,
        file,
        parts=safetensors,
        is_original=lambda shape: shape == (4, 3),
    )


def test_damaged_unembeddings(path):
    file = path / "unembed.safetensors"

    def read_sealed():
        manifest = read_manifest(path)
        write_manifest(path, dataclasses.replace(manifest, unembed=sha256_bytes(file.read_bytes())))
        return load_unembed(path).vocab

    try:
        fuzz(read_sealed, file, parts=safetensors)
    finally:
        seal(path)


def test_verify_reports_every_damaged_file_and_never_fails(path):
    for name in ("manifest.json", "segments/00000/segment.json", "segments/00001/tokens.parquet"):
        parts = None if name.endswith("json") else lambda data: (json.loads("{}"), lambda _value: data[::-1])
        outcomes = fuzz(lambda: len(verify(path)), path / name, parts=parts, count=40)
        assert outcomes.total() == 40
