"""Prompts for the future on a small random Llama: against Hugging Face by hand, and laws that hold for any model."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from refusals import refused

import workbench as wb
from workbench.analysis.future import future_rows
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes.future_prompts import LEARNED, REGIMES, FuturePrompts
from workbench.results.bootstrap import clustered_interval
from workbench.store.lost_values import finite_rows
from workbench.testing import ProbeContract

FEW = FuturePrompts(prompts=("the day was", "Once upon a"), training_rows=40, row_limit=20, epochs=1, prompt_tokens=3)
BRIEF = replace(FEW, prompts=(), training_rows=24, row_limit=8)
TEXTS = [
    f"{a} the {b} day was to {a} and time {b} upon a little Monday" for a in ("Tom", "Ann", "Lily") for b in "abcdefg"
]


@pytest.fixture(scope="module")
def llama(tiny_models, tiny_tokenizer):
    return Model(copy.deepcopy(tiny_models["llama"]), tiny_tokenizer, "tiny")


@pytest.fixture(scope="module")
def recorded(llama, tmp_path_factory):
    return wb.record(llama, TEXTS, sites=["resid_pre", "resid_post"], out=tmp_path_factory.mktemp("prompts") / "x.acts")


@pytest.fixture(scope="module")
def model(llama):
    return llama


@pytest.fixture(scope="module")
def store(recorded):
    return recorded


@pytest.fixture(scope="module")
def result(recorded, llama):
    return FEW.run(recorded, model=llama)


@pytest.fixture(scope="module")
def brief(recorded, llama):
    return BRIEF.run(recorded, model=llama)


class TestContract(ProbeContract):
    probe = FuturePrompts
    settings = {"prompts": ("to",), "training_rows": 20, "row_limit": 6, "epochs": 1, "prompt_tokens": 2}  # noqa: RUF012

    @pytest.fixture
    def store(self, recorded):
        return recorded

    @pytest.fixture
    def model(self, llama):
        return llama


def split_rows(store):
    shares = {"held_out": 0.25, "validation": 0.1, "seed": 0}
    return future_rows(store, 4, None, **shares, check=partial(finite_rows, store, []))[0]


def chosen_rows(store, part="test", limit=20):
    """The rows that are asked, chosen again."""
    rows = split_rows(store).at(part, 3)
    return rows[np.linspace(0, len(rows) - 1, min(limit, len(rows))).round().astype(int)]


def predicted_in_text(store, model):
    """The model's top token after every row, from plain forward passes over each text."""
    predicted = np.full(store.rows, -1)
    sequence, ids = (store.tokens[name].to_numpy() for name in ("sequence", "token_id"))
    with torch.no_grad():
        for members in (np.flatnonzero(sequence == s) for s in np.unique(sequence)):
            predicted[members] = (
                model.module(input_ids=torch.from_numpy(ids[members].astype(np.int64))[None]).logits[0].argmax(-1)
            )
    return predicted


def predict_by_hand(store, model, prompt, layer, free_running, zero=False):
    """Top tokens [row, horizon], one row at a time through torch hooks; free-running ones token by token."""
    ids = store.tokens["token_id"].to_numpy().astype(np.int64)
    start = model.tokenizer(prompt)["input_ids"]
    block, predicted = model.module.model.layers[layer], []
    for row in chosen_rows(store):
        state = store[f"resid_post.{layer}"][row : row + 1][0].float() * (0 if zero else 1)

        def change(_module, _args, output, state=state):
            first = output if isinstance(output, torch.Tensor) else output[0]
            first[:, len(start) - 1] = state
            return output

        handle, answers = block.register_forward_hook(change), []
        with torch.no_grad():
            for n in range(4):
                after = answers if free_running else ids[row + 1 : row + 1 + n].tolist()
                answers.append(model.module(input_ids=torch.tensor([[*start, *after]])).logits[0, -1].argmax().item())
        handle.remove()
        predicted.append(answers)
    return np.array(predicted)


@pytest.mark.parametrize("prompt", FEW.prompts)
@pytest.mark.parametrize("regime", list(REGIMES))
@pytest.mark.parametrize("layer", [0, 1])
def test_precision_is_that_of_a_run_by_hand(store, model, result, prompt, regime, layer):
    rows = chosen_rows(store)
    targets = predicted_in_text(store, model)[rows[:, None] + np.arange(4)]
    at = result.data.sel(prompt=prompt, regime=regime, layer=layer)
    for name, zero in (("precision", False), ("zero_precision", True)):
        answers = predict_by_hand(store, model, prompt, layer, regime == "free-running", zero)
        values = at[name].sel(k=1) if name == "precision" else at[name]
        np.testing.assert_allclose(values, (answers == targets).mean(0))
    assert int(result.data["rows"]) == len(rows)


