"""Successor heads planted in a small Llama, one kind of head each; every number against what was planted."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
import xarray as xr
from refusals import refused
from successor_example import HEADS, SIZES, TEXTS, WIDTH, llama, recorded

import workbench as wb
from workbench import embedded
from workbench.analysis.successor_tasks import TASKS
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes.successor_heads import SuccessorHeads
from workbench.testing import ProbeContract

PAIRS = sum(SIZES.values()) - len(SIZES)
FEW = SuccessorHeads(permutations=50)


@pytest.fixture(scope="module")
def tokenizer():
    return wb.load_model("demo", device="cpu").tokenizer


@pytest.fixture(scope="module")
def members(tokenizer):
    """Ids of the members with a leading space, by task, as the tokenizer gives them: all that are one token."""
    by_task = {}
    for task, words in TASKS.items():
        encoded = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in words]
        by_task[task] = [ids[0] for ids in encoded if len(ids) == 1]
    return {task: ids for task, ids in by_task.items() if len(ids) >= 3}


@pytest.fixture(scope="module")
def planted(members, tokenizer, tmp_path_factory):
    """(model, store) of `llama`."""
    return recorded(llama(members), tokenizer, tmp_path_factory.mktemp("planted") / "acts")


@pytest.fixture(scope="module")
def result(planted):
    model, store = planted
    return FEW.run(store, model=model)


class TestContract(ProbeContract):
    probe = SuccessorHeads
    settings = {"permutations": 50}  # noqa: RUF012

    @pytest.fixture
    def store(self, planted):
        return planted[1]

    @pytest.fixture
    def model(self, planted):
        return planted[0]


def at(result, name, layer, head, **more):
    return result.data[name].sel(layer=layer, head=head, **more).to_numpy()


# ---- what was planted -------------------------------------------------------------------------------------


def test_the_classes(result, members):
    data = result.data
    assert data["task"].to_numpy().tolist() == list(SIZES) == list(members)
    assert data["members"].to_numpy().tolist() == list(SIZES.values())
    assert data["tokens"].to_numpy().tolist() == [size - 1 for size in SIZES.values()]
    assert data["listed"].to_numpy().tolist() == [200, 20, 10, 7, 12, 26]
    np.testing.assert_allclose(data["chance"], [1 / size for size in SIZES.values()])


def test_a_successor_head_scores_one(result):
    assert (at(result, "score", 0, 0) == 1).all()
    assert (at(result, "macro", 0, 0), at(result, "micro", 0, 0), at(result, "tasks_above", 0, 0)) == (1, 1, 6)
    assert at(result, "copying", 0, 0) == 0
    assert at(result, "p_value", 0, 0) == at(result, "p_family", 0, 0) == pytest.approx(1 / 51)


def test_a_copying_head_scores_nothing(result):
    """Its value head is that of 0.0: the head's own rows of W_O tell them apart."""
    assert not at(result, "score", 0, 1).any()
    assert at(result, "copying", 0, 1) == 1
    assert at(result, "p_value", 0, 1) == 1


@pytest.mark.parametrize("head", [2, 3])
def test_ties_are_failures(result, head):
    """A silent value head gives every token the same logit, and two query heads read it."""
    assert not at(result, "score", 0, head).any()
    assert at(result, "copying", 0, head) == at(result, "null_macro", 0, head) == 0


def test_macro_and_micro_weigh_classes_differently(result):
    score = at(result, "score", 1, 0)
    assert score.tolist() == [0, 0, 0, 1, 1, 0]
    assert at(result, "macro", 1, 0) == pytest.approx(2 / 6)
    assert at(result, "micro", 1, 0) == pytest.approx((6 + 11) / PAIRS)
    assert at(result, "tasks_above", 1, 0) == 2


def test_always_the_same_token_is_right_once_in_its_class(result):
    assert at(result, "score", 1, 1).tolist() == pytest.approx([0, 0, 0, 1 / 6, 0, 0])
    np.testing.assert_allclose(at(result, "null_score", 1, 1), at(result, "score", 1, 1))  # however they are shuffled
    assert at(result, "p_value", 1, 1) == 1


