"""Tests of verify: every kind of damage is reported, and does not hide the others."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file
from store_example import (
    HALF,
    MODEL,
    contents,
    digest,
    part_of,
    token_table,
    values,
    write_segment,
    write_store,
    writing,
)

from workbench.io.errors import RequestError
from workbench.io.files import sha256_bytes
from workbench.store.manifest import as_lines, facts, read_manifest, write_manifest
from workbench.store.verify import verify

SEGMENTS = [[3, 2], [4], [1, 1, 5]]


@pytest.fixture
def path(tmp_path) -> Path:
    save = lambda path: save_file({"W_U": np.eye(3, dtype=np.float32)}, path)  # noqa: E731
    return write_store(tmp_path / "x.acts", SEGMENTS, unembed=save, unembed_reason=None)


def problems(path: Path, severity: str = "error") -> list[tuple[str, str, str]]:
    table = verify(path)
    assert not table["detail"].str.contains("\n").any()
    rows = table[table["severity"] == severity]
    return list(rows[["segment", "file", "finding"]].itertuples(index=False, name=None))


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 0x01
    file.write_bytes(data)


def test_a_sound_store_has_no_findings(path):
    table = verify(path)
    assert table.empty
    assert list(table.columns) == ["segment", "file", "finding", "detail", "severity"]


def test_progress_counts_the_bytes_read(path):
    steps = []
    verify(path, progress=steps.append)
    sizes = {name: len(data) for name, data in contents(path).items() if not name.endswith(".json")}
    assert sum(sizes.values()) - 512 * len(sizes) <= sum(steps) <= sum(sizes.values())  # headers are not counted


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_anywhere_is_reported_with_its_file(path, seed):
    rng = np.random.default_rng(seed)
    for name, data in contents(path).items():
        flip(path / name, position := int(rng.integers(len(data))))
        names = [(f"segments/{segment}/" if segment else "") + file for segment, file, _ in problems(path)]
        assert names[:1] == [name], position
        if not name.endswith(".json"):  # what says how others should be makes others look wrong
            assert set(names) == {name}, position
        (path / name).write_bytes(data)
    assert verify(path).empty


@pytest.mark.parametrize("name", ["resid_post.0.safetensors", "tokens.parquet", "segment.json"])
def test_a_truncated_file_is_named(path, name):
    file = path / "segments" / "00001" / name
    file.write_bytes(file.read_bytes()[:-3])
    assert ("00001", name, "checksum differs" if name == "segment.json" else "truncated") in problems(path)
    assert {(segment, file) for segment, file, _ in problems(path)} == {("00001", name)}


@pytest.mark.parametrize("name", ["resid_post.0.safetensors", "tokens.parquet", "segment.json"])
def test_a_missing_file_is_named(path, name):
    (path / "segments" / "00001" / name).unlink()
    assert problems(path) == [("00001", name, "missing file")]


def test_a_missing_segment_is_named_with_its_rows(path):
    (path / "segments" / "00001").rename(path.parent / "elsewhere")
    assert problems(path) == [("00001", "", "missing segment")]
    assert verify(path)["detail"].tolist() == ["rows 5 to 8 are gone"]


def test_a_longer_file_is_named(path):
    with open(path / "segments" / "00000" / "pattern.1.safetensors", "ab") as file:
        file.write(b"x")
    assert problems(path) == [("00000", "pattern.1.safetensors", "size differs")]


def test_one_damaged_file_does_not_hide_the_others(path):
    (path / "unembed.safetensors").unlink()
    (path / "segments" / "00000" / "segment.json").write_text("{")
    (path / "segments" / "00000" / "resid_post.0.safetensors").write_bytes(b"")
    (path / "segments" / "00001" / "tokens.parquet").unlink()
    flip(path / "segments" / "00002" / "resid_post.1.safetensors", -1)
    assert problems(path) == [
        ("", "unembed.safetensors", "missing file"),
        ("00000", "segment.json", "checksum differs"),
        ("00000", "segment.json", "unreadable"),
        ("00000", "resid_post.0.safetensors", "unreadable"),
        ("00001", "tokens.parquet", "missing file"),
        ("00002", "resid_post.1.safetensors", "checksum differs"),
    ]


def test_a_manifest_of_another_model_is_reported(path, tmp_path):
    foreign = write_store(tmp_path / "y", SEGMENTS, model=replace(MODEL, name="other", fingerprint="ff" * 32))
    (path / "manifest.json").write_bytes((foreign / "manifest.json").read_bytes())
    findings = problems(path)
    assert [(name, "segment.json", "wrong model") for name in ("00000", "00001", "00002")] == [
        finding for finding in findings if finding[2] == "wrong model"
    ]
    detail = verify(path).query("finding == 'wrong model'")["detail"].iloc[0]
    assert detail == "recorded from weights a1a1a1a1a1a1, the manifest is of other with ffffffffffff"


def test_a_file_from_another_model_is_named(path, tmp_path):
    foreign = write_store(tmp_path / "y", SEGMENTS, model=replace(MODEL, fingerprint="ff" * 32))
    name = "segments/00001/resid_post.0.safetensors"
    (path / name).write_bytes((foreign / name).read_bytes())
    assert [finding for _, _, finding in problems(path)] == ["checksum differs", "wrong model"]


def test_a_file_of_another_site_is_named(path):
    folder = path / "segments" / "00001"
    (folder / "resid_post.1.safetensors").write_bytes((folder / "resid_post.0.safetensors").read_bytes())
    assert problems(path) == [("00001", "resid_post.1.safetensors", "truncated")]
    (folder / "segment.json").unlink()  # without sizes and checksums the headers still tell
    assert ("00001", "resid_post.1.safetensors", "wrong tensor") in problems(path)


def test_an_edited_manifest_is_named(path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["model"]["name"] = "another"
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert problems(path) == [("", "manifest.json", "unreadable")]
    (path / "manifest.json").write_text("{}")
    assert problems(path) == [("", "manifest.json", "unreadable")]


def test_a_missing_store_is_a_wrong_request(tmp_path):
    with pytest.raises(RequestError, match="no store at"):
        verify(tmp_path / "nowhere")


# ---- values and tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "bad"),
    [
        (HALF, np.float16(np.nan)),
        (HALF, np.float16(-np.inf)),
        (replace(HALF, dtype="float32"), np.float32(np.inf)),
        (replace(HALF, dtype="bfloat16"), np.uint16(0x7F80)),
        (replace(HALF, dtype="bfloat16"), np.uint16(0xFFC1)),
    ],
    ids=["nan", "-inf", "inf", "bf16 inf", "bf16 nan"],
)
@pytest.mark.parametrize("counted", [True, False])
def test_values_that_are_not_finite_are_errors_even_if_they_are_the_models(tmp_path, site, bad, counted):
    stored = values(site, 0, 5)
    stored[3, 1] = stored[4, 0] = bad
    with writing(tmp_path / "x", sites=[site]) as store:
        store.begin(part_of([[5], [5]]), append=False)
        write_segment(store, [5])
        with store.segment(5, 1, digest(5, [5]), token_table([5], 5, 1)) as segment:
            segment.write(site.name, 0, stored)
            segment.count(site.name, nonfinite=2 * counted)
    assert problems(tmp_path / "x") == [("00001", site.file, "not finite")]
    detail = verify(tmp_path / "x")["detail"].tolist()
    assert detail == [f"2 values are NaN or infinite, {2 * counted} of them from the model; first in row 8"]


def test_the_largest_values_are_finite(tmp_path):
    for dtype, largest in [("float16", np.float16(65504)), ("bfloat16", np.uint16(0x7F7F)), ("float32", 3.4028234e38)]:
        site = replace(HALF, dtype=dtype)
        with writing(tmp_path / dtype, sites=[site]) as store:
            store.begin(part_of([[1]]), append=False)
            with store.segment(1, 1, "", token_table([1])) as segment:
                segment.write(site.name, 0, np.full((1, 3), largest, values(site, 0, 1).dtype))
                segment.count(site.name, overflow=3)
        assert problems(tmp_path / dtype) == []
        assert problems(tmp_path / dtype, "note") == [("00000", "segment.json", "overflow")]


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"row": [6, 5, 7, 8]}, "the token table must count its rows 5 to 8 without a gap"),
        ({"sequence": [2, 2, 3, 3]}, "sequences are not 2 to 2, each in one piece"),
        ({"sequence": [3, 3, 3, 3]}, "sequences are not 2 to 2, each in one piece"),
        ({"position": [0, 1, 3, 2]}, "positions do not count from 0 in every sequence"),
        ({"position": [1, 2, 3, 4]}, "positions do not count from 0 in every sequence"),
    ],
)
def test_tokens_that_are_not_numbered_in_order_are_reported(path, change, detail):
    table = token_table([4], 5, 2)
    for name, numbers in change.items():
        column = table.schema.get_field_index(name)
        table = table.set_column(column, table.field(column), pa.array(numbers, table.field(column).type))
    segment = path / "segments" / "00001"
    pq.write_table(table, segment / "tokens.parquet")
    (segment / "segment.json").unlink()
    wrong = verify(path).query("finding == 'wrong tokens'")
    assert wrong["detail"].tolist() == [detail]


def test_a_sequence_longer_than_the_context_is_named(tmp_path):
    path = write_store(tmp_path / "x", [[8], [9]])
    assert problems(path) == [("00001", "tokens.parquet", "wrong tokens")]
    assert verify(path)["detail"].tolist() == ["a sequence has 9 tokens, more than the context of 8"]


# ---- notes ------------------------------------------------------------------------------------------------


def test_unlisted_files_are_notes(path):
    for name in ("segments/00003.partial", "segments/00009", "tokens.partial"):
        (path / name).mkdir()
    (path / "segments" / "00000" / "notes.txt").write_text("x")
    (path / "features").mkdir()
    assert problems(path) == []
    assert problems(path, "note") == [
        ("", "00003.partial", "leftover"),
        ("", "00009", "unlisted"),
        ("", "tokens.partial", "leftover"),
        ("00000", "notes.txt", "unlisted"),
    ]


def test_an_unfinished_recording_is_a_note(path):
    manifest = read_manifest(path)
    write_manifest(path, replace(manifest, segments=manifest.segments[:2], complete=False))
    assert problems(path) == []
    assert problems(path, "note") == [("", "manifest.json", "incomplete"), ("", "00002", "unlisted")]
    assert verify(path)["detail"][0] == "9 of 16 planned rows are committed"


def test_what_the_recording_did_to_its_texts_is_a_note_and_in_the_description(path):
    manifest = read_manifest(path)
    (part,) = manifest.parts
    changed = replace(part, skipped_documents=1, cut_documents=1234, replaced_characters=2)
    write_manifest(path, replace(manifest, parts=(changed,)))
    assert problems(path) == []
    assert verify(path)["detail"].tolist() == [
        "1 document without a token skipped",
        "1,234 documents cut into several sequences",
        "2 characters that are not valid Unicode replaced by U+FFFD",
    ]
    assert (
        as_lines(facts(path, read_manifest(path))).splitlines()[-1] == f"notes    {'; '.join(verify(path)['detail'])}"
    )


def test_checksums_are_sha256(path):
    listed = json.loads((path / "segments" / "00000" / "segment.json").read_text())["files"]
    files = contents(path / "segments" / "00000")
    assert listed == {
        name: {"bytes": len(data), "sha256": sha256_bytes(data)}
        for name, data in files.items()
        if name != "segment.json"
    }
