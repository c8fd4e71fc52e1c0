"""Features extracted while a model is recorded: those of the site that was not stored, resumed as the recording is."""

import copy
import errno
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from features_example import RAGGED, TINY
from refusals import refused
from sae_example import encode64, save_sae
from scipy.sparse import csr_array
from warned import warned

import workbench as wb
from workbench.cli.main import main
from workbench.io.errors import DataError, RequestError
from workbench.model.load import Model
from workbench.recording import segments

pytestmark = pytest.mark.usefixtures("one_thread")

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    about = {"hook_name": SITE, "model_name": "tiny-llama"}
    return save_sae(tmp_path_factory.mktemp("saes") / "own", "topk", d_in=32, d_sae=60, **about)


@pytest.fixture(scope="module")
def sae(folder):
    return wb.load_sae(folder, device="cpu")


def record(model, texts, out, **settings):
    return wb.record(model, texts, out=out, **{**TINY, **settings})


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def arrays(features) -> dict[str, list]:
    return {
        f"{order}/{name}": (part.dtype, part.tolist())
        for order in ("by_row", "by_feature")
        for name, part in getattr(features, order).items()
    }


# ---- what is extracted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("site", ["resid_post.1", "z.2"])
@pytest.mark.parametrize("sae_dtype", ["float32", "float16"])
def test_features_equal_those_of_the_recorded_site(dtype, site, sae_dtype, llama, sequences, sae, tmp_path):
    with_features = record(
        llama, sequences, tmp_path / "p", dtype=dtype, sae=sae, sae_site=site, sae_dtype=sae_dtype, sae_force=True
    )
    assert with_features.sites == ()
    assert not [name for name in contents(with_features.path) if name.startswith("segments") and site in name]
    stored = record(llama, sequences, tmp_path / "s", dtype=dtype, sites=[site])
    expected = wb.extract_features(stored, sae, site, dtype=sae_dtype, force=True, show_progress=False)
    features = wb.open_features(with_features.path)
    assert features.path.name == expected.path.name
    assert arrays(features) == arrays(expected)
    assert len(features.by_row["value"]) > 2 * sum(RAGGED)
    assert (features.record.site, features.record.sae) == (expected.record.site, expected.record.sae)
    assert features.record.store_fingerprint == with_features.manifest.fingerprint


def test_features_equal_the_sae_on_the_hidden_states(llama, sequences, sae, folder, tmp_path):
    features = wb.open_features(record(llama, sequences, tmp_path / "p", sae=sae).path)
    module, states = copy.deepcopy(llama.module), []  # transformers leaves hooks in a model that gave hidden states
    for ids in sequences:
        with torch.no_grad():
            states.append(module(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0])
    dense = encode64(folder, torch.cat(states).double().numpy())
    np.testing.assert_allclose(features[:].toarray(), dense, rtol=1e-4, atol=1e-4)


def test_a_temporal_autoencoder_reads_whole_sequences(llama, sequences, tmp_path):
    about = {"hook_name": SITE, "model_name": "tiny-llama"}
    temporal = wb.load_sae(save_sae(tmp_path / "own", "temporal", d_in=32, d_sae=60, **about), device="cpu")
    features = wb.open_features(record(llama, sequences, tmp_path / "p", sae=temporal).path)
    stored = record(llama, sequences, tmp_path / "s", sites=["resid_post.1"])
    assert arrays(features) == arrays(wb.extract_features(stored, temporal, show_progress=False))
    assert len(features.by_row["value"]) > sum(RAGGED)


def test_a_stored_site_gets_features_too(llama, sequences, sae, tmp_path):
    store_with_features = record(llama, sequences, tmp_path / "b", sites=["embed", "resid_post.1"], sae=sae)
    plain = record(llama, sequences, tmp_path / "p", sites=["embed", "resid_post.1"])
    files = contents(store_with_features.path)
    assert {name: part for name, part in files.items() if not name.startswith("features")} == contents(plain.path)
    assert {Path(name).parent.name for name in files if name.startswith("features")} == {"resid_post.1-own"}
    again = wb.extract_features(store_with_features, sae, show_progress=False)
    assert arrays(again) == arrays(wb.open_features(record(llama, sequences, tmp_path / "f", sae=sae).path))


def test_other_sites_are_stored_beside_the_features(llama, sequences, sae, tmp_path):
    store = record(llama, sequences, tmp_path / "p", sites=["pattern.0", "resid_post.2"], sae=sae)
    plain = record(llama, sequences, tmp_path / "q", sites=["pattern.0", "resid_post.2"])
    assert [site.label for site in store.sites] == ["pattern.0", "resid_post.2"]
    for site in store.sites:
        assert torch.equal(store[site.name][:], plain[site.name][:])
    assert arrays(wb.open_features(store.path)) == arrays(
        wb.open_features(record(llama, sequences, tmp_path / "f", sae=sae).path)
    )
    assert not (store.verify()["severity"] == "error").any()


