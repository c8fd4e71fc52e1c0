"""The files of a store: what is accepted, what is refused and how, and that a stored version 1 stays readable."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from store_example import BRAIN, HALF, MODEL, SINGLE, as_numpy, contents, token_table, values, write_store

from workbench.io.errors import DataError, RequestError
from workbench.io.parse import to_json
from workbench.io.tensors import TensorFile, map_rows, read_header
from workbench.store.manifest import SiteRecord, describe, read_manifest
from workbench.store.reader import open_store
from workbench.store.token_table import check_tokens, encode_tokens

VERSION_1 = Path(__file__).parents[1] / "data" / "store-v1"


def test_a_store_of_version_1_stays_readable_for_ever():
    """The files were written once, with version 1; never write them again to make this pass."""
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
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(colour="red"), "manifest.json: unknown key 'colour'; expected model, sites, recording"),
        (lambda m: m.pop("sites"), "manifest.json: the key 'sites' is missing; found environment, format, model"),
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
        (lambda m: m.update(version="1"), "version is '1', expected 1"),
    ],
)
def test_a_manifest_that_is_not_as_declared_is_refused_by_file_and_key(tmp_path, edit, message):
    path = edited(write_store(tmp_path / "x.acts", [[3, 2]]), edit)
    with pytest.raises(DataError, match=re.escape(message)) as refused:
        read_manifest(path)
    assert str(refused.value).startswith(str(path / "manifest.json"))
    assert "\n" not in str(refused.value)


def test_a_newer_version_asks_for_an_upgrade(tmp_path):
    path = edited(write_store(tmp_path / "x.acts", [[3]]), lambda m: m.update(version=2, more="fields"))
    expected = f"{path}/manifest.json has format version 2 and this workbench reads up to 1; upgrade the workbench"
    with pytest.raises(RequestError) as refused:
        read_manifest(path)
    assert str(refused.value) == expected


def test_what_is_no_store_is_told_apart(tmp_path):
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


def test_the_manifest_says_where_nothing_of_this_machine(tmp_path):
    text = contents(write_store(tmp_path / "x.acts", [[3, 2]]))["manifest.json"].decode()
    assert str(tmp_path) not in text
    assert not re.search(r"20\d\d-\d\d", text)
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert text == to_json(json.loads(text))
    assert next(line for line in text.splitlines() if '"00000"' in line).endswith('"rows": 5, "sequences": 2}')


def test_describe_is_a_line_per_fact(tmp_path):
    path = write_store(tmp_path / "x.acts", [[3, 2], [4]])
    assert describe("x.acts", read_manifest(path)).splitlines() == [
        "store    x.acts",
        "model    demo (GPT2LMHeadModel, 2 layers, d_model 3)",
        "sites    3: resid_post.0 (3,) float16, resid_post.1 (3,) float32, pattern.1 (2, 4) bfloat16",
        "rows     9 in 2 segments (complete)",
        "texts    1 documents, 3 sequences, 1 part",
        "unembed  none: the model has none",
    ]


def test_a_site_without_a_short_form_goes_by_its_name(tmp_path):
    site = SiteRecord("blocks.0.hook_out", None, ("row", "d_model"), (3,), "float32")
    path = write_store(tmp_path / "x.acts", [[3]], sites=[site])
    assert (path / "segments" / "00000" / "blocks.0.hook_out.safetensors").exists()
    assert np.array_equal(open_store(path)["blocks.0.hook_out"][:], values(site, 0, 3))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=20,
    )
)
def test_json_says_what_it_was_given(value):
    assert json.loads(to_json({"value": value, "": [value]})) == {"value": value, "": [value]}


# ---- tensor files -----------------------------------------------------------------------------------------


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


# ---- token tables -----------------------------------------------------------------------------------------


def test_token_tables_open_with_pandas(tmp_path):
    path = write_store(tmp_path / "x.acts", [[3, 2]])
    frame = pd.read_parquet(path / "segments" / "00000" / "tokens.parquet")
    assert frame["token"].tolist() == [" Monday", "日", "%", "", "🙂"]
    assert frame["row"].tolist() == [0, 1, 2, 3, 4]
    assert frame["char_start"].isna().tolist() == [True, False, False, True, False]


def test_token_tables_are_small_and_their_bytes_repeat():
    table = token_table([256] * 200)
    assert encode_tokens(table) == encode_tokens(token_table([256] * 200))
    assert len(encode_tokens(table)) < 2 * table.num_rows
    assert pq.read_table(pa.BufferReader(encode_tokens(table))).equals(table)


def test_a_table_with_other_columns_is_refused():
    table = token_table([3])
    check_tokens(table, 3, 0, None)
    with pytest.raises(RequestError, match=r"the token table's columns are row int64, .*; the store's are row int64"):
        check_tokens(table.drop_columns("source"), 3, 0, table.schema)
    with pytest.raises(RequestError, match="the token table's columns are sequence int64"):
        check_tokens(table.drop_columns("row"), 3, 0, None)
    for rows, first in [(4, 0), (3, 1)]:
        with pytest.raises(RequestError, match=f"must count its rows {first} to {first + rows - 1} without a gap"):
            check_tokens(table, rows, first, None)


# ---- imports ----------------------------------------------------------------------------------------------


def test_everything_but_the_reader_answers_without_torch():
    code = "import sys, workbench.store.query, workbench.store.verify, workbench.store.writer; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "transformer_lens", "plotly"} & set(loaded)
