"""Pairs of prompts: answers and spans by the tokenizer's encoding, facts by the world that the texts are of."""

from __future__ import annotations

import itertools
import re

import pytest
from refusals import refused
from warned import warned

import workbench as wb
from workbench.corpus.prompt_pairs import ANSWERS, LENGTHS, SAME, SPANS
from workbench.corpus.task_suites import TASKS
from workbench.experiments.demo_model.world import PEOPLE
from workbench.io.errors import RequestError

FIT = ("greater-than", "facts", "colours", "copying")
"""Tasks whose words are single tokens of the embedded model."""


@pytest.fixture(scope="module")
def model():
    return wb.load_model("demo", device="cpu")


@pytest.mark.parametrize("task", FIT)
def test_answers_and_spans_are_those_of_the_tokenizer(task, model):
    pairs = wb.prompt_pairs(task, model, 12, seed=3)
    assert len(pairs) == 12
    assert repr(pairs).startswith(f"PromptPairs({task!r}, 12 pairs")
    for checked in pairs.pairs:
        for side, ids in (("clean", checked.clean), ("corrupt", checked.corrupt)):
            text = getattr(checked.pair, side)
            assert model.tokenizer(text)["input_ids"] == list(ids)
            for answer in (*checked.pair.answer, *checked.pair.wrong):
                longer = model.tokenizer(text + answer)["input_ids"]
                if len(longer) == len(ids) + 1:
                    assert longer[-1] in (*checked.answer, *checked.wrong)
            for label, span in checked.spans.items():
                if label != "end":
                    start, end = checked.pair.spans[label][side == "corrupt"]
                    decoded = model.tokenizer.decode(ids[span.start : span.stop])
                    assert decoded.strip() == text[start:end], label
        assert len(checked.clean) == len(checked.corrupt)
        assert [*checked.spans["end"]] == [len(checked.clean) - 1]
        assert not {*checked.answer} & {*checked.wrong}
        assert checked.clean != checked.corrupt


def test_facts_are_those_of_the_world(model):
    people = {person.name: person for person in PEOPLE}
    for checked in wb.prompt_pairs("facts", model, 40).pairs:
        for side, answers in (("clean", checked.pair.answer), ("corrupt", checked.pair.wrong)):
            name, verb = re.fullmatch(r"(\w+) (works as|has) a", getattr(checked.pair, side)).groups()
            truth = people[name].job if verb == "works as" else people[name].pet
            assert answers == (f" {truth}",)


def test_every_task_draws_pairs_that_differ_in_their_answer():
    from random import Random

    for forms in TASKS.values():
        for form in forms:
            draw = form(Random(0))
            for _ in range(20):
                pair = next(draw)
                assert pair.clean != pair.corrupt
                assert not {*pair.answer} & {*pair.wrong}
                for label, (clean, corrupt) in pair.spans.items():
                    assert pair.clean[slice(*clean)].strip() == pair.clean[slice(*clean)] != "", label
                    assert pair.corrupt[slice(*corrupt)]


def test_the_same_seed_gives_the_same_pairs(model):
    first, repeat, of_another_seed = (wb.prompt_pairs("copying", model, 5, seed=seed) for seed in (1, 1, 2))
    assert first == repeat != of_another_seed
    assert len({pair.pair.clean for pair in wb.prompt_pairs("facts", model, 60).pairs}) > 40


def test_pairs_that_do_not_fit_are_counted_by_reason(model):
    good = wb.PromptPair("Read red and", "Read blue and", (" red",), (" blue",), {"colour": ((5, 8), (5, 9))})
    pairs = [
        good,
        wb.PromptPair("Read red and", "Read blue and the", (" red",), (" blue",)),
        wb.PromptPair("Read red and", "Read blue and", (" Quovim",), (" blue",)),
        wb.PromptPair("Read red and", "Read blue and", (" red",), (" red",)),
        wb.PromptPair("Read red and", "Read blue and", (" red",), (" blue",), {"colour": ((5, 8), (10, 13))}),
    ]
    checked = wb.check_pairs(pairs, model.tokenizer, "mine")
    assert [pair.pair for pair in checked.pairs] == [good]
    assert checked.dropped == {LENGTHS: 1, ANSWERS: 1, SAME: 1, SPANS: 1}
    message = refused(RequestError, lambda: wb.check_pairs(pairs[1:3], model))
    assert message.startswith("no pair of 'pairs' fits the tokenizer: ")
    assert "(1)" in message


