"""The embedded model: what training gives again, what the phenomena measures give on planted cases, what ships."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.embedded import MODEL, demo_corpus
from workbench.experiments.controls import random_copy
from workbench.experiments.demo_model import train as training
from workbench.experiments.demo_model.phenomena import (
    EPSILON,
    LENGTH,
    _repeats,
    induction,
    record_heads,
    sinks,
    successors,
)
from workbench.experiments.demo_model.train import (
    PREVIOUS_HEADS,
    RANDOM_REPEATS,
    Recipe,
    build,
    read_recipe,
    sequences,
    train,
)
from workbench.io.errors import RequestError

SMALL = Recipe(steps=6, layers=2, heads=2, d_model=32, d_mlp=48, batch=4, context=48, warmup=2)


@pytest.fixture(scope="module")
def demo():
    return wb.load_model("demo")


@pytest.fixture
def quick(monkeypatch, demo):
    """Training with the shipped tokenizer, which takes seconds to learn."""
    monkeypatch.setattr(training, "train_tokenizer", lambda seed: demo.tokenizer)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# Training


def test_the_same_seed_gives_the_same_losses_and_weights(quick, tmp_path):
    losses = train(SMALL, tmp_path / "a")
    assert train(SMALL, tmp_path / "b") == losses
    assert _weights(tmp_path / "a") == _weights(tmp_path / "b")
    assert json.loads((tmp_path / "a" / "training.json").read_text())["loss"] == pytest.approx(losses, abs=1e-5)


def _weights(run):
    return (run / "model" / "model.safetensors").read_bytes()


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(quick, tmp_path, monkeypatch):
    whole = train(SMALL, tmp_path / "whole")
    with monkeypatch.context() as patch:

        def stop(recipe, tokenizer, step):
            if step == 5:
                raise KeyboardInterrupt
            return sequences(recipe, tokenizer, step)

        patch.setattr(training, "sequences", stop)
        with pytest.raises(KeyboardInterrupt):
            train(SMALL, tmp_path / "stopped", checkpoint_steps=2)
    assert train(SMALL, tmp_path / "stopped", checkpoint_steps=2) == whole
    assert _weights(tmp_path / "stopped") == _weights(tmp_path / "whole")


def test_a_run_of_another_recipe_is_not_taken_up(quick, tmp_path):
    train(SMALL, tmp_path, checkpoint_steps=2)
    with pytest.raises(RequestError, match="holds a run with another learning_rate; choose another folder"):
        train(replace(SMALL, learning_rate=1e-4), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"learning_rate": 1e-2},
        {"weight_decay": 0.9},
        {"warmup": 4},
        {"steps": 4},
        {"batch": 2},
        {"context": 32},
        {"layers": 3},
        {"heads": 4},
        {"d_model": 16},
        {"d_mlp": 32},
        {"shares": ((RANDOM_REPEATS, 1.0),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_of_the_recipe_matters(quick, tmp_path, change):
    train(SMALL, tmp_path / "a")
    train(replace(SMALL, **change), tmp_path / "b")
    assert _weights(tmp_path / "a") != _weights(tmp_path / "b")


def test_threads_are_those_of_the_recipe(quick, tmp_path):
    train(replace(SMALL, steps=1, threads=2), tmp_path)
    assert torch.get_num_threads() == 2


def test_sequences_are_full_begin_with_bos_and_never_hold_it_again(demo):
    ids = sequences(replace(SMALL, batch=40), demo.tokenizer, 3)
    assert ids.shape == (40, 48)
    assert (ids[:, 0] == demo.tokenizer.bos_token_id).all()
    assert not (ids[:, 1:] == demo.tokenizer.bos_token_id).any()
    assert torch.equal(ids, sequences(replace(SMALL, batch=40), demo.tokenizer, 3))
    assert not torch.equal(ids, sequences(replace(SMALL, batch=40), demo.tokenizer, 4))


def test_random_repeats_come_back(demo):
    ids = sequences(replace(SMALL, context=256, batch=16, shares=((RANDOM_REPEATS, 1.0),)), demo.tokenizer, 0)
    periods = [len(set(line[1:])) for line in ids.tolist()]
    assert 3 <= min(periods) < max(periods) <= 64
    assert len(set(periods)) > 8
    for line, period in zip(ids[:, 1:].tolist(), periods, strict=True):
        assert line[period:] == line[:-period]


@pytest.fixture(scope="module")
def first_patterns(demo):
    """Attention before training, over random tokens said twice: [layer, head, query, key]."""
    model = build(Recipe(), demo.tokenizer)
    model.set_attn_implementation("eager")
    tokens = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:50] + 1
    with torch.no_grad():
        patterns = model(torch.cat([torch.zeros(1, dtype=torch.long), tokens, tokens])[None], output_attentions=True)
    return torch.cat(patterns.attentions)


def test_heads_of_block_0_begin_by_attending_to_the_previous_token(first_patterns):
    to_previous = first_patterns.diagonal(offset=-1, dim1=-2, dim2=-1).mean(-1)
    assert (to_previous[0, :PREVIOUS_HEADS] > 0.8).all()
    assert (to_previous[0, PREVIOUS_HEADS:] < 0.1).all()
    assert (to_previous[1:] < 0.1).all()


def test_heads_of_blocks_2_and_3_begin_by_preferring_what_is_far(first_patterns):
    """A token itself gets far less from them than an even share of the attention."""
    to_itself = first_patterns.diagonal(dim1=-2, dim2=-1)[..., 50:].mean(-1)
    even = (1 / torch.arange(51, 102)).mean()
    assert (to_itself[2:] < even / 10).all()
    assert (to_itself[1] > even / 2).all()
    assert (to_itself[0, PREVIOUS_HEADS:] > even / 2).all()


def test_heads_of_blocks_1_and_2_begin_by_copying(demo):
    blocks = build(Recipe(), demo.tokenizer).model.layers
    copies = [torch.equal(block.self_attn.o_proj.weight, block.self_attn.v_proj.weight.T) for block in blocks]
    assert copies == [False, True, True, False]


# Measures


def test_repeats_are_bos_and_distinct_tokens_twice(demo):
    for line in _repeats(demo, sequences=4).tolist():
        assert line[0] == demo.tokenizer.bos_token_id
        assert line[1:51] == line[51:]
        assert len(set(line)) == 51


# What ships


def test_the_shipped_model_is_what_its_card_says(demo):
    size = sum(weight.numel() for weight in demo.module.parameters())
    assert 3e6 <= size <= 5e6
    assert demo.dtype == torch.float32
    assert demo.name == "demo"
    assert wb.load_model("demo", dtype="bfloat16").dtype == torch.bfloat16


def test_training_again_gives_the_shipped_curve(demo):
    known = json.loads((MODEL / "training.json").read_text())
    recipe = read_recipe(MODEL / "training.json")
    assert recipe == Recipe()
    assert len(known["loss"]) == recipe.steps
    model = build(recipe, demo.tokenizer)
    ids = sequences(recipe, demo.tokenizer, 0)
    assert model(ids, labels=ids).loss.item() == pytest.approx(known["loss"][0], abs=1e-3)


def test_the_shipped_model_knows_its_world(demo):
    """Facts of held-out documents: the tokens of a home, after "lives in", are nearly all foreseen."""
    from workbench.experiments.demo_model.world import PEOPLE

    right = 0
    for person in PEOPLE[:20]:
        prompt = f"The job of {person.name} is {person.job}. {person.name} lives in"
        ids = demo.tokenizer(prompt, return_tensors="pt")["input_ids"]
        generated = demo.module.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        right += demo.tokenizer.decode(generated[0, ids.shape[1] :]).startswith(f" {person.home}")
    assert right >= 15


@pytest.fixture(scope="module")
def heads(demo, tmp_path_factory):
    """Findings on heads, of the shipped model and of random weights: by model, whether the criterion is met."""
    criteria = {}
    random = random_copy(demo)
    for name, model, count in (("demo", demo, 60), ("random", random, 15)):
        folder = tmp_path_factory.mktemp(name)
        store = record_heads(model, demo_corpus()[:count], folder)
        findings = [*sinks(store), *successors(model, store), *induction(model, folder)]
        criteria[name] = {finding.measure: finding.holds for finding in findings}
    return criteria


CLASSES, NULL = "ordinal classes in which one head's score is above 0.5", "the same head with the successors shuffled"
READ = ["x + MLP_0(x)", "MLP_0(x)"]
NULLS = {f"{NULL}, heads reading {read}" for read in READ}
SHOWN = {
    "Sink_1, epsilon 0.3, T 64",
    "value norm at the sink over that of other tokens (mean of sink heads)",
    "residual norm at the sink over that of other tokens (middle layers)",
    "attention to BOS, highest minus lowest domain",
    "prefix matching, 50 random tokens repeated",
    "loss on the repeat over that on the first occurrence",
    *(f"{CLASSES}, heads reading {read}" for read in READ),
    *NULLS,
}


def test_the_shipped_model_shows_what_its_card_says(heads):
    assert {measure for measure, holds in heads["demo"].items() if holds} == SHOWN


def test_random_weights_show_none_of_it(heads):
    assert {measure for measure, holds in heads["random"].items() if holds} == NULLS


def test_sink_one_equals_its_definition_in_float64(demo, tmp_path):
    store = record_heads(demo, demo_corpus()[:5], tmp_path)
    (sink_one, *_) = sinks(store)
    ids = store.tokens["token_id"].to_numpy()
    counts = np.bincount(store.tokens["sequence"].to_numpy())
    full = [ids[end - LENGTH : end] for end, count in zip(np.cumsum(counts), counts, strict=True) if count == LENGTH]
    eager = build(Recipe(), demo.tokenizer).eval()
    eager.load_state_dict(demo.module.state_dict())
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = torch.stack(eager(torch.tensor(np.stack(full)), output_attentions=True).attentions).double()
    alpha = patterns[..., 0].sum(-1) / LENGTH  # layer sequence head
    assert sink_one.value == pytest.approx(100 * (alpha > EPSILON).double().mean().item(), abs=0.5)
