"""GGUF files of a Llama, written as llama.cpp writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'interp-workbench[gguf]'")

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def in_file(name: str) -> str:
    """The name of a Llama's tensor in llama.cpp."""
    module = name.removesuffix(".weight")
    if module in OUTER:
        return f"{OUTER[module]}.weight"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in the order of llama.cpp, which rotates neighbours and not halves."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleaved`."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def heads_of(module, name: str) -> int | None:
    """Number of heads whose rows llama.cpp reorders."""
    config = module.config
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])


def write(path: Path, module, tokenizer=None, kind=None, architecture: str = "llama") -> Path:
    """Writes a Llama as llama.cpp does; matrices in blocks of `kind` where their rows allow it."""
    config, writer = module.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is not None:
        saved = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        ids = {number: token for token, number in saved["vocab"].items()}
        tokens = [ids.get(number, f"<unused{number}>") for number in range(config.vocab_size)]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if number < 2 else 1 for number in range(config.vocab_size)])
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in saved["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    for name, tensor in module.state_dict().items():
        weight, heads = tensor.float().numpy(), heads_of(module, name)
        if heads is not None:
            weight = interleaved(weight, heads)
        if kind is not None and weight.ndim == 2 and weight.shape[1] % 32 == 0:
            writer.add_tensor(in_file(name), gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(in_file(name), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
