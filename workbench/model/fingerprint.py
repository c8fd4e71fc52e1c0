"""Fingerprints of a model: checksums of its weights, its config and its tokenizer."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import xxhash

from workbench.io.files import sha256_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_ORIGIN = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Fields of a config that name the place and the program it was saved with."""

OTHER_TOKENS = "extra_special_tokens"
"""Setting of a tokenizer: its special tokens without a role."""
SWITCHES = ("clean_up_tokenization_spaces", "split_special_tokens")
"""Settings of a tokenizer that are true or false, and change its texts and ids."""

_PIECE = 1 << 20  # bytes: in the cache for both checksums


def weights_fingerprint(module: PreTrainedModel) -> str:
    """Returns the SHA-256 of every parameter and saved buffer: name, dtype, shape and bytes.

    About 1 s a gigabyte; again for the same module a tenth of that: it is kept with a faster checksum of the same bytes
    (XXH3, 128 bits), which is computed at each call, so that no change is missed however it was made.
    """
    if (checksums := _KNOWN.get(module)) and _checksum(module, xxhash.xxh3_128()) == checksums[0]:
        return checksums[1]
    fast = xxhash.xxh3_128()
    digest = _checksum(module, hashlib.sha256(), fast)
    _KNOWN[module] = fast.hexdigest(), digest
    return digest


_KNOWN: weakref.WeakKeyDictionary[Any, tuple[str, str]] = weakref.WeakKeyDictionary()  # pyright: ignore[reportInvalidTypeForm]
"""XXH3 and SHA-256 of the weights of each module that was measured."""


def _checksum(module: PreTrainedModel, digest: Any, *other_digests: Any) -> str:
    """Adds the weights to checksums, and returns the first of them."""
    for part in _weights(module):
        for checksum in (digest, *other_digests):
            checksum.update(part)
    return digest.hexdigest()


def _weights(module: PreTrainedModel) -> Iterator[Any]:
    """Name, dtype and shape of each weight, then its bytes in pieces."""
    import torch  # takes seconds

    from workbench.model.offload import placeholders  # takes seconds: torch

    saved, readers = module.state_dict(keep_vars=True), placeholders(module)
    tied: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    counted_weights: set[int | str] = set()
    for name, tensor in sorted(saved.items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        identities = {id(tensor), *((name, tied.get(name, name)) if name in readers else ())}
        if identities & counted_weights:  # tied weights count once; their placeholders are different objects
            continue
        counted_weights |= identities
        tensor = readers[name]() if name in readers else tensor
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        for piece in tensor.detach().contiguous().flatten().view(torch.uint8).split(_PIECE):
            yield piece.cpu().numpy().data


def config_fingerprint(config: PretrainedConfig) -> str:
    """Returns the SHA-256 of a config, without the fields that name the place and the program it was saved with."""
    fields = {name: value for name, value in config.to_diff_dict().items() if name not in _ORIGIN}
    return _sha256(json.dumps(fields, sort_keys=True, default=str))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the SHA-256 of a tokenizer's whole definition."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        return _sha256(tokenizer_definition(tokenizer))
    return _sha256(json.dumps([tokenizer.get_vocab(), tokenizer.special_tokens_map], sort_keys=True))


def tokenizer_definition(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the `tokenizer.json` of a fast tokenizer, whose SHA-256 is its fingerprint."""
    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]  # of fast tokenizers
    return _without_batching(backend.to_str())


def tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns the settings of a tokenizer outside of its definition: special tokens, and what changes its texts."""
    special_tokens = {
        name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)
    }
    other_tokens = getattr(tokenizer, OTHER_TOKENS, None) or []
    switches = {name: bool(getattr(tokenizer, name, False)) for name in SWITCHES}
    return {**special_tokens, OTHER_TOKENS: [str(token) for token in other_tokens], **switches}


def settings_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the SHA-256 of `tokenizer_settings`, in which tokenizers of one fingerprint may differ."""
    return _sha256(json.dumps(tokenizer_settings(tokenizer), sort_keys=True))


@lru_cache(maxsize=4)  # of 50,000 tokens it takes a third of a second, and each recording asks for it
def _without_batching(definition: str) -> str:
    """Padding and truncation are set by the last caller of a tokenizer, so they are left out."""
    parts = json.loads(definition)
    return json.dumps({**parts, "padding": None, "truncation": None}, sort_keys=True)


def _sha256(text: str) -> str:
    return sha256_bytes(text.encode())
