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
from transformers import LlamaConfig, LlamaForCausalLM

import workbench as wb
from workbench import embedded
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import successor_heads
from workbench.probes.successor_heads import (
    TASKS,
    SuccessorHeads,
    arithmetic,
    digit_features,
    held_out,
    ridge,
    shuffled_null,
    strict_argmax,
    successions,
    wilson,
)

SIZES = {"numbers": 9, "number words": 12, "ordinals": 10, "days": 7, "months": 12, "letters": 26}
PAIRS = sum(SIZES.values()) - len(SIZES)
FEW = SuccessorHeads(permutations=50)
WIDTH, HEADS = 96, 4
TEXTS = [
    "On Monday, Tom ate. On Tuesday, Lily ran.",
    "one two three four.",
    "Tom saw one, two, three.",
    "first, second, third. Monday and Tuesday and Thursday.",
]


@pytest.fixture(scope="module")
def tokenizer():
    return wb.load_model("demo", device="cpu").tokenizer


@pytest.fixture(scope="module")
def members(tokenizer):
    """Ids of the members with a leading space, by task, as the tokenizer gives them: all that are one token."""
    found = {}
    for task, words in TASKS.items():
        encoded = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in words]
        found[task] = [ids[0] for ids in encoded if len(ids) == 1]
    return {task: ids for task, ids in found.items() if len(ids) >= 3}


def shift(members, tasks=tuple(SIZES), by=1, wrap=False, until=None) -> torch.Tensor:
    """[read, written] of a map from each member to the one `by` places on."""
    places = {token: i for i, token in enumerate(token for ids in members.values() for token in ids)}
    matrix = torch.zeros(WIDTH, WIDTH)
    for task in tasks:
        ids = members[task]
        for i, token in enumerate(ids[:until]):
            if wrap or 0 <= i + by < len(ids):
                matrix[places[token], places[ids[(i + by) % len(ids)]]] = 1
    return matrix


def llama(members) -> LlamaForCausalLM:
    """Two blocks of four heads, two to each value head, which all but one see everything. Members are unit vectors,
    other tokens random in dimensions of their own; MLPs do nothing; embedding and unembedding are one.

    0.0 the successor; 0.1 a copy; 0.2 and 0.3 share a value head that is silent;
    1.0 the successor of days and months alone; 1.1 always Tuesday; 1.2 the successor, around the end;
    1.3 that of Monday to Thursday.
    """
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=WIDTH,
        head_dim=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=8,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = LlamaForCausalLM(config).eval()
        embedding = module.model.embed_tokens.weight
        ids = [token for part in members.values() for token in part]
        embedding.zero_()
        embedding[:, len(ids) :] = torch.randn(1024, WIDTH - len(ids))
        embedding[ids] = torch.eye(WIDTH)[: len(ids)]
        tuesday = torch.zeros(WIDTH, WIDTH)
        tuesday[: len(ids), embedding[members["days"][1]].argmax()] = 1
        writes = [
            [shift(members), torch.eye(WIDTH), torch.eye(WIDTH), torch.eye(WIDTH)],
            [
                shift(members, ("days", "months")),
                tuesday,
                shift(members, wrap=True),
                shift(members, ("days",), until=4),
            ],
        ]
        seen = torch.diag((torch.arange(WIDTH) < len(ids)).float())
        for layer, (block, heads) in enumerate(zip(module.model.layers, writes, strict=True)):
            for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.mlp.down_proj):
                part.weight.zero_()
            block.self_attn.v_proj.weight.copy_(torch.cat([seen, seen if layer else 0 * seen]))
            scale = 0.05 if layer else 1.0  # so that in the text 0.0 is the head that does it
            block.self_attn.o_proj.weight.copy_(torch.cat([scale * head.T for head in heads], 1))
    module.config.architectures = ["LlamaForCausalLM"]
    return module


def recorded(module, tokenizer, out, sites=("z", "resid_post.1"), texts=TEXTS):
    """(model, store); a Model that is given keeps the sites it has found."""
    model = module if isinstance(module, Model) else Model(module, tokenizer, "planted")
    return model, wb.record(model, texts, out=out, sites=sites, dtype="float32", bos="never", show_progress=False)


@pytest.fixture(scope="module")
def planted(members, tokenizer, tmp_path_factory):
    """(model, store) of `llama`."""
    return recorded(llama(members), tokenizer, tmp_path_factory.mktemp("planted") / "acts")


