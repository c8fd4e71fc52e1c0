"""Tests of the recorder: the store has what the model computed, for every setting, and each token once."""

import copy

import numpy as np
import pytest
import torch
from warned import warned

import workbench as wb
from workbench.io.errors import DataError, RequestError
from workbench.model.load import Model
from workbench.recording import segments, transfer

RAGGED = [11, 3, 7, 1, 16, 7]


@pytest.fixture(scope="module")
def sequences():
    """Token ids of unequal lengths, one of them a single token."""
    random = np.random.default_rng(0)
    return [random.integers(2, 300, n).tolist() for n in RAGGED]


@pytest.fixture(scope="module")
def llama(tiny_models):
    return Model(tiny_models["llama"], None, "tiny-llama")


def record(model, texts, path, **settings):
    return wb.record(model, texts, **{"out": path, "dtype": "float32", "show_progress": False, **settings})


def hidden_states(module, ids):
    """Plain Hugging Face on one unpadded sequence: outputs of every block but the last, and the logits.

    Of a copy: a model that was once asked for hidden states keeps transformers' hooks for them.
    """
    with torch.no_grad():
        output = copy.deepcopy(module)(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return [state[0] for state in output.hidden_states[1:-1]], output.logits[0]


def hooks(module):
    """Returns the number of hooks; transformers leaves some after hidden states were requested."""
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


# ---- equality -------------------------------------------------------------------------------------------


def test_rows_are_the_models_own_numbers_in_the_order_of_the_texts(tiny_model, sequences, tmp_path):
    store = record(Model(tiny_model, None, "tiny"), sequences, tmp_path / "s", sites=["resid_post", "logits"])
    assert store.rows == sum(RAGGED)
    assert store.tokens["token_id"].to_pylist() == [token for ids in sequences for token in ids]
    first = 0
    for ids in sequences:
        rows = slice(first, first + len(ids))
        blocks, logits = hidden_states(tiny_model, ids)
        for layer, expected in enumerate(blocks):
            torch.testing.assert_close(store["resid_post", layer][rows], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(store["logits"][rows], logits, rtol=1e-5, atol=1e-5)
        first += len(ids)


def test_patterns_are_those_of_eager_attention(tiny_models, sequences, tmp_path):
    """Also where keys are shared (GQA), windows slide and scores are capped; keys behind the sequence are 0."""
    for family, module in tiny_models.items():
        store = record(Model(module, None, family), sequences, tmp_path / family, sites=["pattern"], context=20)
        eager = copy.deepcopy(module)
        eager.set_attn_implementation("eager")
        first = 0
        for ids in sequences:
            with torch.no_grad():
                attentions = eager(input_ids=torch.tensor([ids]), output_attentions=True).attentions
            for layer, expected in enumerate(attentions):
                pattern = store["pattern", layer][first : first + len(ids)]
                assert pattern.shape == (len(ids), 4, 20)
                torch.testing.assert_close(pattern[..., : len(ids)], expected[0].transpose(0, 1), rtol=1e-5, atol=1e-6)
                assert not pattern[..., len(ids) :].any()
            first += len(ids)


def test_heads_are_those_the_bridge_shows(tiny_models, sequences, tiny_tokenizer, tmp_path):
    """q, k, v, z, mlp_post and sub-layer outputs against TransformerLens' own hooks, an independent forward pass."""
    kinds = ("hook_q", "hook_k", "hook_v", "hook_z")
    for family in ("gpt2", "llama"):
        model = Model(tiny_models[family], tiny_tokenizer, family)
        store = record(
            model, sequences, tmp_path / family, sites=["q", "k", "v", "z", "mlp_post", "attn_out", "mlp_out"]
        )
        bridge = model.bridge()
        first = 0
        for ids in sequences:
            _, cache = bridge.run_with_cache(torch.tensor([ids]))
            for layer in range(3):
                names = [f"blocks.{layer}.attn.{kind}" for kind in kinds]
                names += [f"blocks.{layer}.{kind}" for kind in ("mlp.hook_post", "hook_attn_out", "hook_mlp_out")]
                for name in names:
                    stored = store[name][first : first + len(ids)]
                    expected = cache[name][0].reshape(stored.shape)
                    torch.testing.assert_close(
                        stored, expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                    )
            first += len(ids)


def test_grouped_query_heads_keep_their_own_count(llama, sequences, tmp_path):
    store = record(llama, sequences, tmp_path / "s", sites=["q.1", "k.1", "v.1", "z.1", "rot_q.1", "rot_k.1"])
    heads = {site.short: site.shape for site in store.sites}
    assert heads == {"q.1": (4, 8), "k.1": (2, 8), "v.1": (2, 8), "z.1": (4, 8), "rot_q.1": (4, 8), "rot_k.1": (2, 8)}
    assert torch.equal(store["q.1"][0], store["rot_q.1"][0])  # position 0 is not rotated
    assert not torch.allclose(store["q.1"][5], store["rot_q.1"][5])


def test_a_real_model_on_real_stories(stories260k, tinystories, tmp_path):
    """Characters lead back to the text, BOS begins every sequence, numbers equal Hugging Face's."""
    import json

    texts = [json.loads(line)["text"] for line in tinystories.read_text().splitlines()[:4]]
    model = wb.load_model(stories260k)
    store = record(model, texts, tmp_path / "s", sites=["resid_post"], context=64)
    tokens = store.tokens.to_pandas()
    assert (tokens[tokens["position"] == 0]["token"] == "<s>").all()
    for _, row in tokens[~tokens["is_special"] & (tokens["token"] == " little")].iterrows():
        assert texts[row["document"]][row["char_start"] : row["char_end"]].strip() == "little"
    ids = tokens[tokens["sequence"] == 1]["token_id"].tolist()
    expected, _ = hidden_states(model.module, ids)
    rows = store.where("sequence = 1")
    torch.testing.assert_close(rows["resid_post", 2], expected[2], rtol=1e-5, atol=1e-5)


# ---- settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "step"), [("float16", 2**-11), ("bfloat16", 2**-8), ("float32", 0.0)])
def test_dtype_is_what_is_stored(dtype, step, llama, sequences, tmp_path):
    exact = record(llama, sequences, tmp_path / "exact")
    store = record(llama, sequences, tmp_path / "s", dtype=dtype)
    stored = store["resid_post", 1][:]
    assert stored.dtype == getattr(torch, dtype)
    assert torch.equal(stored, exact["resid_post", 1][:].to(stored.dtype))
    error = ((stored.float() - exact["resid_post", 1][:]) / exact["resid_post", 1][:]).abs().max()
    assert step / 4 <= error <= step


def test_values_beyond_the_stored_type_are_counted_reported_and_stay_finite(llama, sequences, tmp_path):
    module = copy.deepcopy(llama.module)
    with torch.no_grad():
        module.model.layers[0].mlp.down_proj.weight[5] = 1e6
    exact = record(Model(module, None, "loud"), sequences, tmp_path / "exact")["resid_post", 0][:]
    beyond = exact.abs() > 65504
    assert 0 < beyond.sum() < beyond.numel()
    message = (
        rf"^{beyond.sum():,} values of resid_post.0 are beyond float16 and stored as ±65504; record with dtype='bfl"
    )
    with warned(message), warned("resid_post.1 are beyond"):
        store = record(
            Model(module, None, "loud"), sequences, tmp_path / "s", dtype="float16", sites=["resid_post.0:2"]
        )
    stored = store["resid_post", 0][:]
    assert (stored[beyond].abs() == 65504).all()
    assert torch.equal(stored[~beyond], exact[~beyond].half())
    findings = store.verify()
    counted = findings[
        (findings["finding"] == "overflow") & findings["detail"].str.contains("blocks.0.hook_resid_post")
    ]
    assert counted["detail"].iloc[0].startswith(f"{beyond.sum()} values")
    assert counted["severity"].tolist() == ["note"]


def test_numbers_the_model_got_wrong_are_reported(llama, sequences, tmp_path):
    module = copy.deepcopy(llama.module)
    module.model.embed_tokens.weight.data[sequences[0][2], 3] = torch.nan
    with warned(r"values of resid_post.0 came as NaN or infinite from the model and are stored"):
        store = record(
            Model(module, None, "broken"), sequences, tmp_path / "s", dtype="float16", sites=["resid_post.0"]
        )
    assert torch.isnan(store["resid_post", 0][2]).any()
    assert not torch.isnan(store["resid_post", 0][11:14]).any()  # the next sequence
    findings = store.verify()
    assert findings["finding"].tolist() == ["not finite"]
    assert findings["severity"].tolist() == ["error"]


def test_context_cuts_and_is_bounded_by_the_model(llama, sequences, tmp_path):
    store = record(llama, sequences, tmp_path / "s", context=5)
    assert store.tokens["position"].to_numpy().max() == 4
    assert store.rows == sum(RAGGED)
    with pytest.raises(
        RequestError, match="context 129 is more than model 'tiny-llama' was built for; give 128 tokens"
    ):
        record(llama, sequences, tmp_path / "t", context=129)


def test_max_rows_are_exact(llama, sequences, tmp_path):
    store = record(llama, sequences, tmp_path / "s", max_rows=15)
    assert store.rows == 15
    assert store.tokens["token_id"].to_pylist() == [token for ids in sequences for token in ids][:15]


def test_bos_policies(tiny_models, tiny_tokenizer, tmp_path):
    model = Model(tiny_models["llama"], tiny_tokenizer, "tiny")  # its tokenizer adds none by itself
    texts = ["Once upon a time", "Monday"]
    heads = {
        bos: record(model, texts, tmp_path / bos, bos=bos).tokens.to_pandas().query("position == 0")["token"].tolist()
        for bos in ("model", "always", "never")
    }
    assert heads["always"] == ["<s>", "<s>"]
    assert heads["model"] == heads["never"] != heads["always"]


def test_packed_fills_sequences(llama, sequences, tmp_path):
    store = record(llama, sequences, tmp_path / "s", packed=True, context=16)
    lengths = np.bincount(store.tokens["sequence"].to_numpy())
    assert lengths.tolist() == [16, 16, 13]
    whole = [token for ids in sequences for token in ids]
    expected, _ = hidden_states(llama.module, whole[:16])
    torch.testing.assert_close(store["resid_post", 0][:16], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 16, 40, 4096])
def test_batching_changes_no_number(batch_tokens, llama, sequences, tmp_path):
    store = record(llama, sequences, tmp_path / "s", batch_tokens=batch_tokens, sites=["resid_post", "pattern.1"])
    alone = record(llama, sequences, tmp_path / "alone", batch_tokens=1, sites=["resid_post", "pattern.1"])
    for site in ("resid_post.2", "pattern.1"):
        torch.testing.assert_close(store[site][:], alone[site][:], rtol=1e-5, atol=1e-5)


def test_segment_rows_cut_the_store_not_the_numbers(llama, sequences, tmp_path):
    store = record(llama, sequences, tmp_path / "s", segment_rows=12)
    assert [segment.rows for segment in store.manifest.segments] == [11, 11, 16, 7]
    whole = record(llama, sequences, tmp_path / "whole")
    assert len(whole.manifest.segments) == 1
    torch.testing.assert_close(store["resid_post", 2][:], whole["resid_post", 2][:], rtol=1e-5, atol=1e-5)


def test_text_column_and_metadata_reach_the_token_table(tiny_models, tiny_tokenizer, tmp_path):
    import json

    lines = [{"body": "Once upon a time", "tag": "wiki", "year": 1}, {"body": "Monday", "tag": "news", "year": 2}]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    model = Model(tiny_models["gpt2"], tiny_tokenizer, "tiny")
    store = record(model, file, tmp_path / "s", text_column="body", metadata=["tag"])
    assert store.tokens.column_names[-1] == "tag"
    assert len(store.where("tag = 'news'")) == len(tiny_tokenizer("Monday").input_ids)
    with_metadata = record(model, file, tmp_path / "t", text_column="body")
    assert len(with_metadata.where("year = 1")) == store.rows - len(store.where("tag = 'news'"))


def test_settings_as_one_record_mean_the_same_as_keywords_which_override_it(llama, sequences, tmp_path):
    settings = wb.Recording(sites=("resid_post.1",), dtype="float32", segment_rows=12)
    keywords = record(llama, sequences, tmp_path / "k", sites=["resid_post.1"], segment_rows=12)
    by_record = wb.record(llama, sequences, out=tmp_path / "r", settings=settings, show_progress=False)
    assert by_record.manifest.fingerprint == keywords.manifest.fingerprint
    embed_alone = wb.record(llama, sequences, out=tmp_path / "o", settings=settings, sites="embed", show_progress=False)
    assert [site.short for site in embed_alone.sites] == ["embed"]
    assert len(embed_alone.manifest.segments) == len(by_record.manifest.segments)
    with pytest.raises(TypeError, match="segment_row"):
        wb.record(llama, sequences, out=tmp_path / "x", segment_row=12)


# ---- one recording, many calls --------------------------------------------------------------------------


def test_the_same_request_twice_runs_the_model_once(llama, sequences, tmp_path, monkeypatch):
    record(llama, sequences, tmp_path / "s")
    monkeypatch.setattr(segments, "capture", lambda *_args: pytest.fail("the model ran again"))
    assert record(llama, sequences, tmp_path / "s").rows == sum(RAGGED)


def test_append_adds_texts_behind(llama, sequences, tmp_path):
    record(llama, sequences[:2], tmp_path / "s")
    with pytest.raises(RequestError, match=r"holds other texts: .*append=True"):
        record(llama, sequences[2:], tmp_path / "s")
    store = record(llama, sequences[2:], tmp_path / "s", append=True)
    whole = record(llama, sequences, tmp_path / "whole")
    columns = ["row", "sequence", "position", "document", "token_id"]
    assert store.tokens.select(columns).equals(whole.tokens.select(columns))
    torch.testing.assert_close(store["resid_post", 2][:], whole["resid_post", 2][:], rtol=1e-5, atol=1e-5)
    assert len(store.manifest.parts) == 2


def test_other_settings_model_or_texts_are_refused_with_the_difference(llama, tiny_models, sequences, tmp_path):
    record(llama, sequences, tmp_path / "s", context=16)
    for settings, difference in (
        ({"context": 8}, "context: 16 in the store, 8 requested"),
        ({"dtype": "float16"}, "site resid_post.0: .* float32 in the store, .* float16 requested"),
    ):
        with pytest.raises(RequestError, match=difference):
            record(llama, sequences, tmp_path / "s", **{"context": 16, **settings})
    changed = copy.deepcopy(llama.module)
    changed.lm_head.weight.data[0, 0] += 1
    with pytest.raises(
        RequestError, match=r"the model is not the recorded one: its weights are other ones \(.*\); request the same"
    ):
        record(Model(changed, None, "tiny-llama"), sequences, tmp_path / "s", context=16)
    with pytest.raises(RequestError, match="texts differ from the recorded ones in segment 00000"):
        record(llama, [*sequences[:-1], [7] * RAGGED[-1]], tmp_path / "s", context=16)


def test_the_same_request_gives_the_same_bytes(llama, sequences, tmp_path):
    for name in ("a", "b"):
        record(llama, sequences, tmp_path / name, sites=["resid_post", "pattern.0"], segment_rows=12)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) > 15
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


