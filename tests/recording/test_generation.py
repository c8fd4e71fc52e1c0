"""Generation against plain Hugging Face, and its recording against the states of every step."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch
from command_line import run

import workbench as wb
from workbench.experiments.architectures.tiny import tiny_model

PROMPTS = ["One day, Tom", "On Monday the red dog ran to", "Hi"]


@pytest.fixture(scope="module")
def model():
    return wb.load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def generated_texts(model):
    return wb.generate(model, PROMPTS, 8, show_progress=False)


def test_recorded_states_are_those_of_every_step(model, generated_texts, tmp_path):
    store = wb.record(
        model, generated_texts, sites=["resid_post.1"], out=tmp_path / "x", dtype="float32", show_progress=False
    )
    for number, text in enumerate(generated_texts.all):
        prompt = torch.tensor([text.token_ids[: text.prompt_tokens]])
        plain = model.module.generate(
            prompt, max_new_tokens=8, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
        )
        new = len(text.token_ids) - text.prompt_tokens
        assert plain.sequences[0].tolist()[: len(text.token_ids)] == list(text.token_ids)
        steps = torch.cat([step[2][0] for step in plain.hidden_states])[: text.prompt_tokens + new - 1]
        recorded = store.where("prompt = ?", [number])["resid_post", 1][: len(steps)]
        torch.testing.assert_close(recorded, steps, atol=1e-5, rtol=1e-5)


def test_columns_mark_prompt_and_steps_and_the_manifest_has_the_settings(model, generated_texts, tmp_path):
    store = wb.record(model, generated_texts, sites=["resid_post.1"], out=tmp_path / "x", show_progress=False)
    table = store.tokens.to_pandas()
    for number, text in enumerate(generated_texts.all):
        part = table[table["prompt"] == number]
        assert part["token_id"].tolist() == list(text.token_ids)
        assert part["generated"].tolist() == [place >= text.prompt_tokens for place in range(len(part))]
        assert part["step"].dropna().tolist() == list(range(len(part) - text.prompt_tokens))
        assert part["sample"].tolist() == [0] * len(part)
    settings = {"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0, "top_k": None, "seed": 0}
    assert store.manifest.parts[0].generation == (settings,)
    assert wb.open_store(store.path).manifest.parts[0].generation == (settings,)


def test_a_saved_file_records_the_same(model, generated_texts, tmp_path):
    path = generated_texts.save(tmp_path / "made.jsonl")
    assert len(path.read_text().splitlines()) == len(generated_texts) == 3
    stores = [
        wb.record(model, texts, sites=["resid_post.1"], out=tmp_path / name, show_progress=False)
        for name, texts in (("a", generated_texts), ("b", path))
    ]
    assert stores[0].tokens.equals(stores[1].tokens)
    with pytest.raises(wb.RequestError, match=r"must end in \.jsonl"):
        generated_texts.save(tmp_path / "made.txt")


def test_a_generation_is_described_in_a_line(generated_texts):
    assert repr(generated_texts) == (
        "3 continuations of 3 prompts by demo, "
        "Sampling(max_new_tokens=8, temperature=0.0, top_p=1.0, top_k=None, seed=0)"
    )


def test_padding_changes_no_token(model, generated_texts):
    alone = wb.generate(model, PROMPTS, 8, batch_size=1, show_progress=False)
    assert alone.all == generated_texts.all


def test_a_state_that_mixes_sequences_gets_one_prompt_at_a_time():
    model = wb.load_model(tiny_model("rwkv"))
    prompts = [[9, 10, 11, 12, 13], [20, 21], [30, 31, 32, 33, 34]]
    together, alone = (wb.generate(model, prompts, 4, batch_size=size, show_progress=False).all for size in (3, 1))
    assert together == alone
    assert not model.generates_in_batches


def test_the_trial_of_batches_is_not_changed_by_an_intervention(model):
    again = wb.load_model(model.module)
    with pytest.raises(wb.DataError, match="no forward pass reached it"), wb.intervene(again, wb.Zero("mlp_out.0")):
        assert again.generates_in_batches


def test_the_token_that_ends_a_text_is_the_last_one(model, generated_texts, monkeypatch):
    text = generated_texts.all[1]
    end = text.token_ids[text.prompt_tokens + 1]
    monkeypatch.setattr(model.module.generation_config, "eos_token_id", [end, 5])
    first, second, _ = wb.generate(model, PROMPTS, 8, show_progress=False).all
    assert second.token_ids == text.token_ids[: text.prompt_tokens + 2]
    assert first.token_ids[: len(first.token_ids)] == generated_texts.all[0].token_ids[: len(first.token_ids)]


def test_the_models_own_generation_settings_are_not_applied(model, generated_texts, monkeypatch):
    model_settings = model.module.generation_config
    for name, value in {
        "repetition_penalty": 9.0,
        "suppress_tokens": [generated_texts.all[0].token_ids[-1]],
        "num_beams": 3,
    }.items():
        monkeypatch.setattr(model_settings, name, value)
    assert wb.generate(model, PROMPTS, 8, show_progress=False).all == generated_texts.all
    assert model.module.generation_config is model_settings
    assert model_settings.repetition_penalty == 9.0


def test_seeds_samples_and_sampling_settings(model):
    def draw(**settings):
        return wb.generate(model, ["Hi"], 6, samples=3, show_progress=False, **{"temperature": 1.5} | settings)

    state = torch.random.get_rng_state()
    first = draw(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert draw(seed=1).all == first.all
    assert draw(seed=2).all != first.all
    assert [text.sample for text in first.all] == [0, 1, 2]
    assert len({text.token_ids for text in first.all}) > 1
    greedy = wb.generate(model, ["Hi"], 6, show_progress=False).all[0].token_ids
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert {text.token_ids for text in draw(seed=1, **narrow).all} == {greedy}


def test_an_intervention_acts_on_what_is_generated(model, generated_texts):
    direction = 3 * torch.sign(torch.randn(256, generator=torch.Generator().manual_seed(0)))
    with wb.intervene(model, wb.Add("resid_post.1", direction, at="new")):
        changed = wb.generate(model, PROMPTS, 8, batch_size=1, show_progress=False)
    for plain, steered in zip(generated_texts.all, changed.all, strict=True):
        assert plain.token_ids[: plain.prompt_tokens + 1] == steered.token_ids[: plain.prompt_tokens + 1]
    assert changed.all != generated_texts.all


@pytest.mark.parametrize("at", ["new", -1, [1, -2], slice(-2, None)])
def test_a_recording_changes_the_tokens_that_the_generation_changed(model, at):
    push = torch.randn(256, generator=torch.Generator().manual_seed(0))
    change = wb.Add("resid_post.0", push, at=at)
    with wb.intervene(model, change):
        made = wb.generate(model, PROMPTS, 6, show_progress=False)
    sites = {"sites": ["resid_post.1"], "dtype": "float32", "show_progress": False}
    store = wb.record(model, made, interventions=[change], **sites)
    for number, text in enumerate(made.all):
        prompt, length = text.prompt_tokens, len(text.token_ids)
        chosen = {
            "new": range(prompt, length),
            "-1": [prompt - 1],
            "[1, -2]": [1, prompt - 2],
            "slice(-2, None, None)": range(prompt - 2, length),
        }[str(at)]
        pushed = torch.zeros(length, 1)
        pushed[list(chosen)] = 1
        block = model.module.model.layers[0]
        hook = block.register_forward_hook(lambda _module, _args, out, pushed=pushed: out + pushed * push)
        with hook, torch.no_grad():
            states = model.module(torch.tensor([text.token_ids]), output_hidden_states=True).hidden_states[2][0]
        rows = store.where("prompt = ?", [number])["resid_post", 1]
        torch.testing.assert_close(rows, states, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.inf}, "temperature must be at least 0 and finite"),
        ({"temperature": 1e-40}, "temperature is 1e-40; give 0 for the most probable token"),
        ({"seed": 1 << 63}, "seed must be"),
        ({"samples": 2}, "temperature 0 gives the same each time"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 10**6}, "context of model 'demo'"),
    ],
)
def test_wrong_settings_are_refused_in_a_line(model, settings, message):
    with pytest.raises(wb.RequestError, match=message):
        wb.generate(model, ["Hi"], **settings)


def test_prompts_without_room_or_token_are_refused(model):
    limit = model.context_limit
    with pytest.raises(wb.RequestError, match="leaves room for 5 before"):
        wb.generate(model, [[1] * 10], limit - 5, show_progress=False)
    with pytest.raises(
        wb.RequestError, match=r"^prompts: 2 prompts without a token, the first is prompt 1; leave them"
    ):
        wb.generate(model, ["Hi", "", ""], 5, bos="never", show_progress=False)
    for prompts, message in (
        ([], "^prompts is an empty list"),
        ("no.txt", "^prompts: no file"),
        (iter([]), "^prompts: "),
    ):
        with pytest.raises(wb.RequestError, match=message):
            wb.generate(model, prompts, 5, show_progress=False)


def test_columns_of_the_prompts_are_columns_of_the_recording(model, tmp_path):
    frame = pd.DataFrame({"text": PROMPTS[:2], "label": ["boy", "dog"], "n": [1.5, 2.0]})
    made = wb.generate(model, frame, 2, temperature=1.0, samples=2, show_progress=False)
    for source in (made, made.save(tmp_path / "made.jsonl")):
        table = wb.record(model, source, sites=["resid_post.1"], show_progress=False).tokens.to_pandas()
        for number, document in table.groupby("document"):
            prompt, sample = divmod(number, 2)
            expected = (prompt, sample, *(("boy", 1.5), ("dog", 2.0))[prompt])
            assert set(document[["prompt", "sample", "label", "n"]].itertuples(index=False, name=None)) == {expected}
    again = wb.generate(model, made, 1, show_progress=False)  # continues the continuations
    assert [text.prompt_tokens for text in again.all] == [len(text.token_ids) for text in made.all]
    assert wb.record(model, again, sites=["resid_post.1"], show_progress=False).tokens["label"][-1].as_py() == "dog"
    both = wb.generate(model, [{"text": "Hi", "messages": "no chat", "label": "x"}], 2, show_progress=False)
    table = wb.record(model, both, sites=["resid_post.1"], show_progress=False).tokens
    assert table["token_id"].to_pylist() == list(both.all[0].token_ids)
    assert {"label", "messages", "prompt"} & {*table.column_names} == {"label", "prompt"}
    with pytest.raises(
        wb.RequestError, match="prompts: a column cannot be called 'step', which recordings of them add"
    ):
        wb.generate(model, frame.rename(columns={"n": "step"}), 2, show_progress=False)


def test_the_command_writes_what_record_reads(tmp_path):
    path = tmp_path / "made.jsonl"
    code, out, _ = run("generate", "demo", "One day, Tom", "--max-new-tokens", 4, "--out", path)
    assert code == 0
    assert "1 continuation in" in out
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["generation"]["max_new_tokens"] == 4