def test_surprisal_is_of_what_was_said(store, model, result):
    rows, answers = chosen_rows(store), predict_by_hand(store, model, FEW.prompts[0], 1, free_running=True)
    sequence, ids = (store.tokens[name].to_numpy() for name in ("sequence", "token_id"))
    total = np.zeros(4)
    with torch.no_grad():
        for row, answer in zip(rows, answers, strict=True):
            members = np.flatnonzero(sequence == sequence[row])
            log = (
                model.module(input_ids=torch.from_numpy(ids[members].astype(np.int64))[None]).logits[0].log_softmax(-1)
            )
            total -= [log[row - members[0] + n, answer[n]].item() for n in range(4)]
    at = result.data["surprisal"].sel(prompt=FEW.prompts[0], regime="free-running", layer=1)
    np.testing.assert_allclose(at, total / len(rows), rtol=1e-4)


def test_the_last_layer_says_the_next_token_whatever_the_prompt(result):
    at = result.data["precision"].sel(layer=2, horizon=0, k=1)
    np.testing.assert_array_equal(at, 1)


def test_the_regimes_differ_only_past_the_next_token(result):
    forced, free = (result.data["precision"].sel(regime=regime) for regime in REGIMES)
    np.testing.assert_array_equal(forced.sel(horizon=0), free.sel(horizon=0))
    assert (forced.sel(horizon=1) != free.sel(horizon=1)).any()


def test_a_state_is_above_zeros_and_above_another_tokens_where_it_decides(result):
    at = result.data.sel(layer=2, horizon=0, regime="free-running").isel(prompt=0)
    assert float(at["precision"][0]) == 1
    assert float(at["zero_precision"]) < 0.5
    assert float(at["shuffled_precision"]) < 0.5
    np.testing.assert_allclose(at["gain"], 1 - at["zero_precision"])
    assert float(at["gain_low"]) <= float(at["gain"]) <= float(at["gain_high"])


def test_a_learned_prompt_comes_nearer_to_the_text_and_the_model_stays_as_it_is(store, model):
    before = model.fingerprint()
    probe = replace(FEW, prompts=(), epochs=8, learning_rate=1.0)
    data = probe.run(store, model=model).data
    assert (data["divergence"] < data["untrained_divergence"] - 0.05).all()
    assert model.fingerprint() == before
    assert all(weight.grad is None and weight.requires_grad for weight in model.module.parameters())
    untrained = replace(probe, epochs=0).run(store, model=model).data
    np.testing.assert_array_equal(untrained["divergence"], data["untrained_divergence"])


def test_divergence_is_that_of_float64(store, model):
    data = replace(FEW, prompts=(), epochs=0, learned_for=2).run(store, model=model).data
    begin = torch.randint(320, (3,), generator=torch.Generator().manual_seed(0))
    ids = store.tokens["token_id"].to_numpy().astype(np.int64)
    sequence, rows = store.tokens["sequence"].to_numpy(), chosen_rows(store, "validation", 10)
    total = 0.0
    for row in rows:
        members = np.flatnonzero(sequence == sequence[row])

        def change(_module, _args, output, row=row):
            first = output if isinstance(output, torch.Tensor) else output[0]
            first[:, 2] = store["resid_post.1"][row : row + 1][0].float()
            return output

        with torch.no_grad():
            text = model.module(input_ids=torch.from_numpy(ids[members])[None]).logits[0, row - members[0] + 2].double()
            handle = model.module.model.layers[1].register_forward_hook(change)
            prompted = model.module(
                input_ids=torch.cat([begin, torch.from_numpy(ids[row + 1 : row + 3])])[None]
            ).logits[0, -1]
            handle.remove()
        p, q = text.softmax(-1), prompted.double().softmax(-1)
        total += (p * (p / q).log()).sum().item()
    assert float(data["untrained_divergence"].sel(layer=1)) == pytest.approx(total / len(rows), rel=1e-3)


def test_bigrams_of_the_last_known_token(store, model, result):
    predicted, ids = predicted_in_text(store, model), store.tokens["token_id"].to_numpy()
    rows, training = chosen_rows(store), split_rows(store)
    for regime, known in (("free-running", 0), ("teacher-forced", 2)):
        fitted = training.at("training", 2)
        right = []
        for row in rows:
            followers = predicted[fitted[ids[fitted + known] == ids[row + known]] + 2]
            counts = np.bincount(followers if len(followers) else predicted[fitted + 2], minlength=320)
            overall = np.bincount(predicted[fitted + 2], minlength=320)
            most = np.flatnonzero(counts == counts.max())
            right.append(most[overall[most].argmax()] == predicted[row + 2])
        assert float(result.data["bigram_precision"].sel(regime=regime, horizon=2)) == pytest.approx(np.mean(right))
        documents = store.tokens["document"].to_numpy()[rows]
        found = [float(result.data[f"bigram_precision_{end}"].sel(regime=regime, horizon=2)) for end in ("low", "high")]
        interval = clustered_interval(np.array(right, float), documents)
        assert found == pytest.approx([interval.low, interval.high], abs=0.05)


