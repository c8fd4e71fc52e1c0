"""Recordings of a changed model: the bytes of hooks made by hand, identity, resumption, comparison and provenance."""

import shutil

import numpy as np
import pytest
import torch
from refusals import refused
from warned import warned

import workbench as wb
from workbench.io.errors import DataError, RequestError
from workbench.model.load import Model
from workbench.recording import segments
from workbench.store.manifest import read_manifest, write_manifest


def _span(start, end):
    return {"start": start, "end": end, "value": "animal"}


TEXTS = [
    {"text": "the cat saw a dog on Monday", "spans": {"animal": [_span(4, 7), _span(14, 17)]}},
    {"text": "a bird sang on Tuesday and again", "spans": {"animal": [_span(2, 6)]}},
    {"text": "no one was there"},
]
VALUE = torch.randn(32, generator=torch.Generator().manual_seed(6))
SITES = ["resid_post", "z.2"]


@pytest.fixture(scope="module")
def model(tiny_models, tiny_tokenizer):
    return Model(tiny_models["llama"], tiny_tokenizer, "llama")


def record(model, out, *records, **settings):
    settings = {"sites": SITES, "dtype": "float32", "segment_rows": 20} | settings
    return wb.record(model, TEXTS, out=out, interventions=records, show_progress=False, **settings)


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    return record(model, tmp_path_factory.mktemp("plain") / "plain.acts")


def files(store):
    return {path.relative_to(store.path): path.read_bytes() for path in store.path.rglob("*.safetensors")}


def test_a_changed_store_has_the_bytes_of_hooks_made_by_hand(model, plain, tmp_path):
    changed = record(model, tmp_path / "changed", wb.Zero("z.1", head=2), wb.Add("resid_post.0", VALUE, 0.5, at=3))
    layers, handles = model.module.model.layers, []

    def zero(_module, args):
        z = args[0].clone()
        z[..., 16:24] = 0
        return (z,)

    def add(_module, _args, output):
        new = output.clone()
        new[:, 3] += 0.5 * VALUE
        return new

    handles += [layers[1].self_attn.o_proj.register_forward_pre_hook(zero), layers[0].register_forward_hook(add)]
    try:
        by_hand = record(model, tmp_path / "by-hand")
    finally:
        for handle in handles:
            handle.remove()
    activations = {name: text for name, text in files(changed).items() if name.parts[0] == "segments"}
    assert activations == {name: text for name, text in files(by_hand).items() if name.parts[0] == "segments"}
    assert activations != {name: text for name, text in files(plain).items() if name.parts[0] == "segments"}
    counts = changed.manifest.interventions.ran
    assert [count.rows for count in counts] == [changed.rows, 3]
    assert counts[1].changed == 3
    assert counts[1].relative_change > 0
    assert counts[0].passes > 1
    assert "interventions: 2: zero blocks.1.attn.hook_z head 2, add blocks.0.hook_resid_post" in repr(changed)
    assert changed.verify().empty


def test_the_manifest_holds_canonical_records(model, plain, tmp_path):
    rows = plain.where("position > 1")
    store = record(
        model,
        tmp_path / "s",
        wb.Mean("resid_post.0", rows, at=[2, 1]),
        wb.ScaleAttention(1, 0, 0, 2, queries=slice(2, None)),
    )
    mean, scale = store.manifest.interventions.records
    assert (mean["site"], mean["per"], mean["at"]) == ("blocks.0.hook_resid_post", "site", {"index": [2, 1]})
    assert mean["of"]["store"] == plain.manifest.fingerprint
    (digest,) = (path.stem for path in (store.path / "interventions").iterdir())
    assert mean["of"]["rows"]["array"] == f"sha256:{digest}"
    from safetensors.numpy import load_file

    array = load_file(store.path / "interventions" / f"{digest}.safetensors")["array"]
    assert np.array_equal(array, rows.ids)
    assert scale["kind"] == "scale_attention"
    assert scale["queries"] == {"index": {"start": 2, "stop": None, "step": 1}}
    assert scale["key"] == {"index": [0]}


