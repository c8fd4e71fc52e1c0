"""Fingerprints of a model: checksums of its weights, its config and its tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from workbench.io.files import sha256_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_ORIGIN = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Fields of a config that name the place and the program it was saved with."""


def weights_fingerprint(module: PreTrainedModel) -> str:
    """Returns the SHA-256 of every parameter and saved buffer: name, dtype, shape and bytes. About 1 s a gigabyte."""
    import torch  # takes seconds

    from workbench.model.offload import placeholders  # takes seconds: torch

    digest = hashlib.sha256()
    saved, readers = module.state_dict(keep_vars=True), placeholders(module)
    tied: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    counted: set[int | str] = set()
    for name, tensor in sorted(saved.items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        same = {id(tensor), *((name, tied.get(name, name)) if name in readers else ())}
        if same & counted:  # tied weights count once; their placeholders are different objects
            continue
        counted |= same
        tensor = readers[name]() if name in readers else tensor
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
        for piece in data.split(1 << 28):
            digest.update(piece.cpu().numpy().data)
    return digest.hexdigest()


def config_fingerprint(config: PretrainedConfig) -> str:
    """Returns the SHA-256 of a config, without the fields that name the place and the program it was saved with."""
    fields = {name: value for name, value in config.to_diff_dict().items() if name not in _ORIGIN}
    return _sha256(json.dumps(fields, sort_keys=True, default=str))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the SHA-256 of a tokenizer's whole definition."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _sha256(_without_batching(backend.to_str()))
    return _sha256(json.dumps([tokenizer.get_vocab(), tokenizer.special_tokens_map], sort_keys=True))


def _without_batching(definition: str) -> str:
    """Padding and truncation are set by the last caller of a tokenizer, so they are left out."""
    parts = json.loads(definition)
    return json.dumps({**parts, "padding": None, "truncation": None}, sort_keys=True)


def _sha256(text: str) -> str:
    return sha256_bytes(text.encode())
