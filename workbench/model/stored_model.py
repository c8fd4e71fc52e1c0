"""What a store keeps of its model: a record in the manifest, and a file with the unembedding and the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from workbench.corpus.tokenizer import token_texts
from workbench.model.fingerprint import settings_fingerprint
from workbench.model.load import Model
from workbench.model.stored_vocabulary import save_vocabulary, vocabulary_tensors
from workbench.model.unembed import NoUnembed, measure_unembed, save_unembed
from workbench.sites.absent_sites import absent_sites
from workbench.store.manifest import ModelRecord

if TYPE_CHECKING:
    from torch import nn


def model_record(model: Model) -> ModelRecord:
    """Returns what a store records of its model. Costs what `Model.identity` does: a checksum of the weights."""
    sites, identity = model.site_map, model.identity()
    return ModelRecord(
        name=model.name,
        architecture=model.architecture,
        fingerprint=identity.weights,
        config_fingerprint=model.config_fingerprint(),
        tokenizer_fingerprint=model.tokenizer_fingerprint(),
        tokenizer_settings=None if model.tokenizer is None else settings_fingerprint(model.tokenizer),
        dtype=str(model.dtype).removeprefix("torch."),
        revision=model.revision,
        n_layers=sites.n_layers,
        d_model=model.d_model,
        vocab=model.vocab,
        adapter=sites.adapter,
        causal=sites.causal,
        identity=identity,
        score_rules=sites.score_rules,
        absent_sites=absent_sites(sites),
    )


def unembed_writer(model: Model) -> Callable[[Path], str | None]:
    """Returns a function that writes unembedding and vocabulary to a path, or returns why there is no unembedding."""

    def write(path: Path) -> str | None:
        try:
            unembed = measure_unembed(model.module, model.site_map.last_block)
        except NoUnembed as error:
            save_vocabulary(path, vocabulary_tensors(model, None))
            return str(error)
        if model.tokenizer is not None:
            unembed = replace(unembed, tokens=tuple(token_texts(model.tokenizer, range(unembed.vocab))))
        dtype = cast("nn.Linear", model.module.get_output_embeddings()).weight.dtype
        save_unembed(unembed, path, dtype, vocabulary_tensors(model, unembed.weight))
        return None

    return write