@pytest.fixture(scope="module")
def result(planted):
    model, store = planted
    return FEW.run(store, model=model)


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
    assert circuit.attrs == {"task": "numbers", "layer": 0, "head": 0, "units": "logits"}
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
    both = run(planted, space="both").data
    assert int(both["members"].sel(task="days")) == 14
    assert float(both["chance"].sel(task="days")) == pytest.approx(1 / 7)  # each spelling a class of its own
    assert float(both["score"].sel(task="days", layer=0, head=0)) == 0.5


def test_case(planted):
    lower = run(planted, case="lower").data
    assert "days" not in lower["task"]
    assert int(lower["members"].sel(task="letters")) == 16
    both = run(planted, case="both").data
    assert int(both["members"].sel(task="letters")) == 26 + 16
    assert int(both["members"].sel(task="ordinals")) == 10  # already lower: one spelling


def test_min_members(planted):
    found = run(planted, min_members=11)
    assert found.data["task"].to_numpy().tolist() == ["number words", "months", "letters"]
    left = "left out, with fewer than 11 single tokens: numbers, ordinals, days, day prefixes, month prefixes"
    assert left in found.data.attrs["note"]
    assert refused(RequestError, lambda: run(planted, min_members=27)) == (
        "no class has 27 members that are single tokens of this model (space='with', case='listed'); "
        "try space='both', case='both' or a lower min_members"
    )


def test_threshold(planted, result):
    assert at(result, "score", 1, 3, task="days") == pytest.approx(4 / 6)
    assert at(result, "tasks_above", 1, 3) == 1
    assert at(run(planted, threshold=0.7), "tasks_above", 1, 3) == 0
    assert at(run(planted, threshold=0.0), "tasks_above", 1, 1) == 1


def test_permutations(planted):
    assert at(run(planted, permutations=1), "p_value", 0, 0) == 0.5
    assert at(run(planted, permutations=9), "p_value", 0, 0) == 0.1


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
    said = refused(RequestError, lambda: FEW.run(store))
    assert said.startswith("model is not given, and 'planted', which the store names, cannot be loaded; give model=")
    model.module.save_pretrained(tmp_path / "there")
    tokenizer.save_pretrained(tmp_path / "there")
    again = replace(FEW, model=str(tmp_path / "there"), device="cpu").run(store)
    np.testing.assert_array_equal(again.data["score"], result.data["score"])
    said = refused(RequestError, lambda: replace(FEW, model="demo").run(store))
    assert said.startswith("model 'demo' has other weights")
    assert refused(RequestError, lambda: run(planted, device="toaster")).startswith("device 'toaster' cannot be used")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"first_mlp": "residul"}, "first_mlp must be one of residual, mlp, none, not 'residul'; nearest: residual"),
        ({"space": "some"}, "space must be one of with, without, both, not 'some'"),
        ({"case": "upper"}, "case must be one of listed, lower, both, not 'upper'; nearest: lower"),
        ({"min_members": 1}, "min_members must be at least 2, not 1"),
        ({"permutations": 0}, "permutations must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"row_limit": -1}, "row_limit must be at least 0, not -1"),
        ({"arithmetic": 0.0}, "arithmetic must be above 0, not 0.0"),
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
    """Where all heads are silent, none raises the successor most."""
    module = copy.deepcopy(planted[0].module)
    for block in module.model.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    model, store = recorded(module, tokenizer, tmp_path / "acts")
    data = FEW.run(store, model=model).data
    assert int(data["places"]) > 0
    assert not data["wins"].any()


def test_a_head_that_does_nothing_wins_nothing(result):
    assert at(result, "wins", 0, 2) == at(result, "direct_effect", 0, 2) == 0


def chain_of(ids):
    return successor_heads._chain("days", list(enumerate(ids)), len(ids), wrap=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([10, 11], {0: 1}),
        ([10, 5, 11], {1: 1}),
        ([10, 12], {}),  # not the next one
        ([10, 5, 5, 5, 5, 5, 5, 5, 11], {7: 1}),  # 8 back, the row itself counted
        ([10, 5, 5, 5, 5, 5, 5, 5, 5, 11], {}),
        ([10, 12, 11], {}),  # the nearest is what counts
        ([11, 10, 11, 12], {1: 1, 2: 2}),
        ([12, 10], {}),  # the last has none
        ([5, 6], {}),
    ],
)
def test_where_a_successor_follows(text, expected):
    ids = np.array(text)
    following = np.append(ids[1:], -1)
    rows, member = successions(ids, following, np.zeros(len(ids), int), chain_of([10, 11, 12]))
    assert dict(zip(rows.tolist(), member.tolist(), strict=True)) == expected


