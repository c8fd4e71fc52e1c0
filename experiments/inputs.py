"""Inputs of experiments: the model named in a config, and documents in the order of a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

import workbench as wb
from workbench.corpus.sources import read_documents
from workbench.corpus.tokenizer import added_tokens
from workbench.embedded import NAME
from workbench.experiments.controls import random_copy
from workbench.io.checks import check_fields
from workbench.recording.cache import record_once

RECORDINGS = Path("runs/recordings")


@dataclass(frozen=True)
class Inputs:
    """Settings that most experiments share."""

    model: str = NAME
    """Directory, hub id, hub id@revision, or demo."""
    weights: Literal["trained", "random"] = "trained"
    """random: the model's shape with Hugging Face's random weights, a control for what training contributes."""
    text: str = NAME
    """File (.txt .json .jsonl .csv .tsv .parquet), hf:NAME of a dataset, or demo: the embedded corpus."""
    documents: int = 1000
    """Documents read from the beginning of the text; the seed orders them."""
    rows: int = 20_000
    """Maximum number of tokens to record, from the first document of that order on."""
    seed: int = 0
    """Random seed, of the order of documents and of every other draw."""
    device: str | None = None
    """Device: cpu, cuda, cuda:1. None: the GPU if there is one."""
    recordings: Path = field(default=RECORDINGS, compare=False)
    """Folder of the recordings that runs share. It does not affect results."""

    def __post_init__(self) -> None:
        check_fields(self, "documents", "rows", at_least=1)
        check_fields(self, "seed", at_least=0)


@lru_cache(maxsize=1)  # runs of a sweep that share a model are consecutive
def model_of(name: str, weights: str = "trained", device: str | None = None) -> wb.Model:
    """Returns the model that a config names. `NAME@REVISION` is a revision of a hub id."""
    source, revision = name, None
    if "@" in name and not Path(name).exists():
        source, revision = name.rsplit("@", 1)
    model = wb.load_model(source, revision=revision, device=device)
    return model if weights == "trained" else random_copy(model)


@lru_cache(maxsize=1)
def _read(text: str, number: int) -> tuple[Any, ...]:
    """Returns the first documents of a text, in a form that `record` accepts."""
    documents: list[Any] = []
    for document in read_documents(wb.demo_corpus() if text == NAME else text):
        if document.text is None:
            documents.append(np.asarray(document.token_ids).tolist())
        else:
            spans = {name: [span._asdict() for span in part] for name, part in document.spans.items()}
            documents.append({"text": document.text, **document.metadata, **({"spans": spans} if spans else {})})
        if len(documents) == number:
            break
    return tuple(documents)


def documents_of(text: str, number: int, seed: int) -> list[Any]:
    """Returns the first `number` documents of a text, in the order of the seed."""
    read = _read(text, number)
    return [read[place] for place in np.random.default_rng(seed).permutation(len(read))]


def record_documents(config: Inputs, sites: Sequence[str], **settings: Any) -> wb.Store:
    """Returns the store of the config's documents; runs of the same model, text and seed share it."""
    model = model_of(config.model, config.weights, config.device)
    texts = documents_of(config.text, config.documents, config.seed)
    return record_once(model, texts, folder=config.recordings, sites=tuple(sites), max_rows=config.rows, **settings)


def token_sequences(
    model: wb.Model, kind: Literal["random", "repeated"], number: int, length: int, *, bos: bool, seed: int
) -> list[list[int]]:
    """Returns sequences of `length` token ids: random tokens, or one random token repeated.

    Special tokens are not drawn. With `bos` each sequence begins with the tokens that the tokenizer puts before a text.
    """
    special = set() if model.tokenizer is None else set(model.tokenizer.all_special_ids)
    ids = np.array([token for token in range(_vocab(model)) if token not in special])
    prefix = list(added_tokens(model.tokenizer, "model").prefix) if bos else []
    ids_of_sequences = np.random.default_rng(seed).choice(ids, size=(number, length - len(prefix)))
    if kind == "repeated":
        ids_of_sequences = np.repeat(ids_of_sequences[:, :1], ids_of_sequences.shape[1], axis=1)
    return [[*prefix, *line] for line in ids_of_sequences.tolist()]


def _vocab(model: wb.Model) -> int:
    """Returns the number of token ids; an embedding is often padded beyond it."""
    return model.vocab if model.tokenizer is None else min(model.vocab, len(model.tokenizer))