def test_shuffled_successors_give_a_perfect_head_one_hit_on_average(planted):
    """A random permutation has one fixed point on average."""
    model, store = planted
    data = replace(FEW, permutations=600).run(store, model=model).data
    expected = [1 / (size - 1) for size in SIZES.values()]
    np.testing.assert_allclose(data["null_score"].sel(layer=0, head=0), expected, atol=0.03)
    assert float(data["null_macro"].sel(layer=0, head=0)) == pytest.approx(np.mean(expected), abs=0.01)


def test_what_heads_read_is_no_successor(result):
    """Embedding and unembedding are one: without a head a token gives itself."""
    assert not result.data["first_mlp_score"].any()


def test_the_circuit_of_the_best_head(result):
    """All its classes are at 1; the first is shown. The norm scales a unit vector of 96 dimensions by 96 ** 0.5."""
    circuit = result.data["circuit"]
    assert circuit.attrs.items() >= {"task": "numbers", "layer": 0, "head": 0, "units": "logits"}.items()
    np.testing.assert_allclose(circuit, np.sqrt(96) * np.eye(9, k=1), atol=1e-3)
    assert result.data["member_text"].to_numpy().tolist() == [f" {i}" for i in range(1, 10)]


def test_random_weights_have_no_successor_head(planted, tokenizer, tmp_path):
    module = copy.deepcopy(wb.load_model("demo", device="cpu").module)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.02)
    model, store = recorded(module, tokenizer, tmp_path / "acts", ("resid_post.3",), TEXTS[:1])
    data = SuccessorHeads().run(store, model=model).data
    assert data["macro"].size == 32
    assert float(data["p_family"].min()) > 0.01
    assert int(data["tasks_above"].max()) < 4
    assert abs(float(data["macro"].mean()) - float(data["null_macro"].mean())) < 0.03


# ---- settings ---------------------------------------------------------------------------------------------


def run(planted, **settings):
    model, store = planted
    return replace(FEW, **settings).run(store, model=model)


def test_first_mlp(planted):
    """The MLPs here add nothing: heads that read only what the first one adds read nothing."""
    assert run(planted, first_mlp="none").data["macro"].to_numpy()[0, 0] == 1
    assert not run(planted, first_mlp="mlp").data["score"].any()


def test_wrap(planted):
    data = run(planted, wrap=True).data
    assert data["tokens"].to_numpy().tolist() == [8, 11, 9, 7, 12, 25]  # a week has no end, the alphabet has
    assert data["score"].sel(layer=0, head=0).to_numpy().tolist() == pytest.approx([1, 1, 1, 6 / 7, 11 / 12, 1])
    assert (data["score"].sel(layer=1, head=2) == 1).all()


def test_space(planted, tokenizer):
    bare = run(planted, space="without").data
    days = [tokenizer.encode(day, add_special_tokens=False) for day in TASKS["days"]]
    assert all(len(ids) == 1 for ids in days)
    assert int(bare["members"].sel(task="days")) == 7
    assert float(bare["score"].sel(task="days", layer=0, head=0)) == 0  # nothing was planted for them
    both_spellings = run(planted, space="both").data
    assert int(both_spellings["members"].sel(task="days")) == 14
    assert float(both_spellings["chance"].sel(task="days")) == pytest.approx(1 / 7)  # each spelling a class of its own
    assert float(both_spellings["score"].sel(task="days", layer=0, head=0)) == 0.5


def test_case(planted):
    lower = run(planted, case="lower").data
    assert "days" not in lower["task"]
    assert int(lower["members"].sel(task="letters")) == 16
    both_cases = run(planted, case="both").data
    assert int(both_cases["members"].sel(task="letters")) == 26 + 16
    assert int(both_cases["members"].sel(task="ordinals")) == 10  # already lower: one spelling


def test_min_members(planted):
    measured = run(planted, min_members=11)
    assert measured.data["task"].to_numpy().tolist() == ["number words", "months", "letters"]
    reason = (
        "with fewer than 11 single tokens or 5 pairs of them: numbers, ordinals, days, day prefixes, month prefixes"
    )
    assert f"left out, {reason}" in measured.data.attrs["note"]
    assert refused(RequestError, lambda: run(planted, min_members=27)) == (
        "no class has 27 members and 5 pairs of them that are single tokens of this model (space='with', "
        "case='listed'); try space='both', case='both' or lower min_members and min_pairs"
    )