def test_resid_pre_is_resid_post_of_the_block_before(tmp_path, llama, sequences, sae):
    about = {"hook_name": "blocks.2.hook_resid_pre", "model_name": "tiny-llama"}
    sae_of_pre = wb.load_sae(save_sae(tmp_path / "own", "topk", d_in=32, d_sae=60, **about), device="cpu")
    features = wb.open_features(record(llama, sequences, tmp_path / "p", sae=sae_of_pre).path)
    stored = wb.open_features(record(llama, sequences, tmp_path / "s", sites=["resid_post"], sae=sae_of_pre).path)
    expected = wb.open_features(record(llama, sequences, tmp_path / "q", sae=sae).path)
    assert (features.record.site, stored.record.site) == ("blocks.2.hook_resid_pre", SITE)
    assert arrays(features) == arrays(stored) == arrays(expected)


def test_values_beyond_the_recorded_type_are_counted(tiny_models, sequences, sae, tmp_path):
    import copy

    module = copy.deepcopy(tiny_models["llama"])
    with torch.no_grad():
        module.model.embed_tokens.weight[sequences[0][3]] = 1e5
    model = Model(module, None, "tiny-llama")
    with warned("values of resid_post.1 are beyond float16 and stored as ±65504"):
        record(model, sequences, tmp_path / "p", dtype="float16", sae=sae)


# ---- several processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [None, ["resid_post.1"]])
def test_workers_record_and_encode_to_the_bytes_of_one_process(sites, in_this_process, llama, sequences, sae, tmp_path):
    llama.module.save_pretrained(tmp_path / "tiny-llama")
    saved = wb.load_model(tmp_path / "tiny-llama", device="cpu")
    whole = record(saved, sequences, tmp_path / "one", sites=sites, sae=sae)
    by_workers = record(saved, sequences, tmp_path / "two", sites=sites, sae=sae, workers=wb.RayWorkers(2))
    assert contents(by_workers.path) == contents(whole.path)


@pytest.mark.parametrize("sites", [None, ["resid_post.1"]])
def test_the_last_share_of_a_recording_finishes_the_features(sites, llama, sequences, sae, tmp_path):
    whole = record(llama, sequences, tmp_path / "one", sites=sites, sae=sae)
    for rank in (2, 0):
        store = record(llama, sequences, tmp_path / "two", sites=sites, sae=sae, workers=wb.Share(rank, 3))
        assert not store.manifest.complete
        assert not list(store.path.glob("features/[!.]*"))
    record(llama, sequences, tmp_path / "two", sites=sites, sae=sae, workers=wb.Share(1, 3))
    assert contents(tmp_path / "two") == contents(whole.path)
    record(llama, sequences, tmp_path / "two", sites=sites, sae=sae, workers=wb.Share(0, 2))
    assert contents(tmp_path / "two") == contents(whole.path)


def test_features_of_segments_behind_a_gap_are_kept(llama, sequences, sae, tmp_path, monkeypatch):
    whole, captured_rows = record(llama, sequences, tmp_path / "one", sae=sae), []
    assert record(llama, sequences, tmp_path / "two", sae=sae, workers=wb.Share(1, 2)).rows == 0
    capture = segments.capture
    monkeypatch.setattr(segments, "capture", lambda *args: captured_rows.append(int(args[3].sum())) or capture(*args))
    record(llama, sequences, tmp_path / "two", sae=sae)
    assert 0 < sum(captured_rows) < sum(RAGGED)
    assert contents(tmp_path / "two") == contents(whole.path)


# ---- interrupted, resumed, repeated -------------------------------------------------------------------------


