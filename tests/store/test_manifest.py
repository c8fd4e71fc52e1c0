"""Tests of the manifest: what is accepted, what is refused and how; a stored version 1 stays readable."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_example import MODEL, contents, values, write_store

from workbench.io.errors import DataError, RequestError
from workbench.io.parse import to_checked_json, to_json
from workbench.store.manifest import SiteRecord, as_lines, facts, read_manifest
from workbench.store.reader import open_store

VERSION_1 = Path(__file__).parents[1] / "data" / "store-v1"


def test_a_store_of_version_1_stays_readable():
    """The files were written once, with version 1; never write them again to make this test pass."""
    store = open_store(VERSION_1)
    assert (store.rows, len(store.manifest.segments), len(store.manifest.parts)) == (9, 2, 2)
    assert store["resid_post", 0][4].tolist() == [10.125, 14.75, -12.0]
    assert store["blocks.1.hook_resid_post"][8].tolist() == [2.875, 7.5, 12.125]
    assert store["pattern.1"][5].tolist() == [[-14.5, -9.875, -5.25, -0.625], [4.0, 8.625, 13.25, -13.5]]
    assert store.tokens["token"].to_pylist()[:4] == [" Monday", "日", "%", ""]
    assert store.tokens["source"].to_pylist() == ["wiki"] * 3 + ["web"] * 2 + ["wiki"] * 4
    assert store.where("token = 'a\0b' OR char_start = 9").ids.tolist() == [5, 8]
    assert store.manifest.recording["context"] == 8
    assert store.manifest.tokens_added == {"prefix": (1,), "suffix": ()}
    assert store.manifest.model == MODEL
    assert store.verify().empty


# ---- manifest ---------------------------------------------------------------------------------------------


def edited(path: Path, edit) -> Path:
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(to_checked_json(manifest))
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(colour="red"), "manifest.json: unknown key 'colour'; expected model, sites, recording"),
        (
            lambda m: m.pop("sites"),
            "manifest.json: the key 'sites' is missing; found complete, environment, format, gradient_of",
        ),
        (lambda m: m.update(sites={}), "manifest.json: sites: expected a list, found {}"),
        (lambda m: m["model"].update(vocab=True), "model: vocab: expected a whole number, found true"),
        (lambda m: m["model"].update(name=None), "model: name: expected a string, found null"),
        (lambda m: m["segments"][0].update(rows="5"), 'segments[0]: rows: expected a whole number, found "5"'),
        (lambda m: m["segments"][0].update(name="../.."), "segments[0]: '../..' is not a segment name"),
        (lambda m: m["segments"][0].update(rows=0), "segments[0]: segment 00000 has 0 rows; at least 1 expected"),
        (lambda m: m["sites"][0].update(name="../x"), "sites[0]: '../x' is not a site name"),
        (lambda m: m["sites"][0].update(dtype="int8"), "must be one of float16, bfloat16, float32, not 'int8'"),
        (lambda m: m["sites"][0].update(axes=["row"]), "axes ('row',) of blocks.0.hook_resid_post do not fit"),
        (lambda m: m.update(format="zip"), "format is 'zip', expected 'workbench.activations'; this is no store"),
        (lambda m: m.update(version="1"), "version is '1', expected 1 or 2"),
        (lambda m: m["segments"][0].update(name="00001"), "segment 0 is named 00001, expected 00000"),
        (lambda m: m["segments"].append(m["segments"][0]), "segment 1 is named 00000, expected 00001"),
        (lambda m: m["segments"][0].update(part=1), "segment 00000 is of part 1, and there are 1 parts"),
        (lambda m: m["segments"][0].update(part=-1), "segment 00000 is of part -1, and there are 1 parts"),
        (lambda m: m["segments"][0].update(rows=6), "part 0 has more rows or sequences than planned"),
        (lambda m: m["segments"][0].update(sequences=3), "part 0 has more rows or sequences than planned"),
        (lambda m: m["segments"][0].update(rows=4), "it counts as complete with 4 of 5 planned rows"),
        (lambda m: m["segments"].clear(), "it counts as complete with 0 of 5 planned rows"),
        (lambda m: m.update(complete=False), "it counts as not complete with 5 of 5 planned rows"),
        (lambda m: m.update(parts=[], segments=[]), "it counts as complete with 0 of 0 planned rows"),
        (
            lambda m: (m.update(parts=m["parts"] * 2), m["segments"][0].update(part=1)),
            "segment 00000 is of part 1, and rows of an earlier part are missing",
        ),
    ],
)
def test_a_manifest_that_is_not_as_declared_is_refused_by_file_and_key(tmp_path, edit, message):
    path = edited(write_store(tmp_path / "x.acts", [[3, 2]]), edit)
    with pytest.raises(DataError, match=re.escape(message)) as refused:
        read_manifest(path)
    assert str(refused.value).startswith(str(path / "manifest.json"))
    assert "\n" not in str(refused.value)


def test_a_manifest_that_was_edited_or_damaged_is_not_opened(tmp_path):
    path = write_store(tmp_path / "x.acts", [[3, 2]])
    text = (path / "manifest.json").read_text()
    for old, new in [('"demo"', '"damo"'), ('"vocab": 40', '"vocab": 41'), ('{\n "checksum": "', '{\n "checksum": "0')]:
        assert text.count(old) == 1
        (path / "manifest.json").write_text(text.replace(old, new))
        with pytest.raises(DataError, match="is damaged or was edited: its checksum differs; restore it from a copy"):
            read_manifest(path)
    (path / "manifest.json").write_text(json.dumps(json.loads(text), indent=4))  # formatted anew: the same facts
    assert read_manifest(path).complete


def test_a_store_of_version_1_is_complete_if_it_has_all_rows_of_at_least_one_part(tmp_path):
    shutil.copytree(VERSION_1, tmp_path / "x")
    assert read_manifest(tmp_path / "x").complete

    def interrupted(manifest):
        manifest["segments"].pop()

    def tokenizing(manifest):
        manifest.update(parts=[], segments=[])

    for edit in (interrupted, tokenizing):
        assert not read_manifest(edited(tmp_path / "x", edit)).complete


def test_a_newer_version_asks_for_an_upgrade(tmp_path):
    path = edited(write_store(tmp_path / "x.acts", [[3]]), lambda m: m.update(version=3, more="fields"))
    expected = f"{path}/manifest.json has format version 3 and this workbench reads up to 2; upgrade the workbench"
    with pytest.raises(RequestError) as refused:
        read_manifest(path)
    assert str(refused.value) == expected


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda file: file.symlink_to("/dev/zero")])
def test_a_manifest_that_is_no_regular_file_is_refused_at_once(tmp_path, make):
    """The open of a FIFO would wait for its other end, and a device has no end."""
    path = write_store(tmp_path / "x.acts", [[3]])
    (path / "manifest.json").unlink()
    make(path / "manifest.json")
    with pytest.raises(DataError, match=r"manifest\.json is not a regular file; restore it from a copy$"):
        read_manifest(path)


def test_what_is_not_a_store_is_refused_with_the_reason(tmp_path):
    write_store(tmp_path / "stories.acts", [[3]])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text('{"format": ')
    for name, kind, message in [
        ("storis.acts", RequestError, f"no store at {tmp_path}/storis.acts; nearest: stories.acts"),
        ("empty", RequestError, f"{tmp_path}/empty is no store: it has no manifest.json"),
        ("file", RequestError, f"{tmp_path}/file is a file; a store is a directory with a manifest.json"),
        ("no/x.acts", RequestError, f"no store at {tmp_path}/no/x.acts: the folder {tmp_path}/no does not exist"),
        (
            "broken",
            DataError,
            f"{tmp_path}/broken/manifest.json is not JSON (Expecting value: line 1 column 12 (char 11)); "
            "run workbench verify on the store",
        ),
    ]:
        with pytest.raises(kind) as refused:
            read_manifest(tmp_path / name)
        assert str(refused.value) == message


def test_the_manifest_has_no_path_of_this_machine(tmp_path):
    text = contents(write_store(tmp_path / "x.acts", [[3, 2]]))["manifest.json"].decode()
    assert str(tmp_path) not in text
    assert not re.search(r"20\d\d-\d\d", text)
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert text == to_json(json.loads(text))
    assert next(line for line in text.splitlines() if '"00000"' in line).endswith('"rows": 5, "sequences": 2}')


def test_a_summary_has_a_line_for_each_fact(tmp_path):
    path = write_store(tmp_path / "x.acts", [[3, 2], [4]])
    assert as_lines(facts("x.acts", read_manifest(path))).splitlines() == [
        "store    x.acts",
        "model    demo (GPT2LMHeadModel, 2 layers, d_model 3)",
        "sites    3: resid_post.0 (3,) float16, resid_post.1 (3,) float32, pattern.1 (2, 4) bfloat16",
        "rows     9 in 2 segments (complete)",
        "texts    1 document, 3 sequences, 1 part",
        "unembed  none: the model has none",
    ]


def test_a_site_without_a_short_form_has_its_name_as_label(tmp_path):
    site = SiteRecord("blocks.0.hook_out", None, ("row", "d_model"), (3,), "float32")
    path = write_store(tmp_path / "x.acts", [[3]], sites=[site])
    assert (path / "segments" / "00000" / "blocks.0.hook_out.safetensors").exists()
    assert np.array_equal(open_store(path)["blocks.0.hook_out"][:], values(site, 0, 3))


# ---- imports ----------------------------------------------------------------------------------------------


def test_only_the_reader_imports_torch():
    code = "import sys, workbench.store.query, workbench.store.verify, workbench.store.writer; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "transformer_lens", "plotly"} & set(loaded)
