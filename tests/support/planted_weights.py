"""Models whose embedding and unembedding are made up, so that what a probe of weights must find is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import workbench as wb


def planted_weights(embedding: np.ndarray, tokenizer=None, unembedding: np.ndarray | None = None) -> wb.Model:
    """A Llama of one small layer with these tables; without `unembedding` they are tied."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    vocab, width = embedding.shape
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=4,
        max_position_embeddings=256,
        tie_word_embeddings=unembedding is None,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        module.get_input_embeddings().weight.copy_(torch.tensor(embedding))
        if unembedding is not None:
            module.get_output_embeddings().weight.copy_(torch.tensor(unembedding))
    module.config.architectures = [type(module).__name__]
    return wb.load_model(module, tokenizer=tokenizer)


def word_tokenizer(words: Sequence[str]):
    """A tokenizer whose tokens are <s>, </s> and each word with a space before it, in this order."""
    from transformers import PreTrainedTokenizerFast

    vocab = {token: id for id, token in enumerate(["<s>", "</s>", *("▁" + word for word in words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
