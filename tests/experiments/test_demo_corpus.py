"""Tests of the demo's texts: their labels are correct for every seed."""

import re
from itertools import pairwise
from random import Random

import pytest

from workbench.embedded import demo_corpus
from workbench.experiments.demo_model.corpus import DOMAINS, HELD_OUT, LABELS, document, documents
from workbench.experiments.demo_model.tokenizer import train_tokenizer
from workbench.experiments.demo_model.world import CONCEPTS, ORDINALS, PEOPLE, PLACES, PLAIN, SUCCESSORS, TRIGGERS

SEED = 7


@pytest.fixture(scope="module")
def texts():
    return list(documents(60, SEED))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(seed=0, count=300)


def marked(document_, label):
    """Every span of a label, as (text, value)."""
    return [(document_.text[span["start"] : span["end"]], span["value"]) for span in document_.spans[label]]


def test_the_same_seed_gives_the_same_texts_and_another_seed_others(texts):
    assert list(documents(60, SEED)) == texts
    assert not {d.text for d in documents(60, SEED + 1)} & {d.text for d in texts}


def test_domains_take_turns_and_documents_are_as_long_as_asked(texts):
    assert [d.domain for d in texts[:5]] == list(DOMAINS)
    assert all(800 <= len(d.text) < 2000 for d in texts)
    assert all(len(d.text) >= 3000 for d in documents(5, SEED, characters=3000))


@pytest.mark.parametrize(("label", "classes"), [("ordinal", ORDINALS), ("concept", CONCEPTS)])
def test_every_word_of_a_class_is_labelled_and_nothing_else(texts, label, classes):
    class_of = {word: kind for kind, words in classes.items() for word in words}
    for text in texts:
        expected = [(m[0], class_of[m[0]]) for m in re.finditer(r"\w+", text.text) if m[0] in class_of]
        assert marked(text, label) == expected


def test_the_index_of_an_ordinal_is_its_place_in_the_class(texts):
    for text in texts:
        kinds = marked(text, "ordinal")
        assert [
            (word, ORDINALS[kind][index])
            for (word, kind), (_, index) in zip(kinds, marked(text, "ordinal_index"), strict=True)
        ] == [(word, word) for word, _ in kinds]


def test_every_name_is_an_entity_of_its_kind(texts):
    names = {person.name: "person" for person in PEOPLE} | dict.fromkeys(PLACES, "place")
    pattern = re.compile("|".join(sorted(names, key=len, reverse=True)))
    for text in texts:
        assert marked(text, "entity") == [(m[0], names[m[0]]) for m in pattern.finditer(text.text)]


def test_words_are_the_runs_of_letters_and_digits(texts):
    for text in texts:
        assert [word for word, _ in marked(text, "word")] == re.findall(r"[A-Za-z0-9]+", text.text)
        assert all(word == value for word, value in marked(text, "word"))


def test_a_copied_word_is_the_word_at_its_source_and_the_source_comes_first(texts):
    copies = 0
    for text in texts:
        for span in text.spans["copy_source"]:
            length = span["end"] - span["start"]
            assert text.text[span["value"] : span["value"] + length] == text.text[span["start"] : span["end"]]
            assert span["value"] + length < span["start"]
            copies += 1
    assert copies > 500


def test_after_a_trigger_the_word_before_it_returns_and_otherwise_the_chain_goes_on():
    triggers = 0
    for number in range(10):
        for line in document("backcopy", Random(number), 800).text.splitlines():
            words = line.split()
            for place, word in enumerate(words):
                if word in TRIGGERS:
                    assert words[place + 1] == words[place - 1]
                    triggers += 1
            chain = [
                word for place, word in enumerate(words) if word not in TRIGGERS and words[place - 1] not in TRIGGERS
            ]
            assert all(after in SUCCESSORS[before] for before, after in pairwise(chain))
    assert triggers > 100


def test_facts_never_change(texts):
    by_name = {person.name: person for person in PEOPLE}
    for text in texts:
        for name, home in re.findall(r"(\w+) lives in ([\w ]+)\.", text.text):
            assert by_name[name].home == home
        for name, pet in re.findall(r"pet of (\w+) is a (\w+)\.", text.text):
            assert by_name[name].pet == pet
        for name, job in re.findall(r"job of (\w+) is (\w+)\.", text.text):
            assert by_name[name].job == job


def test_spans_of_one_label_are_in_order_and_apart(texts):
    for text in texts:
        assert set(text.spans) == set(LABELS)
        for spans in text.spans.values():
            assert all(a["end"] <= b["start"] for a, b in pairwise(spans))


def test_classes_share_no_word():
    words = [word for group in (*ORDINALS.values(), *CONCEPTS.values(), PLAIN, TRIGGERS) for word in group]
    assert len(words) == len(set(words))


def test_names_have_two_to_five_tokens_and_ordinals_one(tokenizer):
    def length(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert {length(f" {person.name}") for person in PEOPLE} == {2, 3, 4, 5}
    for word in (word for members in ORDINALS.values() for word in members):
        assert length(word) == length(f" {word}") == 1
    assert all(length(f" {word}") == 1 for word in (*PLAIN, *TRIGGERS))


def test_the_tokenizer_begins_with_bos_and_gives_the_text_back(tokenizer, texts):
    ids = tokenizer(texts[0].text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == texts[0].text
    assert len(tokenizer) <= 1024


def test_the_corpus_in_the_package_is_what_the_generator_writes_and_is_held_out():
    shipped = demo_corpus()
    assert shipped == [d.record() for d in documents(len(shipped), HELD_OUT)]
    assert len(shipped) >= 100