def test_tasks_with_few_pairs_decide_nothing(planted, result):
    """Days have 6 pairs, numbers 8: with 7 or more the former are left out, with 6 none is."""
    assert run(planted, min_pairs=6).data["task"].to_numpy().tolist() == result.data["task"].to_numpy().tolist()
    measured = run(planted, min_pairs=7)
    assert "days" not in measured.data["task"].to_numpy().tolist()
    assert (measured.data["tokens"] >= 7).all()
    assert float(at(measured, "macro", 1, 3)) == 0  # it knows days alone
    assert float(at(result, "macro", 1, 3)) > 0


def test_threshold(planted, result):
    assert at(result, "score", 1, 3, task="days") == pytest.approx(4 / 6)
    assert at(result, "tasks_above", 1, 3) == 1
    assert at(run(planted, threshold=0.7), "tasks_above", 1, 3) == 0
    assert at(run(planted, threshold=0.0), "tasks_above", 1, 1) == 1


def test_permutations(planted):
    assert at(run(planted, permutations=1), "p_value", 0, 0) == 0.5
    few = run(planted, permutations=9)
    assert at(few, "p_value", 0, 0) == 0.1
    assert few.headline().startswith("Not tested, as p cannot be below 0.1; best head ")
    assert "Not tested" not in run(planted, permutations=19).headline()


def test_seed(planted, result):
    assert at(run(planted, seed=1), "null_macro", 0, 0) != at(result, "null_macro", 0, 0)
    assert at(run(planted), "null_macro", 0, 0) == at(result, "null_macro", 0, 0)


def test_row_limit(planted, result):
    assert int(result.data["places"]) > 2
    few = run(planted, row_limit=2)
    assert int(few.data["places"]) == 2
    assert f"the first 2 of {int(result.data['places'])} places in the text" in few.data.attrs["note"]
    none = run(planted, row_limit=0)
    assert "wins" not in none.data
    assert "text left out: row_limit is 0" in none.data.attrs["note"]


def test_model_and_device(planted, result, tokenizer, tmp_path):
    """A store keeps no paths: the directory is given, and its weights are compared."""
    model, store = planted
    message = refused(RequestError, lambda: FEW.run(store))
    assert message.startswith(
        "model is not given, and 'counting', which the store names, cannot be loaded; give model="
    )
    model.module.save_pretrained(tmp_path / "there")
    tokenizer.save_pretrained(tmp_path / "there")
    again = replace(FEW, model=str(tmp_path / "there"), device="cpu").run(store)
    np.testing.assert_array_equal(again.data["score"], result.data["score"])
    message = refused(RequestError, lambda: replace(FEW, model="demo").run(store))
    assert message.startswith("model 'demo' is not the one that the store")
    assert refused(RequestError, lambda: run(planted, device="toaster")).startswith("device 'toaster' cannot be used")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"first_mlp": "residul"}, "first_mlp must be one of residual, mlp, none, not 'residul'"),
        ({"space": "some"}, "space must be one of with, without, both, not 'some'"),
        ({"case": "upper"}, "case must be one of listed, lower, both, not 'upper'"),
        ({"min_members": 1}, "min_members must be at least 2, not 1"),
        ({"permutations": 0}, "permutations must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"row_limit": -1}, "row_limit must be at least 0, not -1"),
        ({"arithmetic": 0.0}, "arithmetic must be above 0 and finite, not 0.0"),
        ({"threshold": 1.0}, "threshold must be at least 0 and below 1, not 1.0"),
    ],
)
def test_settings_that_cannot_be(settings, text):
    assert refused(RequestError, lambda: SuccessorHeads(**settings)) == text


# ---- the text ---------------------------------------------------------------------------------------------


def brute_force(store, members):
    """(row, task, place in it of the token that follows) of every place, one row at a time."""
    tokens = store.tokens.to_pandas()
    places = []
    for row, line in tokens.iloc[:-1].iterrows():
        following = tokens.iloc[row + 1]
        if (line["sequence"], line["document"]) != (following["sequence"], following["document"]):
            continue
        back = tokens.iloc[max(0, row - 7) : row + 1]
        back = back[(back["sequence"] == line["sequence"]) & (back["document"] == line["document"])]
        for task, ids in members.items():
            near = [ids.index(token) for token in back["token_id"] if token in ids][-1:]
            if near and near[0] + 1 < len(ids) and ids[near[0] + 1] == following["token_id"]:
                places.append((row, task, near[0] + 1))
    return places