def test_the_best_is_chosen_on_validation_tokens(result):
    data = result.data
    for regime in REGIMES:
        at = data.sel(regime=regime, horizon=1)
        chosen = at["validation_precision"].isel(prompt=int(at["best_prompt"])).sel(layer=int(at["best_layer"]))
        assert float(chosen) == float(at["validation_precision"].max())


@pytest.mark.parametrize(
    ("changed", "variable"),
    [
        ({"seed": 1}, "untrained_divergence"),
        ({"prompt_tokens": 5}, "untrained_divergence"),
        ({"learned_for": 0}, "untrained_divergence"),
        ({"epochs": 3}, "divergence"),
        ({"batch": 4}, "divergence"),
        ({"learning_rate": 0.3}, "divergence"),
        ({"training_rows": 20}, "divergence"),
        ({"row_limit": 10}, "rows"),
        ({"held_out": 0.4}, "documents"),
        ({"validation": 0.3}, "untrained_divergence"),
        ({"where": "position > 3"}, "surprisal"),
        ({"site": "resid_pre"}, "surprisal"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_settings_change_the_result(store, model, brief, changed, variable):
    values = replace(BRIEF, **changed).run(store, model=model).data[variable]
    assert not np.array_equal(values.to_numpy(), brief.data[variable].to_numpy())


def test_horizons_top_k_and_prompts(store, model):
    data = replace(FEW, horizons=2, top_k=3, prompts=("to",), prompt_tokens=0).run(store, model=model).data
    assert data.sizes == {"prompt": 1, "regime": 2, "layer": 3, "horizon": 2, "k": 3}
    assert "divergence" not in data
    assert (data["precision"].diff("k") >= 0).all()


def test_the_same_seed_gives_the_same(store, model, result):
    assert FEW.run(store, model=model).data.identical(result.data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_tokens": -1}, "prompt_tokens must be from 0 to 10000, not -1"),
        ({"row_limit": 1}, "row_limit must be at least 2, not 1"),
        ({"held_out": 1.0}, "held_out must be above 0 and below 1, not 1.0"),
        ({"held_out": 0.6, "validation": 0.4}, "leave no document to train on"),
        ({"prompts": (), "prompt_tokens": 0}, "no prompt is left; give one of them"),
        ({"prompts": ("a", "a")}, "prompts must differ from each other"),
        ({"prompts": (LEARNED,)}, "prompts must differ from each other and from 'learned'"),
        ({"learned_for": 4}, "learned_for must be below horizons 4, not 4"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, not 0.0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    assert message in refused(RequestError, lambda: FuturePrompts(**settings))


def test_requests_that_cannot_be_met(store, model, tmp_path):
    def refusal(probe, of=store, by=model):
        return refused(RequestError, lambda: probe.run(of, model=by))

    assert "top_k is 400 and the vocabulary has 320" in refusal(replace(FEW, top_k=400))
    assert "positions and model 'tiny' has 128; shorten the prompts" in refusal(replace(FEW, prompts=("day " * 200,)))
    assert "give at most" in refusal(replace(FEW, horizons=40))
    nameless = Model(model.module, None, "tiny")
    assert "has no tokenizer for the prompts; give prompts=()" in refusal(FEW, by=nameless)
    bare = wb.record(model, TEXTS[:4], sites=["resid_post.0"], out=tmp_path / "bare.acts")
    assert "record" in refusal(FEW, of=bare)
    changed = copy.deepcopy(model.module)
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    assert "its weights are other ones" in refusal(FEW, by=Model(changed, model.tokenizer, "other"))


def test_result_table_figures_and_headline(result, tmp_path):
    data = result.data
    assert len(result.table) == data["surprisal"].size
    line = result.table.query(
        "prompt == 'learned' and regime == 'teacher-forced' and layer == 1 and horizon == 2"
    ).iloc[0]
    at = data.sel(prompt="learned", regime="teacher-forced", layer=1, horizon=2)
    assert line["precision_1"] == float(at["precision"].sel(k=1))
    assert line["precision_10"] == float(at["precision"].sel(k=10))
    assert line["bigram_precision"] == float(at["bigram_precision"])
    assert FuturePrompts.headline(result).startswith("Top-1 accuracy at t+2: teacher-forced ")
    assert "test documents, fewer than 10" in FuturePrompts.headline(result)
    figures = FuturePrompts.figures(result)
    assert len(figures["precision"].data) == 2 * 4 * (3 * 3 + 2)  # band, curve, zero state; band, bigram
    old = replace(result, data=data.drop_vars(["bigram_precision_low", "bigram_precision_high"]))
    assert len(FuturePrompts.figures(old)["precision"].data) == 2 * 4 * (3 * 3 + 1)
    np.testing.assert_array_equal(
        figures["precision"].data[1].y,
        data["precision"].sel(prompt=FEW.prompts[0], regime="teacher-forced", horizon=0, k=1),
    )
    assert len(figures["ranks"].data) == 8
    result.save(tmp_path)
    assert wb.load_result(tmp_path).data.identical(data)