# ---- requests that cannot be met ------------------------------------------------------------------------


def test_too_little_space_is_refused_before_the_first_batch(llama, sequences, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10, 10, 1000))
    monkeypatch.setattr(segments, "capture", lambda *_args: pytest.fail("a batch ran"))
    with pytest.raises(RequestError, match=r"needs .* and its disk has 1000 B free; record fewer"):
        record(llama, sequences, tmp_path / "s")


def test_a_request_that_came_to_nothing_does_not_bind_the_next(llama, sequences, tmp_path):
    with pytest.raises(RequestError, match="document 1: token id 9999 is not one of the model's"):
        record(llama, [sequences[0], [9999]], tmp_path / "s", context=16)
    assert record(llama, sequences, tmp_path / "s", context=8).rows == sum(RAGGED)


def test_an_unknown_site_is_refused_before_the_store_is_made(llama, sequences, tmp_path):
    with pytest.raises(RequestError, match="site 'resid_pst' is unknown; nearest: resid_post"):
        record(llama, sequences, tmp_path / "s", sites=["resid_pst"])
    assert not (tmp_path / "s").exists()


def test_texts_without_tokenizer_are_refused(llama, tmp_path):
    with pytest.raises(RequestError, match=r"no tokenizer; pass tokenizer= or"):
        record(llama, ["Once upon a time"], tmp_path / "s")


