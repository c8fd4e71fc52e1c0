"""Independent forms of interventions: weights edited after an eager softmax, a block left out, two blocks exchanged."""

import copy
import sys
from contextlib import contextmanager

import torch

TYPES = [
    "llama",
    "gpt2",
    "gpt_neox",
    "gemma2",
    "gemma3_text",
    "mistral",
    "opt",
    "falcon",
    "phi",
    "olmo2",
    "qwen2",
    "cohere",
    "bloom",
    "qwen3",
    "gpt_oss",
    "mixtral",
    "gptj",
    "gpt_bigcode",
    "stablelm",
    "qwen3_next",
]
"""Types of models with attention on which every record is tried."""


def logits(module, ids, **arguments):
    """Logits of a plain pass."""
    with torch.no_grad():
        return module(input_ids=ids, **arguments).logits


@contextmanager
def edited_softmax(layer, edit):
    """Inside, `edit` replaces the weights (batch, head, query, key) of the layer's eager softmax, in order of calls."""
    original, calls, depth = torch.nn.functional.softmax, [], []

    def softmax(tensor, *arguments, **settings):
        depth.append(0)
        try:
            weights = (method if len(depth) > 1 else original)(tensor, *arguments, **settings)
        finally:
            depth.pop()
        if weights.ndim == 4 and _is_attention(sys._getframe(1)):
            calls.append(0)
            if len(calls) == layer + 1:
                weights = edit(weights.float()).to(weights.dtype)
        return weights

    method = torch.Tensor.softmax
    torch.nn.functional.softmax = softmax
    torch.Tensor.softmax = softmax
    try:
        yield calls
    finally:
        torch.nn.functional.softmax = original
        torch.Tensor.softmax = method


def _is_attention(frame):
    return "modeling_" in frame.f_code.co_filename


def eager(module):
    """A copy that attends eagerly."""
    twin = type(module)._from_config(copy.deepcopy(module.config), attn_implementation="eager", dtype=module.dtype)
    twin.load_state_dict(module.state_dict())
    return twin.eval()


def scaled(factor, heads, keys, queries):
    """The closed form of a score change by ln(factor), on weights after the softmax."""

    def edit(weights):
        new = weights.clone()
        for head in heads:
            row = weights[:, head, queries]
            share = row[..., keys].sum(-1, keepdim=True)
            total = 1 + (factor - 1) * share
            row = row / total
            row[..., keys] *= factor
            new[:, head, queries] = row
        return new

    return edit


def redistributed(keep, heads, keys, queries):
    """Weights of `keys` times `keep`, the rest to the other keys in proportion."""

    def edit(weights):
        new = weights.clone()
        for head in heads:
            row = weights[:, head, queries].clone()
            share = row[..., keys].sum(-1, keepdim=True)
            remainder = row.sum(-1, keepdim=True) - share
            moved = torch.where(
                remainder > 1e-6, 1 + (1 - keep) * share / remainder.clamp(min=1e-9), torch.ones_like(remainder)
            )
            share_kept = torch.where(remainder > 1e-6, torch.full_like(remainder, keep), torch.ones_like(remainder))
            factor = moved.expand_as(row).clone()
            factor[..., keys] = share_kept.expand_as(factor[..., keys])
            new[:, head, queries] = row * factor
        return new

    return edit


def blocks_of(module, path):
    """The list of blocks of a module."""
    return module.get_submodule(path)


def without_block(module, path, layer):
    """A copy whose block passes its input on."""
    twin = copy.deepcopy(module)
    block = blocks_of(twin, path)[layer]

    def after(_module, args, kwargs, output):
        before = args[0] if args else next(iter(kwargs.values()))
        return before if isinstance(output, torch.Tensor) else (before, *output[1:])

    block.register_forward_hook(after, with_kwargs=True)
    return twin


def weights_exchanged(module, path, a, b):
    """A copy in which two blocks have each other's weights."""
    twin = copy.deepcopy(module)
    first, two = (copy.deepcopy(blocks_of(twin, path)[layer].state_dict()) for layer in (a, b))
    blocks_of(twin, path)[a].load_state_dict(two)
    blocks_of(twin, path)[b].load_state_dict(first)
    return twin


def generated(module, ids, new=4, **arguments):
    """Logits of generated steps, axes (step, batch, vocab)."""
    settings = {"attention_mask": torch.ones_like(ids), "pad_token_id": 1} | arguments
    with torch.no_grad():
        output = module.generate(
            ids,
            **settings,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(output.logits)
