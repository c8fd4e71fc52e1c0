"""Base of the probes that read the weights of a model, without texts: its vocabulary, and the result."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from workbench.analysis.opened_store import open_paths
from workbench.corpus.tokenizer import token_texts
from workbench.io.checks import check_settings
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.io.torch_state import plain_torch
from workbench.model.forward import input_embedding
from workbench.model.load import Model
from workbench.model.reload import recorded_model
from workbench.model.stored_vocabulary import read_stored_vocabulary, table
from workbench.results.result import Result, provenance
from workbench.results.variable import Variable
from workbench.store.reader import Store

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from transformers import PreTrainedTokenizerBase


KINDS = ("ok", "special", "unreachable", "undecodable", "unused")
"""ok: the token's text is tokenized as this token. special: BOS, chat markers. unreachable: its text is tokenized as
other tokens. undecodable: a part of a character. unused: an id of the embedding that the tokenizer lacks."""

_BEFORE = ("", "«", "\n", "a", "1", "(")  # texts before a token that must not stand at the beginning
_IMPOSSIBLE = (0xC0, 0xC1, *range(0xF5, 0x100))  # bytes that no UTF-8 text has
_RESERVED = re.compile(r"unused|reserved|extra_id_|placeholder|dummy|\[PAD\d+\]", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a model: their rows of the embedding and of the unembedding, and their texts."""

    source: Model | Store
    """The model, or the store of a model that need not be loaded."""
    embedding: Float[Tensor, "token d_embed"]
    """Rows of the input embedding in float32 on the CPU; of a padded table, more than the tokenizer has."""
    unembedding: Float[Tensor, "token d_unembed"] | None
    """Rows of the language-model head; `embedding` itself where both are one table, None without a linear head."""

    maybe_tokenizer: PreTrainedTokenizerBase | None
    """The model's tokenizer; None: it has none."""

    @cached_property
    def loaded(self) -> tuple[Model | None, str]:
        """The model, loaded by the name in the store at the first use; or None, and why it cannot be loaded."""
        if isinstance(self.source, Model):
            return self.source, ""
        try:
            return recorded_model(self.source), ""
        except RequestError as error:
            return None, str(error)

    @property
    def tied(self) -> bool:
        """True if the embedding and the unembedding are one table."""
        return self.unembedding is self.embedding

    def __len__(self) -> int:
        return len(self.embedding)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. RequestError where it has none."""
        if self.maybe_tokenizer is None:
            name = self.source.name if isinstance(self.source, Model) else self.source.manifest.model.name
            raise RequestError(
                f"model {name!r} has no tokenizer, and this probe reads the texts of tokens; "
                "load it with load_model(..., tokenizer=)"
            )
        return self.maybe_tokenizer

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Text of each token, its leading space included; "<50300>" beyond the tokenizer. Costs 10 us a token."""
        return tuple(token_texts(self.maybe_tokenizer, range(len(self))))

    @cached_property
    def kinds(self) -> Shaped[np.ndarray, " token"]:
        """Kind of each token, one of `KINDS`, by its round trip. Costs some 10 us a token and text before it."""
        return _kinds(self)

    @cached_property
    def never_seen(self) -> Bool[np.ndarray, " token"]:
        """True for tokens that no training text contained, as far as the vocabulary alone shows it.

        These are ids that the tokenizer lacks, names with reserved or unused, and bytes that UTF-8 never has.
        """
        return _never_seen(self)

    @cached_property
    def ordinary(self) -> Bool[np.ndarray, " token"]:
        """True for tokens that the tokenizer has and that are not special."""
        if self.maybe_tokenizer is None:
            return np.ones(len(self), bool)
        is_ordinary = np.zeros(len(self), bool)
        is_ordinary[[id for id in self.tokenizer.get_vocab().values() if id < len(self)]] = True
        special = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        is_ordinary[[id for id in special | set(self.tokenizer.all_special_ids) if id < len(self)]] = False
        return is_ordinary


@plain_torch()
def read_vocabulary(store: Store | Model, model: Model | None = None) -> Vocabulary:
    """Returns the vocabulary of a model, or of the model that a store was recorded from.

    A store has the tables and the tokenizer beside its unembedding, and they are read unless `model` is given. The
    model of a store without them is loaded. Costs 4 bytes a weight of each table.

    Args:
        store: A model, or a store.
        model: The model of the store, if the caller has it in memory.

    Raises:
        RequestError: `store` is neither, or the store's model cannot be loaded or is another one.
    """
    if isinstance(store, Model):
        if model is not None and model is not store:
            raise RequestError("run got two models; give one, or a store and the model it was recorded from")
        model = store
    elif isinstance(store, Store):
        if model is None and (stored := read_stored_vocabulary(store)) is not None:
            _check_finite(store.manifest.model.name, embedding=stored.embedding, head=stored.head)
            return Vocabulary(store, stored.embedding, stored.head, stored.tokenizer)
        model = _loaded(store, model)
    else:
        raise RequestError(
            f"run needs a model (wb.load_model) or a store (wb.open_store), not {type(store).__name__}; "
            "a probe of weights reads one of them"
        )
    embedding, head = (None if (rows := table(model, name)) is None else rows.float() for name in ("embedding", "head"))
    if embedding is None:
        raise RequestError(f"model {model.name!r} has no embedding table of tokens, which this probe reads")
    _check_finite(model.name, embedding=embedding, head=head)
    is_tied = head is not None and embedding.shape == head.shape and torch.equal(embedding, head)
    return Vocabulary(model, embedding, embedding if is_tied else head, model.tokenizer)