def test_stopped_at_every_commit_it_resumes_to_the_same_bytes(llama, sequences, sae, tmp_path, monkeypatch):
    """Before each file or folder gets its name, which is all that can be seen from outside."""
    texts = sequences[:5]  # two segments
    whole = contents(record(llama, texts, tmp_path / "whole", sae=sae).path)
    replace, stops = os.replace, 0

    def stop_after(commits):
        def stopping(source, target):
            if next(commits, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        return stopping

    while True:
        out = tmp_path / str(stops)
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", stop_after(iter(range(stops))))
            try:
                record(llama, texts, out, sae=sae)
                break
            except KeyboardInterrupt:
                stops += 1
        record(llama, texts, out, sae=sae)
        assert contents(out) == whole, stops
    assert stops > 12


def test_a_full_disk_is_reported_in_one_line_and_the_same_call_ends(llama, sequences, sae, tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("workbench.features.while_recording.replace_fingerprint", full)
        text = refused(DataError, lambda: record(llama, sequences, tmp_path / "p", sae=sae))
    assert text.startswith(f"disk full while writing features {tmp_path / 'p' / 'features'}")
    assert text.endswith(": what is committed stays; free space and run the same command to resume")
    whole = record(llama, sequences, tmp_path / "q", sae=sae)
    assert contents(record(llama, sequences, tmp_path / "p", sae=sae).path) == contents(whole.path)


def test_finished_features_are_opened_without_a_forward_pass(llama, sequences, sae, tmp_path, monkeypatch):
    record(llama, sequences, tmp_path / "p", sae=sae)
    before = contents(tmp_path / "p")
    monkeypatch.setattr(segments, "capture", None)
    assert record(llama, sequences, tmp_path / "p", sae=sae).rows == sum(RAGGED)
    assert contents(tmp_path / "p") == before


def interrupted(llama, sequences, out, written: int, monkeypatch, **settings):
    """A recording that stops in the segment of that number; each one is finished before the next one begins."""
    capture, last = segments.capture, []

    def stopping(module, taps, tokens, mask, receive):
        if len(list((Path(out) / "segments").glob("0????"))) == written:
            last.append(1)
            raise KeyboardInterrupt
        capture(module, taps, tokens, mask, receive)

    with monkeypatch.context() as patched:
        patched.setattr(segments, "capture", stopping)
        patched.setattr(segments, "one_behind", lambda: nullcontext(lambda work: work()))
        with pytest.raises(KeyboardInterrupt):
            record(llama, sequences, out, **settings)
    assert last


def test_a_recording_without_segments_does_not_fix_the_texts(llama, sequences, sae, tmp_path, monkeypatch):
    interrupted(llama, sequences, tmp_path / "p", 0, monkeypatch, sae=sae)
    reversed_texts = [ids[::-1] for ids in sequences[:4]]
    assert record(llama, reversed_texts, tmp_path / "p", sae=sae).rows == sum(RAGGED[:4])
    assert arrays(wb.open_features(tmp_path / "p")) == arrays(
        wb.open_features(record(llama, reversed_texts, tmp_path / "q", sae=sae).path)
    )


def test_features_of_an_uncommitted_segment_do_not_fix_the_texts(llama, sequences, sae, tmp_path, monkeypatch):
    from workbench.store import segment

    def stop(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(segment.SegmentWriter, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            record(llama, sequences, tmp_path / "p", sae=sae)
    assert list((tmp_path / "p").glob("features/.*/segments/*.safetensors"))
    reversed_texts = [ids[::-1] for ids in sequences]
    record(llama, reversed_texts, tmp_path / "p", sae=sae)
    assert arrays(wb.open_features(tmp_path / "p")) == arrays(
        wb.open_features(record(llama, reversed_texts, tmp_path / "q", sae=sae).path)
    )


def test_a_recording_resumed_without_its_sae_is_refused(llama, sequences, sae, tmp_path, monkeypatch):
    interrupted(llama, sequences, tmp_path / "p", 2, monkeypatch, sites=["embed"], sae=sae)
    text = refused(RequestError, lambda: record(llama, sequences, tmp_path / "p", sites=["embed"]))
    assert f"features: resid_post.1 by own ({sae.fingerprint()[:12]}) in the store, none requested" in text
    half = record(llama, sequences, tmp_path / "p", sites=["embed"], sae=sae)
    assert half.manifest.complete


def test_another_autoencoder_or_type_is_refused(llama, sequences, sae, tmp_path, monkeypatch):
    interrupted(llama, sequences, tmp_path / "p", 2, monkeypatch, sae=sae)
    about = {"hook_name": SITE, "model_name": "tiny-llama"}
    second = wb.load_sae(save_sae(tmp_path / "own", "topk", d_in=32, d_sae=60, seed=1, **about), device="cpu")
    text = refused(RequestError, lambda: record(llama, sequences, tmp_path / "p", sae=second))
    assert f"features: resid_post.1 by own ({sae.fingerprint()[:12]}) in the store" in text
    text = refused(RequestError, lambda: record(llama, sequences, tmp_path / "p", sae=sae, sae_dtype="float16"))
    assert text.startswith("unfinished features resid_post.1-own are others: dtype is float32, requested is float16")


@pytest.mark.parametrize("segments", [2, None])
def test_rows_recorded_without_features_are_refused(segments, llama, sequences, sae, tmp_path, monkeypatch):
    if segments:
        interrupted(llama, sequences, tmp_path / "p", segments, monkeypatch, sites=["embed"])
    else:
        record(llama, sequences, tmp_path / "p", sites=["embed"])
    rows = wb.open_store(tmp_path / "p").rows
    before = contents(tmp_path / "p")
    text = refused(RequestError, lambda: record(llama, sequences, tmp_path / "p", sites=["embed"], sae=sae))
    assert text == (
        f"{tmp_path / 'p'} has {rows} rows that were recorded without features of SAE 'own' and without resid_post.1; "
        "choose another out"
    )
    assert contents(tmp_path / "p") == before


def test_texts_cannot_be_appended_to_features_alone(llama, sequences, sae, tmp_path):
    record(llama, sequences, tmp_path / "p", sae=sae, append=True)
    before = contents(tmp_path / "p")
    text = refused(RequestError, lambda: record(llama, sequences, tmp_path / "p", sae=sae, append=True))
    assert text == (
        f"append: features of the {sum(RAGGED)} rows before need their resid_post.1 again, which was not stored; "
        "choose another out"
    )
    assert contents(tmp_path / "p") == before


# ---- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("about", "settings", "message"),
    [
        ({"d_in": 8}, {}, "SAE 'x' reads rows of width 8, but resid_post.1 of OUT has 32"),
        ({"model_name": "gpt2"}, {}, "SAE 'x' was trained on the model gpt2, but OUT was recorded from tiny-llama; if"),
        (
            {},
            {"sae_site": "resid_post.2"},
            f"SAE 'x' was trained on {SITE}, but sae_site is blocks.2.hook_resid_post;",
        ),
        ({}, {"sae_site": "resid_post"}, "sae_site 'resid_post' names 3 sites; give one, such as resid_post.3"),
        ({}, {"sae_site": "resid_post.7"}, "site 'resid_post.7': no such layer; the model has layers 0 to 2"),
        ({"hook_name": "blocks.9.hook_resid_pre"}, {}, "site 'blocks.9.hook_resid_pre'"),
        ({"hook_name": None}, {}, "sae_site: the files of SAE 'x' do not record its site; give sae_site="),
        ({}, {"sae_dtype": "int8"}, "dtype must be one of float32, float16, not 'int8'"),
        ({}, {"sites": []}, "sites is empty; name at least one, for example resid_post"),
    ],
)
def test_a_mismatch_is_refused_before_anything_is_written(about, settings, message, llama, sequences, tmp_path):
    config = {"d_in": 32, "hook_name": SITE, "model_name": "tiny-llama", **about}
    misfit = wb.load_sae(save_sae(tmp_path / "x", "topk", **config), device="cpu")
    text = refused(RequestError, lambda: record(llama, sequences, tmp_path / "p", sae=misfit, **settings))
    assert text.replace(str(tmp_path / "p"), "OUT").startswith(message)
    assert not (tmp_path / "p").exists()


def test_settings_of_an_sae_need_one(llama, sequences, tmp_path):
    for settings in ({"sae_site": "resid_post.1"}, {"sae_force": True}):
        text = refused(RequestError, lambda settings=settings: record(llama, sequences, tmp_path / "p", **settings))
        assert text == "sae_site and sae_force are for sae; give it too"
    assert not (tmp_path / "p").exists()


def test_a_row_that_is_not_finite_is_refused_by_number(tiny_models, sequences, sae, tmp_path):
    import copy

    module = copy.deepcopy(tiny_models["llama"])
    token = next(token for token in sequences[4] if not any(token in ids for ids in sequences[:4]))
    with torch.no_grad():
        module.model.embed_tokens.weight[token] = torch.nan
    row = sum(RAGGED[:4]) + sequences[4].index(token)
    text = refused(DataError, lambda: record(Model(module, None, "tiny-llama"), sequences, tmp_path / "p", sae=sae))
    assert text == (
        f"row {row} of resid_post.1 is not finite in the model's forward pass; load the model in another dtype"
    )
    assert wb.open_store(tmp_path / "p").rows <= row


# ---- the command --------------------------------------------------------------------------------------------


def test_the_command_extracts_and_lists(tmp_path, capsys):
    out = str(tmp_path / "d.acts")
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "record",
                "demo",
                "On Monday it began.",
                "--out",
                out,
                "--sae",
                "demo",
                "--sae-dtype",
                "float16",
            ]
        )
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    name = next((Path(out) / "features").iterdir()).name
    assert "sites    none\n" in printed
    assert f"features 1: {name}\n" in printed
    features = wb.open_features(out)
    assert features.record.dtype == "float16"
    assert isinstance(features[:], csr_array)
    feature = int(np.argmax(features.counts))
    with pytest.raises(SystemExit) as ended:
        main(["top", out, str(feature)])
    assert ended.value.code == 0
    assert f"active on {features.counts[feature]} of {len(features)} rows" in capsys.readouterr().out


def test_options_of_an_sae_need_one(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["record", "demo", "text", "--out", str(tmp_path / "x"), "--sae-force"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "workbench: --sae-id, --sae-site and --sae-force need --sae; give it too\n"