def test_a_successor_does_not_follow_across_texts():
    ids, following = np.array([10, 5, 11]), np.array([-1, 11, -1])
    rows, _ = successions(ids, following, np.array([0, 1, 1]), chain_of([10, 11]))
    assert rows.tolist() == []


@pytest.mark.parametrize(
    ("sites", "reason"),
    [
        (("resid_post.1",), "z.0 is not recorded"),
        (("z",), "resid_post.1 is not recorded"),
        (("z.0", "resid_post.1"), "z.1 is not recorded"),
    ],
)
def test_without_the_sites_the_weights_still_answer(planted, tokenizer, tmp_path, sites, reason):
    model, store = recorded(planted[0], tokenizer, tmp_path / "acts", sites)
    found = FEW.run(store, model=model)
    assert at(found, "macro", 0, 0) == 1
    assert f"text left out: {reason} (record z and resid_post)" in SuccessorHeads.headline(found)
    assert "wins" not in found.data


def test_a_text_without_successors(planted, tokenizer, tmp_path):
    model, store = recorded(planted[0], tokenizer, tmp_path / "acts", texts=["Tom ran and ran."])
    found = FEW.run(store, model=model)
    assert int(found.data["places"]) == 0
    assert found.data.attrs["note"].endswith("text left out: no successor follows in it")


# ---- parts ------------------------------------------------------------------------------------------------


def test_strict_argmax():
    nan = float("nan")
    logits = torch.tensor([[[1.0, 3, 2], [3, 3, 1], [0, 0, 0], [-5, -4, -3], [nan, nan, nan]]])
    assert strict_argmax(logits).tolist() == [[1, -1, -1, 2, -1]]


def test_the_null_keeps_to_its_class():
    """Two classes of 2: a head that is right in both has a shuffle as good in one of four."""
    pairs = successor_heads._Pairs(
        np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), np.array([1, 2, 1, 2]), np.repeat(np.eye(2), 2, 0)
    )
    found = np.array([[[1, 2, 1, 2], [-1, -1, -1, -1]]])
    score, macro, p, family = shuffled_null(found, pairs, np.array([[1.0, 0.0]]), 1500, 0)
    np.testing.assert_allclose(score[0], [[0.5, 0.5], [0, 0]], atol=0.05)
    np.testing.assert_allclose(macro, [[0.5, 0]], atol=0.03)
    np.testing.assert_allclose(p, [[0.25, 1]], atol=0.03)
    np.testing.assert_allclose(family, [[0.25, 1]], atol=0.03)


def digits(numbers, generator):
    """A feature for each last digit, one for the size, and noise."""
    return np.concatenate(
        [np.eye(10)[numbers % 10], numbers[:, None] / 200, 0.05 * generator.normal(size=(len(numbers), 30))], 1
    )


def test_a_planted_digit_is_read_and_noise_is_not():
    generator = np.random.default_rng(0)
    numbers = np.arange(1, 201)
    x = digits(numbers, generator)
    assert held_out(x, numbers, 0) == 1
    assert (ridge(x, numbers % 10, digits(np.arange(1, 8), generator)) == np.arange(1, 8)).all()
    assert held_out(generator.normal(size=(200, 40)), numbers, 0) < 0.25


def test_a_number_is_held_out_in_every_spelling():
    """Each spelled twice with the same random vector: one in the other's place would make it look known."""
    numbers = np.arange(1, 101)
    x = np.random.default_rng(0).normal(size=(100, 400))
    assert held_out(np.concatenate([x, x]), np.concatenate([numbers, numbers]), 0) < 0.3


def test_modulo_10_of_numbers_and_of_what_was_not_fitted(result):
    generator = np.random.default_rng(0)
    numbers = replace_chain("numbers", range(1, 101), first=0)
    days = replace_chain("days", range(1, 8), first=100)
    x = torch.tensor(digits(np.concatenate([numbers.index, days.index]), generator), dtype=torch.float32)
    data = result.data.sel(task=["numbers", "days"])
    ids = torch.arange(107)
    found, notes = successor_heads._mod_10(data, [numbers, days], ids, x, lambda x: torch.zeros(len(x), 107), FEW)
    assert (found["mod10_accuracy"].to_numpy().tolist(), notes) == ([1, 1], [])
    assert found["arithmetic"].to_numpy().tolist() == [0, 0]  # ties are failures
    assert np.isnan(result.data["mod10_accuracy"]).all()
    assert "modulo 10 left out: 9 numbers are single tokens, 50 needed" in result.data.attrs["note"]