def unchecked(*values):
    """A pair of values of any type. Not by its `__init__`, whose arguments beartype checks while the tests run."""
    pair = object.__new__(wb.PromptPair)
    for name, value in zip(("clean", "corrupt", "answer", "wrong", "spans"), [*values, {}], strict=False):
        object.__setattr__(pair, name, value)
    pair.__post_init__()
    return pair


def test_a_task_of_few_pairs_ends_with_a_warning(model, monkeypatch):
    pairs = [
        wb.PromptPair(f"Read {colour} and", "Read blue and", " red", " blue") for colour in ("red", "white", "black")
    ]
    monkeypatch.setitem(TASKS, "three", (lambda draw: (draw.choice(pairs) for _ in itertools.count()),))
    with warned("task three: 3 pairs fit the tokenizer, fewer than the 90,000 asked for"):
        assert len(wb.prompt_pairs("three", model, 90_000)) == 3


def test_one_answer_may_stand_alone(model):
    pair = wb.PromptPair("Read red and", "Read blue and", " red", " blue")
    assert pair == wb.PromptPair("Read red and", "Read blue and", (" red",), (" blue",))
    assert wb.check_pairs(pair, model).pairs[0].pair == pair


def test_a_store_has_the_pairs_as_columns(model, tmp_path):
    pairs = wb.prompt_pairs("facts", model, 3)
    store = wb.record(model, pairs.texts(), sites=["resid_post.0"], out=tmp_path / "s.acts", show_progress=False)
    tokens = store.tokens.to_pandas()
    for number, checked in enumerate(pairs.pairs):
        for side in ("clean", "corrupt"):
            part = tokens[(tokens["pair"] == number) & (tokens["side"] == side)]
            assert tuple(part["token_id"]) == getattr(checked, side)
            right = checked.pair.answer[0] if side == "clean" else checked.pair.wrong[0]
            assert set(part["answer"]) == {right}
            assert part.loc[part["subject"].notna(), "position"].tolist() == list(checked.spans["subject"])
    assert pairs.table()["answer"].tolist() == [checked.pair.answer[0] for checked in pairs.pairs]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: wb.prompt_pairs("iio", model), "task must be one of ioi, greater-than"),
        (lambda model: wb.prompt_pairs("facts", model, 0), "count must be a whole number, from 1 to 100000, not 0"),
        (lambda model: wb.prompt_pairs("facts", model, 10**9), "count must be a whole number, from 1 to 100000, not"),
        (lambda model: wb.prompt_pairs("facts", None), "tokenizer must be a tokenizer, or a model that has one"),
        (lambda model: wb.prompt_pairs("ioi", model), "no pair of 'ioi' fits the tokenizer"),
        (lambda model: wb.check_pairs([], model), "no pair is given"),
        (lambda model: wb.check_pairs(iter([("a", "b")]), model), "pairs: entry 0 is ('a', 'b'); give wb.PromptPair"),
        (lambda _model: unchecked("a", None, " c", " d"), "corrupt must be a text, not None"),
        (lambda _model: unchecked("a", "b", 3, " d"), "answer must be a text, not 3"),
        (lambda _model: unchecked("a", "b", " c", " d", {"x": (0, 1)}), "spans: 'x' needs first and last"),
    ],
)
def test_bad_requests_are_refused(call, message, model):
    assert message in refused(RequestError, lambda: call(model))
