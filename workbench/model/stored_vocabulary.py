"""Embedding and tokenizer of a model in the file of its unembedding, for analyses of its vocabulary without the model.

The file has each table once: the head where it is the unembedding, and the embedding where it is the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from workbench.corpus.tokenizer import same_tokens
from workbench.io.checksums import check_files
from workbench.io.files import sha256_bytes
from workbench.io.parse import load_json, to_json
from workbench.io.tensors import VERIFY, open_safetensors
from workbench.io.torch_state import plain_torch
from workbench.model.fingerprint import (
    OTHER_TOKENS,
    SWITCHES,
    settings_fingerprint,
    tokenizer_definition,
    tokenizer_settings,
)
from workbench.model.load import Model
from workbench.model.offload import real_weight
from workbench.store.manifest import UNEMBED
from workbench.store.reader import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WEIGHT, _EMBEDDING, _HEAD = "weight", "embedding", "head"
_TOKENIZER = "tokenizer.json"
_VOCABULARY = "vocabulary"
_RESTORED: dict[tuple[type, str, str], bool] = {}
"""True for each class, definition and settings of a tokenizer that give it back: trying takes half a second."""


@dataclass(frozen=True, eq=False)
class StoredVocabulary:
    """The tables of a store's model in float32, and its tokenizer."""

    embedding: Float[Tensor, "token d_embed"]
    head: Float[Tensor, "token d_head"] | None
    """Weights of the language-model head; `embedding` itself where both are one table, None without a linear head."""
    tokenizer: PreTrainedTokenizerBase | None
    """None: the model was recorded without one."""


def table(model: Model, name: str) -> Float[Tensor, "token d"] | None:
    """Returns a table of a model on the CPU, in its own type: "embedding" or "head". None where there is none."""
    part: Any = getattr(model.module, {_EMBEDDING: "get_input_embeddings", _HEAD: "get_output_embeddings"}[name])()
    if not isinstance(getattr(part, "weight", None), Tensor) or part.weight.ndim != 2:
        return None
    return real_weight(part).detach().cpu()


@plain_torch()
def vocabulary_tensors(model: Model, unembedding: Float[Tensor, "vocab d_model"] | None) -> dict[str, Tensor]:
    """Returns what is stored of a model's vocabulary, as tensors.

    The tokenizer is its `tokenizer.json` as bytes; so is what tells which table is which, since safetensors writes
    several entries of a file's metadata in no fixed order. Nothing is returned for a model without an embedding, nor
    for a tokenizer that its definition alone does not give back, as one that is written in Python.

    Args:
        model: The model.
        unembedding: W_U, which the file has as "weight"; None: it has not.
    """
    embedding, head = table(model, _EMBEDDING), table(model, _HEAD)
    described = None if model.tokenizer is None else _described(model.tokenizer)
    if embedding is None or (described is None and model.tokenizer is not None):
        return {}
    tensors = {} if unembedding is None else {_WEIGHT: unembedding.detach().cpu()}
    names = {}
    for name, rows in ((_HEAD, head), (_EMBEDDING, embedding)):
        names[name] = None if rows is None else next((key for key in tensors if _equal(tensors[key], rows)), name)
        if names[name] == name and rows is not None:
            tensors[name] = rows.clone(memory_format=torch.contiguous_format)  # a file has no shared memory
    tensors.pop(_WEIGHT, None)
    definition, settings = described or (None, None)
    if definition is not None:
        tensors[_TOKENIZER] = _as_tensor(definition)
    return tensors | {_VOCABULARY: _as_tensor(to_json({"tables": names, "tokenizer": settings}))}


def _as_tensor(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy())


def save_vocabulary(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the file of a model without an unembedding, unless there is nothing to store."""
    if tensors:
        save_file(dict(tensors), str(path))


@plain_torch()
def read_stored_vocabulary(store: Store) -> StoredVocabulary | None:
    """Returns the tables and the tokenizer of a store's model; None where the store does not have them.

    Costs 4 bytes a weight of each table.

    Raises:
        DataError: The file is missing or damaged.
    """
    manifest, path = store.manifest, store.path / UNEMBED
    if manifest.unembed is None:
        return None
    check_files([(path, manifest.unembed)], VERIFY)
    with open_safetensors(path, VERIFY) as file:  # which names the file in every error inside
        if _VOCABULARY not in file.keys():  # noqa: SIM118 (no mapping)
            return None
        facts = load_json(file.get_tensor(_VOCABULARY).numpy().tobytes())
        names, described = facts["tables"], facts["tokenizer"]
        embedding = file.get_tensor(names[_EMBEDDING]).float()
        head = embedding
        if names[_HEAD] != names[_EMBEDDING]:
            head = None if names[_HEAD] is None else file.get_tensor(names[_HEAD]).float()
        if any(rows.ndim != 2 for rows in (embedding, head) if rows is not None):
            raise ValueError("a table of tokens has not two axes")
        tokenizer = None
        if described is not None:
            definition = file.get_tensor(_TOKENIZER).numpy().tobytes()
            if sha256_bytes(definition) != manifest.model.tokenizer_fingerprint:
                raise ValueError("its tokenizer is not the one of the recording")
            tokenizer = _tokenizer(definition.decode(), described)
    return StoredVocabulary(embedding, head, tokenizer)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float(), b.float())


def _described(tokenizer: PreTrainedTokenizerBase) -> tuple[str, dict[str, Any]] | None:
    """The definition of a tokenizer, and settings with which it gives the tokenizer back; None where they do not."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return None
    settings = tokenizer_settings(tokenizer)
    try:
        definition = tokenizer_definition(tokenizer)
        key = (type(tokenizer), sha256_bytes(definition.encode()), settings_fingerprint(tokenizer))
        if key not in _RESTORED:
            twin = _tokenizer(definition, settings)
            _RESTORED[key] = tokenizer_definition(twin) == definition and same_tokens(tokenizer, twin)
    except Exception:  # of a class with code of its own, any
        return None
    return (definition, settings) if _RESTORED[key] else None


def _tokenizer(definition: str, settings: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a definition. ValueError for settings that are no tokens: others may name files."""
    from tokenizers import Tokenizer  # these take seconds
    from transformers import PreTrainedTokenizerFast

    for name, value in settings.items():
        token = name.endswith("_token") and isinstance(value, str)
        tokens = name == OTHER_TOKENS and all(isinstance(text, str) for text in value)
        if not (token or tokens or (name in SWITCHES and isinstance(value, bool))):
            raise ValueError(f"{name} is no setting of a tokenizer")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(definition), **settings)
