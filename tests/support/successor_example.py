"""A small Llama with one kind of successor head planted in each head."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import workbench as wb
from workbench.model.load import Model

SIZES = {"numbers": 9, "number words": 12, "ordinals": 10, "days": 7, "months": 12, "letters": 26}
WIDTH, HEADS = 96, 4
TEXTS = [
    "On Monday, Tom ate. On Tuesday, Lily ran.",
    "one two three four.",
    "Tom saw one, two, three.",
    "first, second, third. Monday and Tuesday and Thursday.",
]


def shift(members, tasks=tuple(SIZES), by=1, wrap=False, until=None) -> torch.Tensor:
    """[read, written] of a map from each member to the one `by` places on."""
    places = {token: i for i, token in enumerate(token for ids in members.values() for token in ids)}
    matrix = torch.zeros(WIDTH, WIDTH)
    for task in tasks:
        ids = members[task]
        for i, token in enumerate(ids[:until]):
            if wrap or 0 <= i + by < len(ids):
                matrix[places[token], places[ids[(i + by) % len(ids)]]] = 1
    return matrix


def llama(members) -> LlamaForCausalLM:
    """Two blocks of four heads, two to each value head, which all but one see everything. Members are unit vectors,
    other tokens random in dimensions of their own; MLPs do nothing; embedding and unembedding are one.

    0.0 the successor; 0.1 a copy; 0.2 and 0.3 share a value head that is silent;
    1.0 the successor of days and months alone; 1.1 always Tuesday; 1.2 the successor, around the end;
    1.3 that of Monday to Thursday.
    """
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=WIDTH,
        head_dim=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=8,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = LlamaForCausalLM(config).eval()
        embedding = module.model.embed_tokens.weight
        ids = [token for part in members.values() for token in part]
        embedding.zero_()
        embedding[:, len(ids) :] = torch.randn(1024, WIDTH - len(ids))
        embedding[ids] = torch.eye(WIDTH)[: len(ids)]
        tuesday = torch.zeros(WIDTH, WIDTH)
        tuesday[: len(ids), embedding[members["days"][1]].argmax()] = 1
        writes = [
            [shift(members), torch.eye(WIDTH), torch.eye(WIDTH), torch.eye(WIDTH)],
            [
                shift(members, ("days", "months")),
                tuesday,
                shift(members, wrap=True),
                shift(members, ("days",), until=4),
            ],
        ]
        diagonal = torch.diag((torch.arange(WIDTH) < len(ids)).float())
        for layer, (block, heads) in enumerate(zip(module.model.layers, writes, strict=True)):
            for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.mlp.down_proj):
                part.weight.zero_()
            block.self_attn.v_proj.weight.copy_(torch.cat([diagonal, diagonal if layer else 0 * diagonal]))
            scale = 0.05 if layer else 1.0  # so that in the text 0.0 is the head that does it
            block.self_attn.o_proj.weight.copy_(torch.cat([scale * head.T for head in heads], 1))
    module.config.architectures = ["LlamaForCausalLM"]
    return module


def recorded(module, tokenizer, out, sites=("z", "resid_post.1"), texts=TEXTS):
    """(model, store); a Model that is given keeps the sites it has found."""
    model = module if isinstance(module, Model) else Model(module, tokenizer, "counting")
    return model, wb.record(model, texts, out=out, sites=sites, dtype="float32", bos="never", show_progress=False)