def test_a_digit_is_changed_and_the_successor_with_it():
    """States of tens and last digit, one-hot each: a head that puts the digit one on goes with it, whether or not it
    keeps to its ten; too small a step, or features dealt to other digits, give another digit's successor."""
    index = np.arange(10, 100)
    numbers, ids = replace_chain("numbers", index, first=0), torch.arange(90)
    states = torch.cat([torch.eye(11)[index // 10], torch.eye(10)[index % 10]], 1)
    features = digit_features(states.double().numpy(), index % 10)
    own = torch.eye(10)[index % 10].T
    shifts = torch.eye(10).roll(1, 1)

    def by_digit(x):
        return x[:, 11:] @ shifts @ own + 0.1 * x[:, :11] @ torch.eye(11)[index // 10].T

    def by_number(x):
        return 9 * (x[:, :11] @ torch.eye(11)[index // 10].T) + x[:, 11:] @ shifts @ own

    assert arithmetic([numbers], ids, states, features, by_digit) == 1
    assert arithmetic([numbers], ids, states, 0.1 * features, by_digit) == 0
    assert arithmetic([numbers], ids, states, np.roll(features, 1, axis=0), by_digit) == 0
    assert arithmetic([numbers], ids, states, features, by_number) == 1  # within its own ten
    short = replace_chain("days", range(1, 4), first=0)  # only 1, 2 and 3 can follow: from 0, 1 and 2
    seen = []
    arithmetic([short], ids, states, features, lambda x: seen.append(len(x)) or by_digit(x))
    assert seen == [2 + 2 + 3]
    assert np.isnan(arithmetic([], ids, states, features, by_digit))


def test_digit_features_are_means(result):
    x, digit = np.arange(24.0).reshape(8, 3), np.array([0, 1, 2, 3, 4, 5, 6, 6])
    features = digit_features(x, digit)
    means = np.array([x[0], x[1], x[2], x[3], x[4], x[5], x[6:8].mean(0), *[x.mean(0)] * 3])
    np.testing.assert_allclose(features, means - means.mean(0))


def test_the_scale_of_the_arithmetic_counts():
    numbers = replace_chain("numbers", range(10, 100), first=0)
    x = torch.cat([torch.eye(11)[numbers.index // 10], torch.eye(10)[numbers.index % 10]], 1)
    own = torch.eye(10)[numbers.index % 10].T

    def head(x):
        return x[:, 11:] @ torch.eye(10).roll(1, 1) @ own + 0.1 * x[:, :11] @ torch.eye(11)[numbers.index // 10].T

    data = xr.Dataset(coords={"task": ["numbers"]})
    found = [
        successor_heads._mod_10(data, [numbers], torch.arange(90), x, head, replace(FEW, arithmetic=k))[0]
        for k in (1.0, 0.1)
    ]
    assert [float(one["arithmetic"][0]) for one in found] == [1, 0]
    assert float(found[0]["shuffled_arithmetic"][0]) < 0.3


def replace_chain(task, indices, first):
    found = [(int(index) - 1, first + place) for place, index in enumerate(indices)]
    return successor_heads._chain(task, found, len(found), wrap=False)


def test_a_gap_has_no_successor():
    chain = successor_heads._chain("numbers", [(0, 50), (1, 51), (3, 53)], 200, wrap=False)
    assert (chain.source.tolist(), chain.target.tolist(), chain.index.tolist()) == ([0], [1], [1, 2, 4])
    whole = successor_heads._chain("days", [(0, 50), (1, 51), (6, 56)], 7, wrap=True)
    assert (whole.source.tolist(), whole.target.tolist()) == ([0, 2], [1, 0])


def test_wilson():
    """Against the interval's definition: where the share is 1.96 standard errors of the bound away."""
    share, number = np.array([0.0, 0.5, 0.9, 1.0]), np.array([6, 10, 30, 25])
    for bound in wilson(share, number):
        inside = (bound > 1e-9) & (bound < 1 - 1e-9)
        error = np.sqrt(bound * (1 - bound) / number)
        np.testing.assert_allclose(abs(share - bound)[inside], 1.96 * error[inside])


# ---- result -----------------------------------------------------------------------------------------------


def test_headlines(result, planted):
    shuffled = float(at(result, "null_macro", 0, 0))
    assert SuccessorHeads.headline(result) == (
        f"head 0.0 scores above 0.5 in 6 of 6 classes (macro 1.00, shuffled {shuffled:.2f}, p 0.02 over 8 heads); "
        "left out, with fewer than 3 single tokens: day prefixes, month prefixes; "
        "modulo 10 left out: 9 numbers are single tokens, 50 needed; only 7 places in the text"
    )
    none = SuccessorHeads.headline(run(planted, first_mlp="mlp"))
    assert none.startswith("no head scores above 0.5 in any of 6 classes; best is 0.0 (macro 0.00, shuffled 0.00, p 1 ")


def test_the_table_is_sorted_and_says_what_the_arrays_say(result):
    table = result.table
    assert len(table) == 2 * HEADS
    assert table["macro"].is_monotonic_decreasing
    assert table[["layer", "head"]].to_numpy()[:2].tolist() == [[0, 0], [1, 2]]
    for line in table.to_dict("records"):
        here = result.data.sel(layer=line["layer"], head=line["head"])
        for name in ("macro", "micro", "tasks_above", "copying", "null_macro", "p_value", "p_family", "wins"):
            assert line[name] == here[name]
        assert [line[f"score {task}"] for task in SIZES] == here["score"].to_numpy().tolist()


def test_every_variable_has_a_unit(result):
    assert all("units" in variable.attrs for variable in result.data.data_vars.values())


def test_what_is_saved_comes_back_with_its_figures(result, tmp_path):
    result.data.to_netcdf(tmp_path / "data.nc", engine="scipy")
    data = xr.load_dataset(tmp_path / "data.nc", engine="scipy")
    again = wb.Result("successor-heads", data, result.table, result.provenance)
    assert data["member_text"].to_numpy().tolist() == result.data["member_text"].to_numpy().tolist()
    assert SuccessorHeads.headline(again) == SuccessorHeads.headline(result)
    ours, theirs = (SuccessorHeads.figures(part) for part in (result, again))
    assert list(ours) == ["scores", "tasks", "circuit", "ov"]
    assert [json.loads(ours[name].to_json()) for name in ours] == [json.loads(theirs[name].to_json()) for name in ours]


def test_figures_show_the_numbers(result):
    figures = SuccessorHeads.figures(result)
    np.testing.assert_allclose(np.array(figures["scores"].data[0].z, float), result.data["macro"])
    assert figures["scores"].data[0].text[0][0] == "6"
    bars = figures["tasks"].data
    assert bars[0].name == "head 0.0"
    np.testing.assert_allclose(np.array(bars[0].y, float), 1)
    np.testing.assert_allclose(np.array(next(b for b in bars if b.name == "chance").y, float), result.data["chance"])
    assert figures["circuit"].data[0].customdata[0][1] == "·1 → ·2"


def test_a_model_without_tokenizer(tiny_models, tmp_path):
    model = Model(tiny_models["llama"], None, "bare")
    store = wb.record(model, [[5, 6, 7]], out=tmp_path / "acts", sites=("resid_post",), show_progress=False)
    assert refused(RequestError, lambda: FEW.run(store, model=model)) == (
        "the recorded model has no tokenizer, so that no word is known to be one of its tokens"
    )


def test_a_norm_behind_attention_leaves_the_text_out(tiny_models, tokenizer, tmp_path):
    """Gemma 2's heads do not add up; their scores are there all the same."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**{**tiny_models["gemma2"].config.to_dict(), "vocab_size": 1024})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Gemma2ForCausalLM(config).eval()
    module.config.architectures = ["Gemma2ForCausalLM"]
    model, store = recorded(module, tokenizer, tmp_path / "acts", ("z", "resid_post"), TEXTS[:1])
    found = FEW.run(store, model=model)
    assert found.data.sizes["layer"] == 3
    assert "text left out: a norm stands behind attention, so that heads do not add up" in found.data.attrs["note"]


def test_the_demo_model_beats_its_shuffles_without_being_a_successor_model(tmp_path):
    """Stories tell of days and numbers in order: the best head is far above chance, and below the threshold."""
    model = wb.load_model("demo", device="cpu")
    with (embedded.MODEL.parent / "corpus.jsonl").open() as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, 3)]
    store = wb.record(model, texts, out=tmp_path / "acts", sites=("resid_post.3",), show_progress=False)
    data = SuccessorHeads().run(store).data  # "demo" is name enough
    assert float(data["p_family"].min()) < 0.01
    assert float(data["macro"].max()) > 2 * float(data["null_macro"].max())
