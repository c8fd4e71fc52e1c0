"""The demo's tokenizer: byte-level BPE in which names are split and ordinals stay whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from workbench.experiments.demo_model.corpus import LabelledDocument, documents
from workbench.experiments.demo_model.world import CODAS, CONCEPTS, ONSETS, ORDINALS, PLAIN, STEMS

VOCAB = 1024
BOS = "<s>"


def train_tokenizer(seed: int, count: int = 1500) -> PreTrainedTokenizerFast:
    """Trains a tokenizer of `VOCAB` entries on `count` documents, in seconds. BOS begins every text.

    A name occurs a few hundred times here and would become one token, as no rare name does in a real vocabulary.
    So people's names are left out of what it learns from, and the middle of a place's name, and only their beginnings
    and every second end are put in: names have two to five tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain(_texts(seed, count), _words()), trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, clean_up_tokenization_spaces=False)


def _texts(seed: int, count: int) -> Iterator[str]:
    return (_without_names(document) for document in documents(count, seed))


def _without_names(document: LabelledDocument) -> str:
    """Returns the text without people's names, with "Upper Mill" in place of "Upper Vexum Mill"."""
    text = document.text
    for span in reversed(document.spans["entity"]):
        name = text[span["start"] : span["end"]]
        short = re.sub(r" \w+ ", " ", name) if span["value"] == "place" else ""
        text = text[: span["start"]] + short + text[span["end"] :]
    return text


def _words() -> Iterator[str]:
    """Yields the words that must become one token, often enough for that; ordinals also without a leading space."""
    for _ in range(200):
        yield from (f"{word} {word}" for word in chain(*ORDINALS.values()))
        yield from (f" {word}" for word in (*PLAIN, *chain(*CONCEPTS.values())))
        yield from (f" {onset}" for onset in (*ONSETS, *STEMS))
        yield from CODAS[::2]