def test_direct_effects_from_the_recording_by_hand(planted, result, members):
    """z, W_O, the final norm's scale and the tied embedding, in float64."""
    model, store = planted
    places = brute_force(store, members)
    assert int(result.data["places"]) == len(places) >= 5
    unembed = model.module.model.embed_tokens.weight.detach().double().numpy()
    effects = np.zeros((len(places), 2, HEADS))
    for i, (row, task, place) in enumerate(places):
        resid = store["resid_post", 1][[row]][0].double().numpy()
        scale = 1 / np.sqrt((resid**2).mean() + 1e-6)
        for layer in range(2):
            out = model.module.model.layers[layer].self_attn.o_proj.weight.detach().double().numpy()
            z = store["z", layer][[row]][0].double().numpy()
            for head in range(HEADS):
                logits = unembed[members[task]] @ (out[:, head * WIDTH : (head + 1) * WIDTH] @ z[head]) * scale
                effects[i, layer, head] = logits[place] - logits.mean()
    np.testing.assert_allclose(result.data["direct_effect"], effects.mean(0), atol=1e-4)
    flat = np.sort(effects.reshape(len(places), -1), axis=1)
    assert (flat[:, -1] > flat[:, -2] + 1e-3).all()  # no ties, which nobody wins
    best = effects.reshape(len(places), -1).argmax(1)
    shares = np.bincount(best, minlength=2 * HEADS).reshape(2, HEADS) / len(places)
    np.testing.assert_allclose(result.data["wins"], shares)
    assert shares[0, 0] > 0.9  # as it was planted
    assert (result.data["wins_low"] <= result.data["wins"]).all()
    assert (result.data["wins"] <= result.data["wins_high"]).all()
    assert "only" in result.data.attrs["note"]


def test_nobody_wins_a_tie(planted, tokenizer, tmp_path):
    """No head raises the successor most if all heads write 0."""
    module = copy.deepcopy(planted[0].module)
    for block in module.model.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    model, store = recorded(module, tokenizer, tmp_path / "acts")
    data = FEW.run(store, model=model).data
    assert int(data["places"]) > 0
    assert not data["wins"].any()


def test_a_head_that_does_nothing_wins_nothing(result):
    assert at(result, "wins", 0, 2) == at(result, "direct_effect", 0, 2) == 0


@pytest.mark.parametrize(
    ("sites", "reason"),
    [
        (("resid_post.1",), "z.0 was not recorded"),
        (("z",), "resid_post.1 was not recorded"),
        (("z.0", "resid_post.1"), "z.1 was not recorded"),
    ],
)
def test_without_the_sites_the_weights_still_answer(planted, tokenizer, tmp_path, sites, reason):
    model, store = recorded(planted[0], tokenizer, tmp_path / "acts", sites)
    result = FEW.run(store, model=model)
    assert at(result, "macro", 0, 0) == 1
    assert f"text left out: {reason} (record z and resid_post)" in SuccessorHeads.headline(result)
    assert "wins" not in result.data


def test_a_text_without_successors(planted, tokenizer, tmp_path):
    model, store = recorded(planted[0], tokenizer, tmp_path / "acts", texts=["Tom ran and ran."])
    result = FEW.run(store, model=model)
    assert int(result.data["places"]) == 0
    assert result.data.attrs["note"].endswith("text left out: it contains no successor")


# ---- result -----------------------------------------------------------------------------------------------


def test_headlines(result, planted):
    shuffled = float(at(result, "null_macro", 0, 0))
    assert SuccessorHeads.headline(result) == (
        "L0H0 scores above 0.5 in 6 of 6 classes: macro score 1.00, shuffled successors "
        f"{shuffled:.2f}, p 0.02 over 8 heads. In the text L0H0 raises the successor most of all heads at 100 % of 7 "
        "places, 95 % CI [100, 100]. "
        "Note: left out, with fewer than 3 single tokens or 5 pairs of them: day prefixes, month prefixes; "
        "digits left out: 9 numbers are single tokens, 50 are needed; only 7 places in the text."
    )
    none = SuccessorHeads.headline(run(planted, first_mlp="mlp"))
    best = "best head L0H0: macro score 0.00, shuffled successors 0.00, p 1 "
    assert none.startswith(f"No successor head; {best}")