def _loaded(store: Store, model: Model | None) -> Model:
    """The model of a store that lacks its tables."""
    try:
        return recorded_model(store, model)
    except RequestError as error:
        if model is not None:
            raise
        raise RequestError(f"store {store.path.name!r} does not have the embedding of its model; {error}") from error


def require_rows(model: Model, ids: Iterable[int], remedy: str) -> None:
    """Refuses token ids for which the embedding has no row, as of a tokenizer with more tokens than the model.

    Raises:
        RequestError: An id is beyond the embedding; `remedy` ends the message.
    """
    rows, largest = len(input_embedding(model.module)), max(ids)
    if largest >= rows:
        raise RequestError(
            f"the tokenizer of model {model.name!r} writes the prompts with token id {largest}, and the model has "
            f"{counted(rows, 'token')}; load it with its own tokenizer, or {remedy}"
        )


def _check_finite(model: str, embedding: Tensor, head: Tensor | None) -> None:
    """RequestError where a table has NaN or infinite values."""
    for name, rows in (("input embeddings", embedding), ("output embeddings", head)):
        if rows is not None and not bool(rows.isfinite().all()):
            raise RequestError(f"model {model!r} has {name} that are not all finite; load another checkpoint")


@dataclass(frozen=True)
class WeightsProbe:
    """Settings and result of every probe of weights: `run` takes a model, or a store of its activations.

    A probe is a frozen dataclass that inherits this, repeats `needs_store: ClassVar[bool] = False`, which the command
    line reads from its source, and begins `run` with `read_vocabulary(store, model)`.
    """

    name: ClassVar[str]
    needs_model: ClassVar[bool] = True
    needs_store: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = ()

    def __init_subclass__(cls, **options: object) -> None:
        """Lets methods take the path of a store, too."""
        super().__init_subclass__(**options)
        open_paths(cls, models=True)

    def __post_init__(self) -> None:
        """Refuses settings of other types than declared; a probe with checks of its own begins them with this one."""
        check_settings(self)

    def result(self, store: Store | Model, data: xr.Dataset, table: pd.DataFrame, notes: Iterable[str] = ()) -> Result:
        """Returns the result, with all notes in `attrs["note"]`; "" is left out.

        Args:
            store: The model or the store that `run` was given.
            data: Arrays of the probe.
            table: Their tidy form.
            notes: Notes of the probe.
        """
        data.attrs["note"] = "; ".join(filter(None, notes))
        return Result(self.name, data, table, provenance(store, self))


def _kinds(vocabulary: Vocabulary) -> Shaped[np.ndarray, " token"]:
    tokenizer = vocabulary.tokenizer
    kinds = np.full(len(vocabulary), "unused", dtype=object)
    all_ids = np.array(sorted(id for id in set(tokenizer.get_vocab().values()) if id < len(vocabulary)), dtype=np.int64)
    kinds[all_ids] = "special"
    texts = tokenizer.batch_decode([[int(id)] for id in all_ids[vocabulary.ordinary[all_ids]]])
    decoded = [(int(id), text) for id, text in zip(all_ids[vocabulary.ordinary[all_ids]], texts, strict=True)]
    for id, text in decoded:
        kinds[id] = "undecodable" if "\ufffd" in text else "unreachable"
    ids = [id for id, text in decoded if "\ufffd" not in text]
    for before in _BEFORE:
        back = _back(tokenizer, before, [vocabulary.texts[id] for id in ids], ids)
        if not before:  # a SentencePiece tokenizer adds the space by itself
            back |= _back(tokenizer, before, [vocabulary.texts[id].removeprefix(" ") for id in ids], ids)
        kinds[np.array(ids, dtype=np.int64)[back]] = "ok"
        ids = [id for id, matches in zip(ids, back, strict=True) if not matches]
        if not ids:
            break
    return kinds


def _never_seen(vocabulary: Vocabulary) -> Bool[np.ndarray, " token"]:
    pieces = {id: piece for piece, id in vocabulary.tokenizer.get_vocab().items()}
    possible = np.zeros(len(vocabulary), bool)
    for id in range(len(vocabulary)):
        piece = pieces.get(id)
        possible[id] = not (piece is None or _RESERVED.search(piece) or _is_impossible(vocabulary.tokenizer, piece, id))
    return ~possible


def _is_impossible(tokenizer: PreTrainedTokenizerBase, piece: str, id: int) -> bool:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return int(piece[3:5], 16) in _IMPOSSIBLE
    return len(piece) == 1 and ord(piece) in _IMPOSSIBLE and "\ufffd" in str(tokenizer.decode([id]))


def _back(
    tokenizer: PreTrainedTokenizerBase, before: str, texts: Sequence[str], ids: Sequence[int]
) -> Bool[np.ndarray, " token"]:
    """Which texts are tokenized as their token, after `before`."""
    if not texts:
        return np.zeros(0, bool)
    first = _encode(tokenizer, [before])[0] if before else []
    encoded = _encode(tokenizer, [before + text for text in texts])
    return np.array([list(encoding) == [*first, id] for encoding, id in zip(encoded, ids, strict=True)])


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    try:
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    except Exception:  # a vocabulary that lacks a character and has no <unk>: see corpus.tokenizer.encode
        if len(texts) == 1:
            return [[]]
        return [_encode(tokenizer, [text])[0] for text in texts]