def test_a_folder_of_somebody_elses_is_left_alone(llama, sequences, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RequestError, match="is not empty and not a store"):
        record(llama, sequences, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_model_that_fails_midway_leaves_what_was_committed_and_no_hooks(llama, sequences, tmp_path, monkeypatch):
    calls = []
    whole = segments.capture
    before = hooks(llama.module)

    def failing(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise DataError("out of memory")
        whole(*arguments)

    monkeypatch.setattr(segments, "capture", failing)
    with pytest.raises(DataError, match="out of memory"):
        record(llama, sequences, tmp_path / "s", segment_rows=12, batch_tokens=12)
    assert 0 < wb.open_store(tmp_path / "s").rows < sum(RAGGED)
    assert hooks(llama.module) == before
    monkeypatch.undo()
    assert record(llama, sequences, tmp_path / "s", segment_rows=12, batch_tokens=12).rows == sum(RAGGED)
    assert not list((tmp_path / "s").rglob("*.partial"))


def test_a_slow_disk_holds_the_model_back(llama, sequences, tmp_path, monkeypatch):
    """The queue of batches to write is bounded: the model is never further ahead than the backlog."""
    import threading

    waiting, most, gate = [0], [0], threading.Lock()
    submit_to_host, write = segments.to_host, segments._write

    def counted(*arguments):
        with gate:
            waiting[0] += 1
            most[0] = max(most[0], waiting[0])
        return submit_to_host(*arguments)

    def slow(*arguments):
        threading.Event().wait(0.01)
        write(*arguments)
        with gate:
            waiting[0] -= 1

    monkeypatch.setattr(segments, "to_host", counted)
    monkeypatch.setattr(segments, "_write", slow)
    record(llama, sequences * 4, tmp_path / "s", batch_tokens=8)
    assert waiting[0] == 0
    assert most[0] <= transfer._BACKLOG + 2


def test_recording_warns_of_nothing(llama, sequences, tmp_path):
    record(llama, sequences, tmp_path / "s")  # a warning, logged or raised, fails the test
