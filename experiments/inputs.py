"""What experiments run on: a model as it is named in a config, and documents as a seed orders them."""

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
from workbench.io.errors import RequestError
from workbench.recording.cache import record_once

RECORDINGS = Path("runs/recordings")


@dataclass(frozen=True)
class Inputs:
    """What most experiments ask for first: the beginning of their config."""

    model: str = NAME
    """Directory, hub id, hub id@revision, or demo."""
    weights: Literal["trained", "random"] = "trained"
    """random: the model's shape with Hugging Face's random weights, which shows what training did not make."""
    text: str = NAME
    """File (.txt, .jsonl, .parquet), hf:NAME of a dataset, or demo: the embedded corpus."""
    documents: int = 1000
    """Documents read from the text's beginning; the seed puts them in an order."""
    rows: int = 20_000
    """Tokens recorded at most, from the first of that order on."""
    seed: int = 0
    """Of the order of documents, and of all else that is drawn."""
    device: str = "cpu"
    """Where it runs: cpu, cuda."""
    recordings: Path = field(default=RECORDINGS, compare=False)
    """Folder of the recordings that runs share. It changes no number."""

    def __post_init__(self) -> None:
        check_counts(self, ("documents", "rows", "seed"))


def check_counts(config: Any, names: Sequence[str]) -> None:
    """Refuse counts below 1, and a seed below 0."""
    for name in names:
        least = 0 if name == "seed" else 1
        if getattr(config, name) < least:
            raise RequestError(f"{name} must be at least {least}, not {getattr(config, name)}")


@lru_cache(maxsize=1)  # the cells of a sweep that share a model come one after another
def model_of(name: str, weights: str = "trained", device: str = "cpu") -> wb.Model:
    """The model that a config names. `NAME@REVISION` is a revision of a hub id."""
    source, revision = name, None
    if "@" in name and not Path(name).exists():
        source, revision = name.rsplit("@", 1)
    model = wb.load_model(source, revision=revision, device=device)
    return model if weights == "trained" else random_copy(model)


@lru_cache(maxsize=1)
def _read(text: str, number: int) -> tuple[Any, ...]:
    """The first documents of a text, as `record` takes them."""
    found = []
    for document in read_documents(wb.demo_corpus() if text == NAME else text):
        if document.text is None:
            found.append(np.asarray(document.token_ids).tolist())
        else:
            spans = {name: [span._asdict() for span in part] for name, part in document.spans.items()}
            found.append({"text": document.text, **document.metadata, **({"spans": spans} if spans else {})})
        if len(found) == number:
            break
    return tuple(found)


def documents_of(text: str, number: int, seed: int) -> list[Any]:
    """The first `number` documents of a text, in the order that the seed gives."""
    read = _read(text, number)
    return [read[place] for place in np.random.default_rng(seed).permutation(len(read))]


def recorded(config: Inputs, sites: Sequence[str], **settings: Any) -> wb.Store:
    """The store of the config's documents, which runs of the same model, text and seed share."""
    model = model_of(config.model, config.weights, config.device)
    texts = documents_of(config.text, config.documents, config.seed)
    return record_once(model, texts, folder=config.recordings, sites=tuple(sites), max_rows=config.rows, **settings)


def token_sequences(
    model: wb.Model, kind: Literal["random", "repeated"], number: int, length: int, *, bos: bool, seed: int
) -> list[list[int]]:
    """Sequences of `length` token ids: each its own random tokens, or one random token again and again.

    Special tokens are not among them; with `bos` each begins with what the tokenizer puts before a text.
    """
    known = set() if model.tokenizer is None else set(model.tokenizer.all_special_ids)
    ids = np.array([token for token in range(_vocab(model)) if token not in known])
    prefix = list(added_tokens(model.tokenizer, "model").prefix) if bos else []
    drawn = np.random.default_rng(seed).choice(ids, size=(number, length - len(prefix)))
    if kind == "repeated":
        drawn = np.repeat(drawn[:, :1], drawn.shape[1], axis=1)
    return [[*prefix, *line] for line in drawn.tolist()]


def _vocab(model: wb.Model) -> int:
    """Ids that stand for tokens: an embedding is often padded beyond them."""
    return model.vocab if model.tokenizer is None else min(model.vocab, len(model.tokenizer))