@pytest.mark.parametrize(
    "records",
    [
        (),
        (wb.Add("resid_post.0", VALUE),),
        (wb.Add("resid_post.0", VALUE, 2.0), wb.Zero("z.1")),
        (wb.Add("resid_post.0", -VALUE, 2.0),),
        (wb.Add("resid_post.0", VALUE, 2.0, at=0),),
        (wb.Add("resid_post.1", VALUE, 2.0),),
        (wb.Add("resid_post.0", VALUE, 2.0, "unit"),),
    ],
)
def test_every_field_is_part_of_the_identity(model, records, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "identity.acts"
    change = wb.Add("resid_post.0", VALUE, 2.0)
    store = record(model, folder, change)
    text = refused(RequestError, lambda: record(model, folder, *records))
    assert "interventions: 1 (" in text
    assert record(model, folder, change).manifest.fingerprint == store.manifest.fingerprint


def test_an_interrupted_recording_resumes_with_the_same_records(model, tmp_path, monkeypatch):
    change = wb.Zero("mlp_out.1", at=wb.Tokens(slice(1, None)))
    whole, written = record(model, tmp_path / "whole", change), []
    write = segments.SegmentRecorder.write

    def stop(self, planned, *arguments, **options):
        if written:
            raise KeyboardInterrupt
        written.append(planned)
        write(self, planned, *arguments, **options)

    monkeypatch.setattr(segments.SegmentRecorder, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        record(model, tmp_path / "part", change)
    monkeypatch.undo()
    part = wb.open_store(tmp_path / "part")
    assert 0 < part.rows < whole.rows
    assert part.manifest.interventions.ran[0].rows < whole.manifest.interventions.ran[0].rows
    assert "interventions" in refused(RequestError, lambda: record(model, tmp_path / "part"))
    resumed = record(model, tmp_path / "part", change)
    assert files(resumed) == files(whole)
    assert resumed.manifest.fingerprint == whole.manifest.fingerprint


def test_spans_and_sql_choose_tokens_of_the_texts(model, plain, tmp_path):
    for name, choice, where in (
        ("span", wb.Tokens(span="animal"), "animal IS NOT NULL"),
        ("sql", wb.Tokens(sql="token = ' on' OR position = 2"), "token = ' on' OR position = 2"),
        (
            "both",
            wb.Tokens(slice(2, None), span="animal", sql="row > 9"),
            "animal IS NOT NULL AND row > 9 AND position > 1",
        ),
    ):
        rows = plain.where(where).ids.copy()
        store = record(model, tmp_path / name, wb.Set("resid_post.1", VALUE, at=choice))
        assert store.manifest.interventions.ran[0].rows == len(rows) > 0
        values = store["resid_post", 1][:]
        assert torch.equal(values[rows], VALUE.expand(len(rows), 32))
        rest = np.setdiff1d(np.arange(store.rows), rows)
        assert not (values[rest] == VALUE).all(1).any()
    for choice, message in (
        (wb.Tokens(span="person"), "no text has a span 'person'; labels: animal"),
        (wb.Tokens(sql="colour = 3"), 'Referenced column "colour" not found'),
    ):
        text = refused(
            RequestError, lambda choice=choice, m=message: record(model, tmp_path / m[:4], wb.Zero("z.1", at=choice))
        )
        assert message in text
        assert text.startswith("record 0 (zero z.1): ")


def test_donors_of_a_store_belong_to_the_recorded_sequences(model, plain, tmp_path):
    store = record(model, tmp_path / "patched", wb.Patch("resid_post.1", plain, at="all"), wb.Zero("resid_post.0"))
    assert torch.equal(store["resid_post", 1][:], plain["resid_post", 1][:])
    torch.testing.assert_close(store["resid_post", 2][:], plain["resid_post", 2][:])
    assert not store["resid_post", 0][:].any()


def test_what_changes_nothing_that_is_recorded_is_refused(model, tmp_path):
    late = refused(DataError, lambda: record(model, tmp_path / "late", wb.Zero("mlp_out.2"), sites=["resid_post.0"]))
    assert late.startswith("record 0 (zero mlp_out.2): it comes after every recorded site")
    never = refused(DataError, lambda: record(model, tmp_path / "never", wb.Zero("mlp_out.1", at=wb.Tokens(ids={1}))))
    assert "record 0 (zero blocks.1.hook_mlp_out) chose no token of the" in never
    inside = refused(RequestError, lambda: record(model, tmp_path / "inside", wb.SkipBlock(2)))
    assert inside.startswith("sites: z.2 is inside of block 2, which is skipped")
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert "is a mask of one batch" in refused(
        RequestError, lambda: record(model, tmp_path / "m", wb.Zero("z.1", at=mask))
    )
    assert not (tmp_path / "inside").exists()


def test_a_comparison_and_provenance_name_the_changes(model, plain, tmp_path):
    from workbench.model.reload import check_recorded
    from workbench.results.result import provenance

    changed = record(model, tmp_path / "changed", wb.SkipBlock(1))
    compared = wb.compare(plain, changed, probes=())
    assert compared.model_difference == "the first store ran without interventions, the second skip_block layer 1"
    table = compared.sites.set_index("site")
    assert table.loc["resid_post.0", "relative_error"] == 0
    assert table.loc["resid_post.1", "relative_error"] > 0
    assert wb.compare(plain, plain, probes=()).model_difference is None
    from workbench.probes import LogitLens

    assert provenance(changed, LogitLens())["model"] == "llama, changed (skip_block layer 1)"
    with warned("was recorded with interventions"):
        check_recorded(changed, model)


def test_attention_that_is_changed_counts_queries_in_each_segment_and_calls_no_row_unchanged(model, tmp_path):
    records = wb.ScaleAttention(1, 0, 0, 0), wb.Zero("z.0", head=0)
    options = {"sites": ["resid_post"], "interventions": records, "segment_rows": 4, "show_progress": False}
    store = wb.record(model, [[5, 6, 7], [8, 9, 10, 11]], out=tmp_path / "x", **options)
    assert len(store.manifest.segments) == 2
    attention, head = wb.open_store(store.path).manifest.interventions.ran
    assert (attention.rows, attention.changed, attention.relative_change) == (7, None, None)
    assert (head.rows, head.changed) == (7, 7)


def test_a_manifest_without_changes_is_read_as_a_plain_run(plain, tmp_path):
    shutil.copytree(plain.path, tmp_path / "copy")
    write_manifest(tmp_path / "copy", read_manifest(tmp_path / "copy"))
    assert wb.open_store(tmp_path / "copy").manifest.interventions is None


def test_a_store_with_interventions_is_not_merged_with_another(model, plain, tmp_path):
    changed = record(model, tmp_path / "changed", wb.Zero("z.1", head=2))
    for stores in ([plain, changed], [changed, plain], [changed, changed.path]):
        message = refused(
            RequestError, lambda stores=stores: wb.merge(dict(zip("ab", stores, strict=True)), tmp_path / "merged")
        )
        assert message.endswith("was recorded with interventions; merge stores of the model as it is")
    assert not (tmp_path / "merged").exists()
