"""Interventions in a JSON file: what they become, and what is refused in one line."""

import json

import pytest
import torch
from refusals import refused

import workbench as wb
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.model.record_json import stored_changes
from workbench.recording.change_files import KINDS, read_interventions
from workbench.recording.segment_changes import plan_changes


def read(folder, *records):
    path = folder / "changes.json"
    path.write_text(json.dumps({"records": list(records)}))
    return read_interventions(path)


def test_records_of_a_file_are_those_of_python(tmp_path):
    wb.Direction("resid_post.1", [1.0, 2.0], "two").save(tmp_path / "two.safetensors")
    records = read(
        tmp_path,
        {"kind": "zero", "site": "z.1", "head": [0, 2], "at": {"index": "new", "ids": [5, 4]}},
        {"kind": "add", "site": "resid_post.1", "direction": "two.safetensors", "scale": 2},
        {"kind": "set", "site": "resid_post.0", "value": [0.5, 1], "at": {"start": 1, "stop": None}},
        {"kind": "scale_attention", "layer": 1, "head": None, "key": 0, "factor": 0, "queries": {"span": "subject"}},
        {"kind": "skip_block", "layer": 2},
    )
    expected = (
        wb.Zero("z.1", head=[0, 2], at=wb.Tokens("new", ids={4, 5})),
        wb.Add("resid_post.1", wb.Direction("resid_post.1", [1.0, 2.0], "two"), 2),
        wb.Set("resid_post.0", torch.tensor([0.5, 1]), at=slice(1, None)),
        wb.ScaleAttention(1, None, 0, 0, queries=wb.Tokens(span="subject")),
        wb.SkipBlock(2),
    )
    assert stored_changes(records)[0].digest == stored_changes(expected)[0].digest
    assert len(KINDS) == 15


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"kind": "zeros", "site": "z.1"}, "record 0: kind is 'zeros', which is none; nearest: zero"),
        ({"kind": ["zero"]}, "record 0: kind is ['zero'], which is none"),
        ({"kind": "zero", "place": "z.1"}, "record 0: zero has no field 'place'; it has site, at, head"),
        ({"kind": "patch", "site": "z.1", "at": 0}, "record 0: patch needs the field 'of'"),
        ({"kind": "zero", "site": "z.1", "at": {"index": "last"}}, "record 0: at must be a position"),
        ({"kind": "zero", "site": "z.1", "at": {"word": "a"}}, "record 0: a choice of tokens has no 'word'"),
        ({"kind": "mean", "site": "z.1", "of": "runs/a"}, 'record 0: of must be {"store": PATH, "where": SQL}'),
        ({"kind": "add", "site": "z.1", "direction": "none.safetensors"}, "record 0: no direction at"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, record, message):
    assert message in refused(RequestError, lambda: read(tmp_path, record))


def test_what_does_not_fit_the_model_names_the_record(tmp_path, tiny_models):
    model = Model(tiny_models["llama"], None, "llama")
    for record, message in (
        ({"kind": "zero", "site": "z.9"}, "record 1 (zero): site 'z.9': no such layer"),
        ({"kind": "zero", "site": "z.1", "head": 9}, "record 1 (zero): head 9: z.1 has the heads 0 to 3"),
        (
            {"kind": "set", "site": "resid_post.0", "at": "all", "value": [1, 2]},
            "record 1 (set): value has the shape (2,)",
        ),
        ({"kind": "skip_block", "layer": 9}, "record 1 (skip_block): layer"),
    ):
        records = read(tmp_path, {"kind": "zero", "site": "z.0"}, record)
        assert refused(RequestError, lambda records=records: plan_changes(model, records, ())).startswith(message)


def test_another_structure_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"kind": "zero"}')
    assert 'must be an object with one key, "records"' in refused(RequestError, lambda: read_interventions(path))