def test_the_table_is_sorted_and_holds_the_arrays(result):
    table = result.table
    assert len(table) == 2 * HEADS
    assert table["macro"].is_monotonic_decreasing
    assert table[["layer", "head"]].to_numpy()[:2].tolist() == [[0, 0], [1, 2]]
    for line in table.to_dict("records"):
        head_data = result.data.sel(layer=line["layer"], head=line["head"])
        for name in ("macro", "micro", "tasks_above", "copying", "null_macro", "p_value", "p_family", "wins"):
            assert line[name] == head_data[name]
        assert [line[f"score {task}"] for task in SIZES] == head_data["score"].to_numpy().tolist()


def test_digits_need_numbers(result):
    assert np.isnan(result.data["mod10_accuracy"]).all()


def test_what_is_saved_comes_back_with_its_figures(result, tmp_path):
    result.data.to_netcdf(tmp_path / "data.nc", engine="scipy")
    data = xr.load_dataset(tmp_path / "data.nc", engine="scipy")
    again = wb.Result("successor-heads", data, result.table, result.provenance)
    assert data["member_text"].to_numpy().tolist() == result.data["member_text"].to_numpy().tolist()
    assert SuccessorHeads.headline(again) == SuccessorHeads.headline(result)
    figures, loaded_figures = (SuccessorHeads.figures(part) for part in (result, again))
    assert list(figures) == ["scores", "tasks", "circuit", "ov"]
    assert [json.loads(figures[name].to_json()) for name in figures] == [
        json.loads(loaded_figures[name].to_json()) for name in figures
    ]


def test_figures_show_the_numbers(result):
    figures = SuccessorHeads.figures(result)
    np.testing.assert_allclose(np.array(figures["scores"].data[0].z, float), result.data["macro"])
    assert figures["scores"].data[0].text[0][0] == "6"
    bars = figures["tasks"].data
    assert bars[0].name == "L0H0"
    np.testing.assert_allclose(np.array(bars[0].y, float), 1)
    np.testing.assert_allclose(np.array(next(b for b in bars if b.name == "chance").y, float), result.data["chance"])
    assert figures["circuit"].data[0].customdata[0][1] == "·1 → ·2"


def test_a_model_without_tokenizer(tiny_models, tmp_path):
    model = Model(tiny_models["llama"], None, "bare")
    store = wb.record(model, [[5, 6, 7]], out=tmp_path / "acts", sites=("resid_post",), show_progress=False)
    assert refused(RequestError, lambda: FEW.run(store, model=model)) == (
        "the recorded model has no tokenizer, so the tokens of the words are unknown"
    )


def test_a_norm_behind_attention_keeps_its_scale_in_the_text(tiny_models, tokenizer, tmp_path, members):
    """Gemma 2's heads together raise the successor by what attention adds, in float64 from the recording."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**{**tiny_models["gemma2"].config.to_dict(), "vocab_size": 1024})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Gemma2ForCausalLM(config).eval()
    module.config.architectures = ["Gemma2ForCausalLM"]
    model, store = recorded(module, tokenizer, tmp_path / "acts", ("z", "attn_out", "resid_post"), TEXTS[:1])
    effects = FEW.run(store, model=model).data["direct_effect"]
    places = brute_force(store, members)
    unembed, gain = (
        weight.detach().double().numpy() for weight in (module.lm_head.weight, 1 + module.model.norm.weight)
    )
    expected = np.zeros((len(places), 3))
    for i, (row, task, place) in enumerate(places):
        read = unembed[members[task]] * gain
        resid = store["resid_post", 2][[row]][0].double().numpy()
        read = (read[place] - read.mean(0)) / np.sqrt((resid**2).mean() + config.rms_norm_eps)
        expected[i] = [read @ store["attn_out", layer][[row]][0].double().numpy() for layer in range(3)]
    np.testing.assert_allclose(effects.sum("head"), expected.mean(0), atol=1e-3, rtol=1e-2)  # stored in float16


def test_the_demo_model_beats_its_shuffles_without_being_a_successor_model(tmp_path):
    """Stories tell of days and numbers in order: the best head is far above chance, and below the threshold."""
    model = wb.load_model("demo", device="cpu")
    with (embedded.MODEL.parent / "corpus.jsonl").open() as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, 3)]
    store = wb.record(model, texts, out=tmp_path / "acts", sites=("resid_post.3",), show_progress=False)
    data = SuccessorHeads().run(store).data  # "demo" is name enough
    assert float(data["p_family"].min()) < 0.01
    assert float(data["macro"].max()) > 2 * float(data["null_macro"].max())
