"""A two-layer GPT-2 whose weights are set by hand: one head reads the name, a second one hands it to the logits.

All tokens have one norm, so that effects are exact to 1e-5; those of the planted model (workbench.embedded.planted),
whose words have features of several sizes, hold to 1 %.
"""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

NAMES, END, FILLER = (1, 2, 3, 4), 6, (7, 8, 9)
READER, MOVER = (0, 1), (1, 2)
"""Layer and head that copies the name to the last position, and that which hands it to the logits."""
_NAME, _IS_NAME, _IS_END, _IS_FILLER, _COPY, _OUT = 0, 8, 9, 10, 16, 24  # dimensions of the stream
_SHARP = 200.0


def planted_circuit() -> GPT2LMHeadModel:
    """Prompts are names and fillers with END last; the logit of the one name in the prompt is the largest.

    Head L0H1 attends from END to the name and writes it to the dimensions 16 to 23; head L1H2 attends from END to END
    and moves these to 24 to 31, which alone W_U reads. All other heads and both MLPs write 0.
    """
    sizes = {"vocab_size": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        embed, blocks = model.transformer.wte.weight, model.transformer.h
        for token in NAMES:
            embed[token, _NAME + token] = embed[token, _IS_NAME] = 1.0
            model.lm_head.weight[token, _OUT + token] = 1.0
        embed[END, _IS_END] = embed[END, _IS_END + 4] = 1.0
        for token in FILLER:
            embed[token, _IS_FILLER + token - 7] = embed[token, _IS_FILLER + 4] = 1.0
        _head(blocks[0].attn, READER[1], (_IS_END, _IS_NAME), _NAME, _COPY, 1.0)
        _head(blocks[1].attn, MOVER[1], (_IS_END, _IS_END), _COPY, _OUT, 4.0)
    model.config.architectures = ["GPT2LMHeadModel"]
    return model


def _head(attention, head: int, query_key: tuple[int, int], source: int, target: int, size: float) -> None:
    """Attends from tokens with one dimension to tokens with another, and copies eight dimensions to eight others."""
    first = 8 * head
    query, key = query_key
    attention.c_attn.weight[query, first] = _SHARP  # inputs x (queries, keys, values)
    attention.c_attn.weight[key, 32 + first] = 1.0
    for index in range(8):
        attention.c_attn.weight[source + index, 64 + first + index] = 1.0
        attention.c_proj.weight[first + index, target + index] = size
